"""Questions that an evaluation set has too: a run of n words in common, or the same question.

N-grams of words as in the clean subsets of GPT-3 (arXiv 2005.14165, appendix C), with n = 13 by default. An n-gram that
many problems of one set share is its wording and no evidence, such as "since the answer may be very large return it
modulo 10 9 7": those count only through the comparison of whole questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hybrid_lora_plugin.preparation.questions import digest, words
from hybrid_lora_plugin.tasks.problem import Problem

#: Problems of one set that may share an n-gram before it is taken for wording.
SHARED_BY_MOST = 3


@dataclass(frozen=True)
class Hit:
    """A question that an evaluation set has too.

    Attributes:
        benchmark: name of the set.
        identity: of the problem in it.
        text: the n-gram in common; empty where the whole questions are the same.
    """

    benchmark: str
    identity: str
    text: str


class EvaluationSet:
    """The questions of one evaluation set, to look others up in.

    Attributes:
        name: of the set.
        problems: how many.
        ngrams: that count as evidence.
        wording: n-grams that do not, because more than ``SHARED_BY_MOST`` problems have them.
    """

    def __init__(self, name: str, problems: Iterable[Problem], n: int) -> None:
        """From the set's problems.

        Args:
            name: of the set.
            problems: all of them; 8 bytes of hash are kept for each n-gram.
            n: words of an n-gram.
        """
        self.name, self._n = name, n
        self._identities: list[str] = []
        self._questions: dict[bytes, int] = {}
        found: dict[int, int] = {}
        shared: dict[int, int] = {}
        for number, problem in enumerate(problems):
            self._identities.append(problem.identity)
            self._questions.setdefault(digest(problem.question), number)
            for key in {key for key, _ in ngrams(problem.question, n)}:
                if key in found:
                    shared[key] = shared.get(key, 1) + 1
                found.setdefault(key, number)
        wording = [key for key, count in shared.items() if count > SHARED_BY_MOST]
        for key in wording:
            del found[key]
        self._ngrams = found
        self.problems, self.ngrams, self.wording = len(self._identities), len(found), len(wording)

    def find(self, question: bytes, grams: Iterable[tuple[int, str]]) -> Hit | None:
        """The first problem of the set that shares the question or an n-gram; None if there is none.

        Args:
            question: its ``digest``.
            grams: its ``ngrams``.
        """
        if question in self._questions:
            return Hit(self.name, self._identities[self._questions[question]], "")
        for key, text in grams:
            if key in self._ngrams:
                return Hit(self.name, self._identities[self._ngrams[key]], text)
        return None


class EvaluationSets:
    """Several sets, looked up together."""

    def __init__(self, sets: Iterable[EvaluationSet], n: int) -> None:
        self.sets, self.n = list(sets), n

    def find(self, question: str) -> list[Hit]:
        """A hit for every set that has the question or part of it."""
        if not self.sets:
            return []
        key, grams = digest(question), list(ngrams(question, self.n))
        return [hit for evaluation in self.sets if (hit := evaluation.find(key, grams)) is not None]


def ngrams(question: str, n: int) -> Iterator[tuple[int, str]]:
    """Every run of n words with a hash of 64 bits; none where the question is shorter."""
    # Late, so that --help answers at once.
    from xxhash import xxh3_64_intdigest

    every = words(question)
    for start in range(len(every) - n + 1):
        text = " ".join(every[start : start + n])
        yield xxh3_64_intdigest(text.encode()), text
