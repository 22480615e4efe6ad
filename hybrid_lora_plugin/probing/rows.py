"""Training rows from JSONL or Parquet: a prompt and a response each, or an error that names the row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.probing.errors import ProbeError

_FORMS = "give `messages` that end with an assistant turn, or `prompt` and `response`"


@dataclass(frozen=True)
class Row:
    """One prompt with its response.

    Attributes:
        prompt: plain text, or the chat turns before the response.
        response: what the model is to say.
    """

    prompt: str | list[dict]
    response: str


def read_rows(files: Sequence[str]) -> tuple[list[Row], list[dict]]:
    """Read all rows of all files, in order.

    Args:
        files: paths ending in ``.jsonl``, ``.json`` (one object a line) or ``.parquet``.

    Returns:
        The rows, and for each file ``{"name", "rows", "sha256"}``; the name without its folder, so that the
        record does not depend on where the data lie.

    Raises:
        ProbeError: no file, a missing, empty or unreadable one, or a row without prompt or response.
    """
    if not files:
        raise ProbeError("probe.files: no file given; give JSONL or Parquet files, e.g. probe.files=[train.jsonl]")
    rows: list[Row] = []
    sources = []
    for name in files:
        file = Path(name)
        if not file.is_file():
            raise ProbeError(f"probe.files: {name!r} is not a file; give a JSONL or Parquet file")
        before = len(rows)
        rows.extend(_row(value, f"probe.files: row {number} of {name}") for number, value in _values(file))
        if len(rows) == before:
            raise ProbeError(f"probe.files: {name} is empty; give a file with rows")
        sources.append({"name": file.name, "rows": len(rows) - before, "sha256": _sha256(file)})
    return rows, sources


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _values(file: Path) -> Iterator[tuple[int, Any]]:
    """Rows with their number from 1 (of a JSONL file, the line)."""
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ProbeError(f"probe.files: {file} needs pyarrow; run `pip install pyarrow` or give JSONL") from error
        try:
            values = pyarrow.parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ProbeError(
                f"probe.files: {file} is not a Parquet file ({_first_line(error)}); give another file"
            ) from error
        yield from enumerate(values, start=1)
        return
    if file.suffix not in (".jsonl", ".json"):
        raise ProbeError(f"probe.files: {file} ends in {file.suffix!r}; give a .jsonl or .parquet file")
    with file.open(encoding="utf-8") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise ProbeError(
                        f"probe.files: row {number} of {file} is not JSON ({error}); correct it"
                    ) from error
        except UnicodeDecodeError as error:
            raise ProbeError(f"probe.files: {file} is not UTF-8 text; give a JSONL or Parquet file") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ProbeError(f"{where}: not an object; {_FORMS}")
    if value.get("messages") is not None:
        turns = _turns(value["messages"], f"{where}: messages")
        last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        if last == 0:
            raise ProbeError(f"{where}: messages has no assistant turn after a prompt, so no response; {_FORMS}")
        prompt, response = turns[:last], turns[last]["content"]
    elif "prompt" in value and "response" in value:
        prompt, response = value["prompt"], value["response"]
        if not isinstance(prompt, str):
            prompt = _turns(prompt, f"{where}: prompt")
    else:
        raise ProbeError(f"{where}: neither `messages` nor `prompt` and `response` (it has {sorted(value)}); {_FORMS}")
    if not isinstance(response, str) or not response.strip():
        raise ProbeError(f"{where}: no response; give a text or remove the row")
    if not prompt:
        raise ProbeError(f"{where}: no prompt; give a text or remove the row")
    return Row(prompt, response)


def _turns(value: Any, where: str) -> list[dict]:
    if not isinstance(value, list):
        raise ProbeError(f"{where} is {type(value).__name__}; give a list of {{role, content}}")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ProbeError(f"{where} has a turn without text in `role` and `content`; correct it")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
