"""The problems of a benchmark and the tokens that ask them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError, RowError, reason_of
from hybrid_lora_plugin.preparation.reading import open_rows
from hybrid_lora_plugin.tasks.benchmarks import BENCHMARKS
from hybrid_lora_plugin.tasks.problem import Problem
from hybrid_lora_plugin.tasks.prompts import messages


def read_problems(name: str, entries: Sequence[str]) -> list[Problem]:
    """All problems of a benchmark, in the order of the files.

    Args:
        name: of the benchmark.
        entries: files, folders or ``org/name:split`` of the hub; none takes what the registry names.

    Raises:
        ConfigurationError: a file or the hub cannot be read, a row is no problem with an answer (an evaluation without
            it would be another one), or two problems are the same.
    """
    benchmark, option = BENCHMARKS[name], f"data.{name}"
    problems: dict[str, Problem] = {}
    for entry in entries or benchmark.hub:
        for where, row in open_rows(entry, option).read():
            try:
                problem = benchmark.problem(row)
            except RowError as error:
                raise ConfigurationError(f"{option}: {where}: {error}; give the set as it is published") from error
            if problem.identity in problems:
                raise ConfigurationError(
                    f"{option}: {where} is problem {problem.identity} again; give each problem once"
                )
            problems[problem.identity] = problem
    if not problems:
        raise ConfigurationError(f"{option}: no problem in {', '.join(entries)}; give the set as it is published")
    return list(problems.values())


def published_rows(name: str) -> int:
    """Problems that the published set has."""
    return BENCHMARKS[name].rows


class PromptTokens:
    """A problem as the tokens that the model's chat template makes of it.

    Args:
        tokenizer: of transformers.
        style: of ``tasks.prompts``.

    Attributes:
        template: SHA-256 of the chat template.

    Raises:
        ConfigurationError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, style: str) -> None:
        self._tokenizer, self._style = tokenizer, style
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigurationError(
                f"model: its tokenizer has no chat template ({reason_of(error, 80)}); give an instruct model, or put "
                "chat_template.jinja into its folder"
            ) from error
        self.template = hashlib.sha256(template.encode()).hexdigest()

    def __call__(self, problem: Problem) -> list[int]:
        """Tokens up to where the response begins."""
        return self._tokenizer.apply_chat_template(
            messages(problem, self._style), add_generation_prompt=True, tokenize=True, return_dict=False
        )
