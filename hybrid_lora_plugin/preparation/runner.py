"""A preparation from its first row to the finished folder."""

from __future__ import annotations

import datetime
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrid_lora_plugin import __version__
from hybrid_lora_plugin.config_data import DATA_SETS, DataCommandConfig
from hybrid_lora_plugin.errors import ConfigurationError, RowError
from hybrid_lora_plugin.files import complete_folder
from hybrid_lora_plugin.preparation.contamination import EvaluationSet, EvaluationSets, Hit
from hybrid_lora_plugin.preparation.datasheet import Datasheet, write_datasheet
from hybrid_lora_plugin.preparation.parts import PART_ROWS, Part, PartialState
from hybrid_lora_plugin.preparation.questions import digest, is_held_out
from hybrid_lora_plugin.preparation.sets import DataSet, Evaluation, data_set, evaluations
from hybrid_lora_plugin.preparation.table import join_files, rl_row, write_rows
from hybrid_lora_plugin.tasks.problem import Problem

#: Reasons that are found after a row has become a problem or a conversation.
REPEATED = "a question that was there before"
CONTRADICTED = "a question that was there before with another answer"
CONTAMINATED = "in an evaluation set"
UNCHECKABLE = "an answer that cannot be checked"

#: Kind, gold answer and number of options -> whether a right response would be found right.
Checkable = Callable[[str, str, "int | None"], bool]


class Watch:
    """What is told of a preparation while it runs; silent as it is here."""

    def stage(self, text: str) -> None:
        """Something else begins."""

    def rows(self, read: int, kept: int, share: float | None) -> None:
        """Rows so far, and the share of the part that is being read, from 0 to 1, if known."""

    def close(self) -> None:
        """No more is coming."""


@dataclass(frozen=True)
class Prepared:
    """A finished preparation.

    Attributes:
        folder: with the files.
        sheet: what ``datasheet.json`` says.
        resumed: whether it went on from an earlier one.
    """

    folder: Path
    sheet: dict
    resumed: bool


def partial_folder(output_dir: str) -> Path:
    """Where a preparation is kept until it is finished."""
    folder = Path(output_dir)
    return folder.with_name(f"{folder.name}.partial")


def prepare(config: DataCommandConfig, checkable: Checkable, watch: Watch | None = None) -> Prepared:
    """Prepare a data set; the same call goes on after an interruption, to the same bytes.

    Memory holds the rows of one part, about 200 bytes for each question that is kept, and the n-grams of the evaluation
    sets.

    Args:
        config: what to prepare; ``set`` and ``output_dir`` are given.
        checkable: whether an answer could be found right; rows where it could not are dropped.
        watch: told of it.

    Raises:
        ConfigurationError: something cannot be read or written, or nothing is left of the rows.
    """
    watch, folder = watch or Watch(), Path(config.output_dir or "")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"output_dir: {folder} is there already; give a new folder, or remove it")
    watch.stage("opening")
    chosen = data_set(config)
    against = evaluations(_decontaminated(config, chosen), "decontaminate")
    tests = evaluations(config.evaluation, "evaluation")
    settings = _settings(config, chosen, against, tests)
    state = PartialState(partial_folder(str(folder)), settings, free=("date",))
    watch.stage("reading the evaluation sets")
    found = EvaluationSets(
        [EvaluationSet(e.benchmark.name, e.problems(0), config.ngram) for e in against], config.ngram
    )
    # Before the long pass, so that a row that is none is found at once.
    test_rows = {f"test_{test.benchmark.name}.parquet": list(_test_rows(test, config, checkable)) for test in tests}
    watch.stage("preparing")
    _Preparation(config, chosen, found, checkable, state, watch).run()
    watch.stage("writing")
    splits = [split for split in ("train", "validation", "test") if state.files(split)]
    if not splits:
        reasons = ", ".join(sorted({reason for part in state.parts for reason in part.dropped}))
        raise ConfigurationError(f"source: no row is left ({reasons or 'there are none'}); see {state.folder}")
    with complete_folder(folder) as unfinished:
        for split in splits:
            join_files(state.files(split), unfinished / f"{split}.parquet", config.format)
        for name, rows in test_rows.items():
            write_rows(unfinished / name, rows, "rl")
        sheet = Datasheet(chosen, config, state, found).record(unfinished)
        write_datasheet(unfinished, sheet, state.parts)
    shutil.rmtree(state.folder)
    return Prepared(folder, sheet, state.resumed)


