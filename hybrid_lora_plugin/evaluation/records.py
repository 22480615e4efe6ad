"""What is kept of every response and of every judgement, line by line, so that an interruption loses nothing.

A line that was not finished when a process ended is removed; any other line that cannot be read is an error, since a
response that is silently gone would change the result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.files import complete_file

#: (identity of the problem, number of the response from 0)
Key = tuple[str, int]
#: why a response ended
STOPPED, CUT, NOT_ASKED = "stop", "length", "prompt_too_long"


@dataclass(frozen=True)
class Response:
    """One response to one problem.

    Attributes:
        identity: of the problem.
        sample: number of the response, from 0.
        text: without special tokens; empty where the problem was not asked.
        tokens: of the response.
        prompt_tokens: of what was asked.
        finish: ``stop``, ``length`` where the limit cut it, ``prompt_too_long`` where it was not asked.
        seed: that it was drawn with.
    """

    identity: str
    sample: int
    text: str
    tokens: int
    prompt_tokens: int
    finish: str
    seed: int

    @property
    def key(self) -> Key:
        return self.identity, self.sample


@dataclass(frozen=True)
class Judgement:
    """What was said of one response; the fields of a ``Verdict`` and the key of the response."""

    identity: str
    sample: int
    correct: bool
    answer: str | None
    timed_out: bool = False
    note: str = ""

    @property
    def key(self) -> Key:
        return self.identity, self.sample


Record = TypeVar("Record", Response, Judgement)


class RecordFile(Generic[Record]):
    """Records of one kind in one file, a JSON object a line.

    Args:
        file: may not exist yet.
        kind: ``Response`` or ``Judgement``.

    Attributes:
        records: all, by key, in the order of the file.

    Raises:
        ConfigurationError: a line cannot be read, or a key stands there twice.
    """

    def __init__(self, file: Path, kind: type[Record]) -> None:
        self._file, self._kind = file, kind
        self.records: dict[Key, Record] = {}
        self._stream = None
        if file.exists():
            self._read()

    def _read(self) -> None:
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = self._kind(**json.loads(line))
                self._check(record)
            except (ValueError, TypeError) as error:
                raise ConfigurationError(
                    f"output_dir: line {number} of {self._file} is no {self._kind.__name__.lower()} ({error}); restore "
                    "the file, or remove that line to have it made again"
                ) from error
            if record.key in self.records:
                raise ConfigurationError(
                    f"output_dir: line {number} of {self._file} repeats sample {record.sample} of {record.identity}; "
                    "remove one of the two"
                )
            self.records[record.key] = record
        # What the last process had begun to write.
        if len(whole) < len(content):
            os.truncate(self._file, len(whole))

    def _check(self, record: Record) -> None:
        kinds = {"str": str, "int": int, "bool": bool, "str | None": (str, type(None))}
        for spec in fields(record):
            value = getattr(record, spec.name)
            if not isinstance(value, kinds[spec.type]) or (spec.type == "int" and isinstance(value, bool)):
                raise ValueError(f"{spec.name} is {value!r}")

    def __enter__(self) -> RecordFile[Record]:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._file.open("ab")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()

    def add(self, record: Record) -> None:
        """Append a record; it is in the file when this returns."""
        self._stream.write(_line(record))
        self._stream.flush()
        self.records[record.key] = record

    def replace(self, records: Iterable[Record]) -> None:
        """Put other records in the place of all there are, at once."""
        records = list(records)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(self._file) as unfinished:
            unfinished.write_bytes(b"".join(map(_line, records)))
        self.records = {record.key: record for record in records}


def _line(record: Response | Judgement) -> bytes:
    # A model may write half of a pair of surrogates, which no UTF-8 holds; JSON's escapes do.
    return json.dumps(asdict(record)).encode() + b"\n"


def in_order(records: Mapping[Key, Record], identities: Iterable[str], samples: int) -> list[list[Record]]:
    """Records as rows, [problems][samples].

    Raises:
        KeyError: one is missing.
    """
    return [[records[identity, sample] for sample in range(samples)] for identity in identities]
