"""What each set gives: which rows there are, and what a row becomes."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.config_data import DataCommandConfig
from hybrid_lora_plugin.errors import ConfigurationError, RowError
from hybrid_lora_plugin.preparation import mixture
from hybrid_lora_plugin.preparation.code_tests import CodeTests
from hybrid_lora_plugin.preparation.reading import Rows, open_rows
from hybrid_lora_plugin.preparation.table import rl_row, sft_row
from hybrid_lora_plugin.tasks.benchmarks import BENCHMARKS, Benchmark, benchmark
from hybrid_lora_plugin.tasks.problem import Problem
from hybrid_lora_plugin.tasks.prompts import user_turn
from hybrid_lora_plugin.tasks.schemas import identity_of, refuse_half_characters, text_in

_CALCULATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Item:
    """A row that can be kept.

    Attributes:
        question: what makes it the same as another, or part of an evaluation set.
        problem: what has to be checkable; None for a conversation.
        row: split -> the row to write.
    """

    question: str
    problem: Problem | None
    row: Callable[[str], dict]


class DataSet(ABC):
    """A set to prepare.

    Attributes:
        title, source: for the datasheet.
        parts: name -> rows; one part without a name where the set has none.
        split: ``train``, or ``test`` of a set that nothing is trained on.
        notes: what a reader of the data has to know.
        lent: what lends tests, if anything does.
    """

    title: str
    source: str
    parts: dict[str, Rows]
    split: str
    notes: list[str]
    lent: Rows | None = None

    @abstractmethod
    def item(self, row: Any, part: str, index: int) -> Item:
        """What a row becomes.

        Raises:
            RowError: nothing that can be kept.
        """


def data_set(config: DataCommandConfig) -> DataSet:
    """The set that a configuration names, opened.

    Raises:
        ConfigurationError: its rows are not where they should be, or the set has nothing of that format.
    """
    return Mixture(config) if config.set == "mixture_of_thoughts" else Benchmarks(config)


class Mixture(DataSet):
    """Mixture-of-Thoughts."""

    title, source, split = "Mixture-of-Thoughts", mixture.SOURCE, "train"

    def __init__(self, config: DataCommandConfig) -> None:
        names = list(mixture.PARTS) if config.configs == ["all"] else list(dict.fromkeys(config.configs))
        self.parts = {name: open_rows(_part_of(config.source, name, names), "source") for name in names}
        self._style, self._rl, self._tests = config.prompt, config.format == "rl", None
        if self._rl:
            self.notes = [
                "Answers are distilled: each is what DeepSeek-R1 concluded in the last box of its response. Nobody has "
                "verified them, and a part of them is wrong.",
                "Code is Codeforces and has no tests here; a question is kept only where LeetCodeDataset has the same "
                "statement with tests, which is rare. For code train on set=leetcode beside this.",
            ]
        else:
            self.notes = ["Responses are distilled from DeepSeek-R1 and kept as they are, whether right or wrong."]
        if self._rl and "code" in names and config.code_tests:
            self.lent = open_rows(config.code_tests, "code_tests")

    def prepare_tests(self) -> CodeTests | None:
        """Read what lends tests; returns it."""
        if self.lent is not None and self._tests is None:
            self._tests = CodeTests(problems_of(BENCHMARKS["leetcode"], self.lent, "code_tests", 0))
        return self._tests

    def item(self, row: Any, part: str, index: int) -> Item:
        """See ``DataSet``."""
        turns = mixture.conversation(row)
        origin = str(row.get("source") or "")
        refuse_half_characters(origin, "`source`")
        if self._rl:
            problem = mixture.problem_of(turns, part, self.prepare_tests())
            style = self._style
            return Item(problem.question, problem, lambda split: rl_row(problem, style, split, index, part, origin))
        question = next(turn["content"] for turn in turns if turn["role"] == "user")
        identity = identity_of(question)
        return Item(question, None, lambda split: sft_row(turns, self.source, identity, split, index, part, origin))


class Benchmarks(DataSet):
    """A set of ``tasks.benchmarks``: its training split if it has one, else its problems as a test."""

    def __init__(self, config: DataCommandConfig) -> None:
        self._set = benchmark(config.set, "set")
        self.title, self.source = self._set.title, self._set.source
        self.split = "train" if self._set.train else "test"
        entries = [config.source] if config.source else [self._set.train] if self._set.train else [*self._set.hub]
        self.parts = {"" if len(entries) == 1 else entry: open_rows(entry, "source") for entry in entries}
        self._style, self._rl, self._seed = config.prompt, config.format == "rl", config.seed
        if not self._rl and config.set != "gsm8k":
            raise ConfigurationError(
                f"format: {self.title} has no responses to learn from; give format=rl, or set=mixture_of_thoughts"
            )
        self.notes = [
            "Answers are those of the set's authors."
            if self._rl
            else "Solutions are those of the set's authors, without marks of a calculator, with the answer in a box."
        ]
        if self._set.name == "gpqa":
            self.notes.append(f"Options are in an order that follows from the seed {self._seed} and the record.")

    def item(self, row: Any, part: str, index: int) -> Item:
        """See ``DataSet``."""
        if not isinstance(row, Mapping):
            raise RowError("no object", f"{row!r:.60}; wanted an object")
        problem = self._set.problem(row, seed=self._seed)
        if self._rl:
            return Item(problem.question, problem, lambda split: rl_row(problem, self._style, split, index))
        steps = _CALCULATION.sub("", text_in(row, "answer")).rpartition("####")[0].strip()
        turns = [
            {"role": "user", "content": user_turn(problem, self._style)},
            {"role": "assistant", "content": f"{steps}\n\nThe answer is $\\boxed{{{problem.gold}}}$.".strip()},
        ]
        return Item(problem.question, None, lambda split: sft_row(turns, self.source, problem.identity, split, index))


@dataclass(frozen=True)
class Evaluation:
    """An evaluation set and where its rows are.

    Attributes:
        benchmark: the set.
        rows: of each place that holds some of them.
        option: where the user named it.
    """

    benchmark: Benchmark
    rows: tuple[Rows, ...]
    option: str

    def origin(self) -> list[dict]:
        """As of ``Rows``."""
        return [origin for rows in self.rows for origin in rows.origin()]

    def problems(self, seed: int) -> Iterator[Problem]:
        """All problems.

        Raises:
            ConfigurationError: a row that is none: an evaluation with fewer problems would be another one.
        """
        for rows in self.rows:
            yield from problems_of(self.benchmark, rows, self.option, seed)


def evaluations(given: list[str], option: str) -> list[Evaluation]:
    """The evaluation sets that an option lists as ``NAME`` or ``NAME=FILE``.

    Raises:
        ConfigurationError: an unknown name, one that is there twice, or rows that are not there.
    """
    opened: dict[str, Evaluation] = {}
    for entry in given:
        name, equals, place = entry.partition("=")
        chosen = benchmark(name, option)
        if name in opened:
            raise ConfigurationError(f"{option}: {name} is given twice; give it once")
        places = (place,) if equals else chosen.hub
        opened[name] = Evaluation(chosen, tuple(open_rows(each, option) for each in places), option)
    return list(opened.values())


def problems_of(chosen: Benchmark, rows: Rows, option: str, seed: int) -> Iterator[Problem]:
    """The problems of rows of an evaluation set; errors as of ``Evaluation.problems``."""
    for where, row in rows.read():
        try:
            if not isinstance(row, Mapping):
                raise RowError("no object", f"{row!r:.60}; wanted an object")
            yield chosen.problem(row, seed=seed)
        except RowError as error:
            raise ConfigurationError(f"{option}: {where}: {error}") from error


def _part_of(source: str | None, part: str, parts: list[str]) -> str:
    if source is None:
        return f"{mixture.SOURCE}/{part}:train"
    folder = Path(source).expanduser() / part
    if folder.is_dir():
        return str(folder)
    if len(parts) > 1:
        there = "is not a folder" if not os.path.isdir(Path(source).expanduser()) else f"has no folder {part}"
        raise ConfigurationError(
            f"source: {source!r} {there}; give the folder with {', '.join(parts)}, or one part by configs=[{part}]"
        )
    return source
