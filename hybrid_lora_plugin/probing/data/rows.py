"""Training rows from files or folders: a prompt and a response each, or an error that names the row."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.files import file_sha256
from hybrid_lora_plugin.probing.data.files import data_files
from hybrid_lora_plugin.probing.data.formats import Store, open_stores
from hybrid_lora_plugin.probing.data.layout import TEMPLATE_COLUMNS, Layout, hint, unused
from hybrid_lora_plugin.probing.data.turns import refuse_lone_surrogates, speaks, turns_of

#: Called while a file is read, with the rows so far and the share of all files that is read, from 0 to 1.
Watch = Callable[[int, float], None]


@dataclass(frozen=True)
class Row:
    """One prompt with its response.

    Attributes:
        prompt: plain text, or the chat turns before the response.
        response: text of the assistant turn that the model is to say; null if it speaks in ``fields`` only.
        fields: the other fields of that turn, e.g. ``tool_calls``.
        options: what the chat template is given beside the turns, e.g. ``tools``.
        turns_after: turns behind the response, which are not used.
        where: how to name the row in an error.
    """

    prompt: str | list[dict]
    response: str | None
    fields: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    turns_after: int = 0
    where: str = field(default="probe.files: a row", compare=False)


class Rows:
    """All rows of all files, left on disk: ``len(rows)`` counts them, ``read`` gives some.

    Attributes:
        unused: columns that nothing reads, of any file.
    """

    def __init__(self, stores: Sequence[Store], layout: Layout | None = None) -> None:
        """Rows of stores that have been scanned, in that order."""
        self._stores = [store for store in stores if len(store)]
        self._layout = layout or Layout()
        self.unused = sorted({name for store in self._stores for name in unused(store.columns, self._layout)})

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
                    yield start + index, row_of(value, f"probe.files: row {index + 1} of {store.name}", self._layout)


def read_rows(
    files: Sequence[str], layout: Layout | None = None, watch: Watch | None = None
) -> tuple[Rows, list[dict]]:
    """Check every row of every file in one pass, without keeping any.

    Args:
        files: see ``files.data_files``, or ``NAME:SPLIT`` of a dataset on the hub.
        layout: names of the columns.
        watch: called now and then.

    Returns:
        The rows, and for each data file ``{"name", "rows", "sha256"}``; the name relative to the folder given
        (of a file given by itself, without its folder), so that the record does not depend on where the data lie.

    Raises:
        ProbeError: no file, a missing, empty or unreadable one, or a row without prompt or response.
    """
    if not files:
        raise ProbeError("probe.files: no file given; give JSONL or Parquet files, e.g. probe.files=[train.jsonl]")
    layout = layout or Layout()
    opened = [(entry, open_stores(entry, layout)) for entry in files]
    total = sum(store.size for _, stores in opened for _, store in stores)
    checked, before = 0, 0
    sources = []
    for entry, stores in opened:
        for name, store in stores:
            for number, value in store.scan():
                if value is not None:
                    row_of(value[0], f"probe.files: row {number} of {store.name}", layout)
                if watch is not None:
                    watch(checked + number, (before + store.done) / max(1, total))
            sources.append({"name": name, "rows": len(store), "sha256": store.sha256})
            checked, before = checked + len(store), before + store.size
        if not sum(len(store) for _, store in stores):
            raise ProbeError(f"probe.files: {entry} is empty; give a file with rows")
    return Rows([store for _, stores in opened for _, store in stores], layout), sources


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


def row_of(value: Any, where: str, layout: Layout | None = None) -> Row:
    """A prompt and a response from what a file holds.

    Args:
        value: an object with ``messages``, or with ``prompt`` (a text or chat turns) and ``response`` (a text or one
            assistant turn).
        where: how to name the row in an error.
        layout: names of the columns.

    Raises:
        ProbeError: any other value, or one without text.
    """
    layout = layout or Layout()
    if not isinstance(value, dict):
        raise ProbeError(f"{where}: not an object; {layout.wanted()}")
    messages, prompt, response = layout.messages_of(value), layout.prompt_of(value), layout.response_of(value)
    after = 0
    if messages is not None:
        turns = turns_of(messages, f"{where}: {layout.messages}")
        last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        if last == 0:
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns)) or "none"
            raise ProbeError(
                f"{where}: {layout.messages} has no assistant turn after a prompt, so no response (roles: "
                f"{roles!r:.60}); {layout.wanted()}"
            )
        prompt, answer, after = turns[:last], turns[last], len(turns) - last - 1
    elif prompt is None or response is None:
        # A row of a Parquet file of several layouts has all columns, empty ones too.
        if not all(name in value or name.partition(".")[0] in value for name in (layout.prompts[0], layout.response)):
            raise ProbeError(
                f"{where}: neither `{layout.messages}` nor `{layout.prompt}` and `{layout.response}` (it has "
                f"{sorted(map(str, value))}); {hint(value)}",
                see="rows-of-another-layout",
            )
        missing, column = ("prompt", layout.prompt) if prompt is None else ("response", layout.response)
        raise ProbeError(f"{where}: no {missing} in `{column}`; give a text or remove the row")
    else:
        if not isinstance(prompt, str):
            prompt = turns_of(prompt, f"{where}: {layout.prompt}")
        answer = _answer(response, where, layout.response)
    if not (answer["content"] or "").strip() and not speaks(answer):
        raise ProbeError(f"{where}: no response; give a text or remove the row")
    if not prompt:
        raise ProbeError(f"{where}: no prompt; give a text or remove the row")
    rest = {name: field for name, field in answer.items() if name not in ("role", "content")}
    row = Row(prompt, answer["content"], rest, _options(value, where), after, where)
    refuse_lone_surrogates([row.prompt, row.response, row.fields, row.options], f"{where}: a text")
    return row


def _answer(value: Any, where: str, column: str) -> dict:
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    if isinstance(value, list) and len(value) == 1:
        (turn,) = turns_of(value, f"{where}: {column}")
        if turn["role"] == "assistant":
            return turn
    raise ProbeError(
        f"{where}: no response, but {type(value).__name__} in `{column}`; give a text, or a list of one assistant turn"
    )


def _options(value: dict, where: str) -> dict:
    """What goes to the chat template beside the turns; texts that hold JSON are read."""
    options: dict[str, Any] = {}
    for name in TEMPLATE_COLUMNS:
        given = value.get(name)
        if given is None or given == [] or given == "":
            continue
        wanted = {"chat_template_kwargs": dict, "enable_thinking": bool}.get(name, list)
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise ProbeError(f"{where}: `{name}` is a text that is not JSON ({error}); correct it") from error
        if isinstance(given, list):
            given = [_parsed(inner) for inner in given]
        if not isinstance(given, wanted) or (wanted is list and not all(isinstance(inner, dict) for inner in given)):
            form = {dict: "an object", bool: "true or false", list: "a list of objects"}[wanted]
            raise ProbeError(f"{where}: `{name}` is {given!r:.60}; give {form}, or drop the column")
        options |= given if name == "chat_template_kwargs" else {name: given}
    return options


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
