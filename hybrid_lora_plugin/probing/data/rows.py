"""Training rows from files or folders: a prompt and a response each, or an error that names the row."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.files import file_sha256
from hybrid_lora_plugin.probing.data.files import data_files
from hybrid_lora_plugin.probing.data.formats import Store, open_store

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


class Rows:
    """All rows of all files, left on disk: ``len(rows)`` counts them, ``read`` gives some."""

    def __init__(self, stores: Sequence[Store]) -> None:
        """Rows of stores that have been scanned, in that order."""
        self._stores = [store for store in stores if len(store)]

    def __len__(self) -> int:
        return sum(map(len, self._stores))

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, Row]]:
        """Some rows, one at a time, each with its index.

        They come in ascending order whatever the order asked for, so that no part of a file is decoded twice.

        Args:
            indices: from 0 over all files, each once.

        Raises:
            ProbeError: a file has changed since it was checked.
        """
        ordered = sorted(indices)
        end = 0
        for store in self._stores:
            start, end = end, end + len(store)
            here = [index - start for index in ordered[bisect_left(ordered, start) : bisect_left(ordered, end)]]
            if here:
                for index, value in store.read(here):
                    yield start + index, row_of(value, f"probe.files: row {index + 1} of {store.file}")


def read_rows(files: Sequence[str]) -> tuple[Rows, list[dict]]:
    """Check every row of every file in one pass, without keeping any.

    Args:
        files: JSONL or Parquet files, or folders of them or saved by ``datasets``; see ``files.data_files``.

    Returns:
        The rows, and for each data file ``{"name", "rows", "sha256"}``; the name relative to the folder given
        (of a file given by itself, without its folder), so that the record does not depend on where the data lie.

    Raises:
        ProbeError: no file, a missing, empty or unreadable one, or a row without prompt or response.
    """
    if not files:
        raise ProbeError("probe.files: no file given; give JSONL or Parquet files, e.g. probe.files=[train.jsonl]")
    stores: list[Store] = []
    sources = []
    for entry in files:
        rows = 0
        for name, file in data_files(entry):
            store = open_store(file)
            for number, value in store.scan():
                row_of(value, f"probe.files: row {number} of {file}")
            stores.append(store)
            sources.append({"name": name, "rows": len(store), "sha256": store.sha256})
            rows += len(store)
        if not rows:
            raise ProbeError(f"probe.files: {entry} is empty; give a file with rows")
    return Rows(stores), sources


def file_digests(files: Sequence[str]) -> list[dict]:
    """``{"name", "sha256"}`` of each data file, as ``read_rows`` records them, without looking at rows.

    Raises:
        ProbeError: as ``files.data_files``.
    """
    digests = []
    for entry in files:
        for name, file in data_files(entry):
            digests.append({"name": name, "sha256": file_sha256(file)})
    return digests


def row_of(value: Any, where: str) -> Row:
    """A prompt and a response from what a file holds.

    Args:
        value: an object with ``messages``, or with ``prompt`` (a text or chat turns) and ``response``.
        where: how to name the row in an error.

    Raises:
        ProbeError: any other value, or one without text.
    """
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
    try:
        f"{prompt}{response}".encode()
    except UnicodeEncodeError as error:
        raise ProbeError(f"{where}: half of a surrogate pair, which is no character; correct the text") from error
    return Row(prompt, response)


def _turns(value: Any, where: str) -> list[dict]:
    if not isinstance(value, list):
        raise ProbeError(f"{where} is {type(value).__name__}; give a list of {{role, content}}")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ProbeError(f"{where} has a turn without text in `role` and `content`; correct it")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
