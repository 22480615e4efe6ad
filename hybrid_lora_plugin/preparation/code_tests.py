"""Tests for a question that came without: from a set that asks the same and has some."""

from __future__ import annotations

from collections.abc import Iterable

from hybrid_lora_plugin.preparation.contamination import ngrams
from hybrid_lora_plugin.preparation.questions import words
from hybrid_lora_plugin.tasks.problem import Problem

#: Words of the statement's beginning that lead to it; shorter statements are compared whole.
_BEGINNING = 8


class CodeTests:
    """Problems with tests, found by their statement inside a longer text."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        """From problems of kind ``code``."""
        self._by_beginning: dict[int, list[tuple[str, Problem]]] = {}
        self.problems = 0
        for problem in problems:
            self.problems += 1
            for key, _ in list(ngrams(problem.question, _BEGINNING))[:1]:
                self._by_beginning.setdefault(key, []).append((_spoken(problem.question), problem))

    def find(self, question: str) -> Problem | None:
        """The problem whose whole statement, word for word, is part of a question; None if there is none."""
        asked = None
        for key, _ in ngrams(question, _BEGINNING):
            for statement, problem in self._by_beginning.get(key, ()):
                asked = asked or _spoken(question)
                if statement in asked:
                    return problem
        return None


def _spoken(text: str) -> str:
    """Words with one space around each, so that none is found inside another."""
    return f" {' '.join(words(text))} "
