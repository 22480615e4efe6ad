"""The folder of an evaluation.

settings.json            what the responses depend on: another setting in the same folder is refused
problems/NAME.jsonl      what was asked, with the gold answers, so that responses can be judged again years later
responses/NAME.jsonl     every response
judgements/NAME.jsonl    what was said of each
results.json .md .png    what comes of them
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evaluation.records import Judgement, RecordFile, Response
from hybrid_lora_plugin.files import complete_file
from hybrid_lora_plugin.tasks.problem import Problem

SETTINGS = "settings.json"
FORMAT = 1


class EvaluationFolder:
    """The files of one evaluation.

    Args:
        folder: need not exist.
        option: how the user named it, for errors.
    """

    def __init__(self, folder: str | Path, option: str = "output_dir") -> None:
        self.path, self._option = Path(folder), option

    # -- settings -------------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        return (self.path / SETTINGS).is_file()

    def settings(self) -> dict[str, Any]:
        """What the responses depend on, as recorded.

        Raises:
            ConfigurationError: it is no folder of an evaluation, or of a later version.
        """
        file = self.path / SETTINGS
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            known = settings["format"] == FORMAT and isinstance(settings["benchmarks"], dict)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{self._option}: {str(self.path)!r} is no folder of an evaluation ({_reason(error)}); give one that "
                "hybrid-lora-eval wrote"
            ) from error
        if not known:
            raise ConfigurationError(
                f"{self._option}: {file} has format {settings['format']!r} and this version reads {FORMAT}; use the "
                "version that wrote it"
            )
        return settings

    def open(self, settings: Mapping[str, Any], benchmarks: Mapping[str, Mapping[str, Any]]) -> None:
        """Record what the responses will depend on, or see that it is what those in the folder depend on.

        Args:
            settings: name of the option -> value, for all benchmarks.
            benchmarks: the same for each benchmark; one that is new in the folder is added.

        Raises:
            ConfigurationError: the folder holds something else, or responses under another setting, by name.
        """
        if self.exists:
            recorded = self.settings()
            self._require_same(recorded["settings"], settings, "")
            for name, of_benchmark in benchmarks.items():
                if name in recorded["benchmarks"]:
                    self._require_same(recorded["benchmarks"][name], of_benchmark, f" of {name}")
            benchmarks = recorded["benchmarks"] | dict(benchmarks)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigurationError(
                f"{self._option}: {str(self.path)!r} is not an empty folder and no evaluation; give a new folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            content = {"format": FORMAT, "settings": dict(settings), "benchmarks": dict(benchmarks)}
            with complete_file(self.path / SETTINGS) as unfinished:
                unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(
                f"{self._option}: {str(self.path)!r} cannot be written ({_reason(error)}); give another folder"
            ) from error

    def _require_same(self, recorded: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
        for name in {**recorded, **given}:
            before, now = recorded.get(name), given.get(name)
            if before != now:
                raise ConfigurationError(
                    f"{name}{where}: {_shown(now)}, and the responses in {self.path} were made with {_shown(before)}; "
                    "give that again, or another output_dir"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here.

        Raises:
            ConfigurationError: one does.
        """
        # A file of its own: the settings are replaced whole, and a lock goes with the file that was.
        with (self.path / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigurationError(
                    f"{self._option}: another process is writing to {self.path}; wait for it, or give another folder"
                ) from error
            yield

    # -- problems -------------------------------------------------------------------------------------------------

    def write_problems(self, name: str, problems: Sequence[Problem]) -> None:
        """Keep what is asked; nothing is written where it is there already."""
        file = self.path / "problems" / f"{name}.jsonl"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            with complete_file(file) as unfinished:
                unfinished.write_text("".join(map(_problem_line, problems)), encoding="utf-8")

    def problems(self, name: str) -> list[Problem]:
        """What was asked.

        Raises:
            ConfigurationError: it cannot be read, or is not what the responses were made of.
        """
        file = self.path / "problems" / f"{name}.jsonl"
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            problems = [Problem(**(row | {"options": tuple(row["options"])})) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{self._option}: {file} cannot be read ({_reason(error)}); restore the file"
            ) from error
        if digest(problems) != self.settings()["benchmarks"][name]["problems"]:
            raise ConfigurationError(
                f"{self._option}: {file} is not what the responses beside it answer; restore the file"
            )
        return problems

    # -- records --------------------------------------------------------------------------------------------------

    def responses(self, name: str) -> RecordFile[Response]:
        """Every response to a benchmark; raises as ``RecordFile``."""
        return RecordFile(self.path / "responses" / f"{name}.jsonl", Response)

    def judgements(self, name: str) -> RecordFile[Judgement]:
        """What was said of them; raises as ``RecordFile``."""
        return RecordFile(self.path / "judgements" / f"{name}.jsonl", Judgement)


def digest(problems: Sequence[Problem]) -> str:
    """SHA-256 of problems and their order, 64 hexadecimal digits."""
    return hashlib.sha256("".join(map(_problem_line, problems)).encode()).hexdigest()


def _problem_line(problem: Problem) -> str:
    fields = asdict(problem) | {"options": list(problem.options), "metadata": dict(problem.metadata)}
    return json.dumps(fields, sort_keys=True) + "\n"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _reason(error: BaseException) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else " ".join(str(error).split())