class _Preparation:
    """The pass over the rows."""

    def __init__(
        self,
        config: DataCommandConfig,
        chosen: DataSet,
        found: EvaluationSets,
        checkable: Checkable,
        state: PartialState,
        watch: Watch,
    ) -> None:
        self._config, self._set, self._found, self._checkable = config, chosen, found, checkable
        self._state, self._watch = state, watch
        self._known = dict(state.questions())
        self._read = sum(part.read for part in state.parts)
        self._kept = sum(sum(part.kept.values()) for part in state.parts)

    def run(self) -> None:
        """All rows of all parts that are not finished."""
        for name, rows in self._set.parts.items():
            done = [part for part in self._state.parts if part.config == name]
            if done and done[-1].ended:
                continue
            start = sum(part.read for part in done)
            limit = self._config.limit
            stream = self._limited(rows.read(start), start, limit)
            while not self._part(name, stream, start, rows):
                start = sum(part.read for part in self._state.parts if part.config == name)

    @staticmethod
    def _limited(stream: Iterator[tuple[str, Any]], start: int, limit: int | None) -> Iterator[tuple[str, Any]]:
        while limit is None or start < limit:
            row = next(stream, None)
            if row is None:
                return
            yield row
            start += 1

    def _part(self, name: str, stream: Iterator[tuple[str, Any]], start: int, rows: Any) -> bool:
        """Up to ``PART_ROWS`` rows; whether they were the last."""
        part, kept = Part(name), {"train": [], "validation": [], "test": []}
        questions: list[tuple[bytes, bytes]] = []
        for where, row in stream:
            index = start + part.read
            part.read += 1
            try:
                split, made, known = self._row(row, name, index, where, part)
            except RowError as error:
                part.dropped[error.reason] = part.dropped.get(error.reason, 0) + 1
                part.examples.setdefault(error.reason, f"{where}: {error}")
            else:
                kept[split].append(made)
                questions.append(known)
                self._known[known[0]] = known[1]
                part.kept[split] = part.kept.get(split, 0) + 1
            self._watch.rows(self._read + part.read, self._kept + len(questions), rows.share)
            if part.read == PART_ROWS:
                break
        part.ended = part.read < PART_ROWS
        self._state.add(part, kept, questions, self._config.format)
        self._read, self._kept = self._read + part.read, self._kept + len(questions)
        return part.ended

    def _row(self, row: Any, name: str, index: int, where: str, part: Part) -> tuple[str, dict, tuple[bytes, bytes]]:
        item = self._set.item(row, name, index)
        question, answer = digest(item.question), _answer_digest(item.problem)
        if question in self._known:
            reason = REPEATED if self._known[question] == answer else CONTRADICTED
            raise RowError(reason, f"the question {item.question[:60]!r} is kept from an earlier row")
        hits = self._found.find(item.question) if self._set.split == "train" else []
        if hits:
            part.contaminated.append({"row": index, "question": item.question, "hits": [asdict(hit) for hit in hits]})
            raise RowError(CONTAMINATED, _shared(hits[0]))
        problem = item.problem
        if problem is not None and not self._checkable(problem.kind, problem.gold, len(problem.options) or None):
            raise RowError(UNCHECKABLE, f"the answer {problem.gold[:60]!r} could not be found right in a response")
        split = self._set.split
        if split == "train" and is_held_out(question, self._config.validation, self._config.seed):
            split = "validation"
        return split, item.row(split), (question, answer)


def _answer_digest(problem: Problem | None) -> bytes:
    gold = "" if problem is None else "".join(problem.gold.split())
    if problem is not None and problem.kind == "letter":
        # The letter alone says nothing where options are in another order.
        gold = "".join(problem.options["ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(problem.gold)].split())
    return hashlib.sha256(gold.encode()).digest()[:8]


def _shared(hit: Hit) -> str:
    what = f"shares {hit.text!r} with" if hit.text else "is the question of"
    return f"it {what} problem {hit.identity} of {hit.benchmark}"


def _decontaminated(config: DataCommandConfig, chosen: DataSet) -> list[str]:
    """Names of the sets whose questions are left out."""
    if chosen.split != "train" or config.decontaminate != ["auto"]:
        return [] if chosen.split != "train" else config.decontaminate
    return list(DATA_SETS[1:]) if config.set == "mixture_of_thoughts" else [config.set]


def _settings(config: DataCommandConfig, chosen: DataSet, against: list[Evaluation], tests: list[Evaluation]) -> dict:
    """All that the result depends on, and the day on which it was begun."""
    return {
        **{name: value for name, value in asdict(config).items() if name not in ("output_dir", "source", "code_tests")},
        "decontaminate": [evaluation.benchmark.name for evaluation in against],
        "evaluation": [evaluation.benchmark.name for evaluation in tests],
        "source": {name: rows.origin() for name, rows in chosen.parts.items()},
        "code_tests": chosen.lent.origin() if chosen.lent else None,
        "files of decontaminate": {e.benchmark.name: e.origin() for e in against},
        "files of evaluation": {e.benchmark.name: e.origin() for e in tests},
        "version": __version__,
        "date": datetime.date.today().isoformat(),
    }


def _test_rows(test: Evaluation, config: DataCommandConfig, checkable: Checkable) -> Iterator[dict]:
    for index, problem in enumerate(test.problems(config.seed)):
        if not checkable(problem.kind, problem.gold, len(problem.options) or None):
            raise ConfigurationError(
                f"evaluation: the answer {problem.gold[:60]!r} of problem {problem.identity} of "
                f"{test.benchmark.title} cannot be checked; leave this set out"
            )
        yield rl_row(problem, config.prompt, "test", index)
