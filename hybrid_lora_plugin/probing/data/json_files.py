"""Rows of JSON: one object a line, or one array over a whole file; also compressed."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.store import Store, readable

#: Endings of compressed files, as pyarrow names their codecs.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 1 << 20
_SPACE = " \t\r\n"


def open_json(file: Path) -> Store:
    """The store for a JSON file: an array if its first character opens one, else one object a line."""
    with readable(file, "a JSON"), _opened(file) as stream:
        head = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return (JsonArray if head.startswith(b"[") else JsonLines)(file)


def _opened(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed."""
    codec = COMPRESSIONS.get(file.suffix)
    if codec is None:
        return file.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression=codec, buffer_size=_BLOCK), _BLOCK)


class _Columns:
    """The names of all fields that any row has."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def note(self, value: Any) -> None:
        if isinstance(value, dict) and not value.keys() <= self.names.keys():
            self.names |= dict.fromkeys(map(str, value))


class JsonLines(Store):
    """One JSON object a line; blank lines are no rows but count as lines. Keeps eight bytes a row."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._offsets = array("Q")

    def __len__(self) -> int:
        return len(self._offsets)

    def scan(self) -> Iterator[tuple[int, tuple[Any] | None]]:
        """Every row, as no line is certain before it is parsed; the number is that of the line."""
        digest, offset, self._offsets, columns = hashlib.sha256(), 0, array("Q"), _Columns()
        with readable(self.file, "a JSONL"), _opened(self.file) as stream:
            for number, line in enumerate(stream, start=1):
                digest.update(line)
                value = self._value(line, f"row {number}", first=number == 1)
                start, offset = offset, offset + len(line)
                self.done = min(offset, self.size)
                if value is not None:
                    self._offsets.append(start)
                    columns.note(value[0])
                    yield number, value
        self.sha256, self.columns = digest.hexdigest(), list(columns.names)
        if self.file.suffix in COMPRESSIONS:
            self.sha256 = self.digest_of_bytes()

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """See ``Store``; a compressed file is decompressed up to the last of the rows."""
        with readable(self.file, "a JSONL"), _opened(self.file) as stream:
            at = 0
            for index in indices:
                offset = self._offsets[index]
                if stream.seekable() and self.file.suffix not in COMPRESSIONS:
                    stream.seek(offset)
                else:
                    while at < offset:
                        at += len(stream.read(min(_BLOCK, offset - at)))
                line = stream.readline()
                at = offset + len(line)
                value = self._value(line, f"the row at byte {offset}", first=offset == 0)
                yield index, value and value[0]

    def _value(self, line: bytes, what: str, first: bool) -> tuple[Any] | None:
        """What a line holds, in a tuple because it may be null; None for a blank line."""
        text = _decoded(line.removeprefix(codecs.BOM_UTF8) if first else line, self.file, what)
        if not text.strip():
            return None
        try:
            return (json.loads(text),)
        except ValueError as error:
            if text.strip() == "{":
                raise ProbeError(
                    f"probe.files: {what} of {self.file} is not JSON: an object is spread over several lines; give one "
                    f"object a line, or an array of objects"
                ) from error
            raise ProbeError(f"probe.files: {what} of {self.file} is not JSON ({error}); correct it") from error
        except RecursionError as error:
            raise ProbeError(
                f"probe.files: {what} of {self.file} is not JSON that can be read: it is nested too deep; remove it"
            ) from error


class JsonArray(Store):
    """One array of objects, read as a stream: no more than a block and a row of it is in memory."""

    _rows = 0

    def __len__(self) -> int:
        return self._rows

    def scan(self) -> Iterator[tuple[int, tuple[Any] | None]]:
        """Every row; the number is its place in the array, from 1."""
        columns = _Columns()
        self._rows = 0
        for value in self._values():
            self._rows += 1
            columns.note(value)
            yield self._rows, (value,)
        self.columns, self.sha256 = list(columns.names), self.digest_of_bytes()

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """See ``Store``; the array is parsed up to the last of the rows."""
        wanted = iter(indices)
        following = next(wanted, None)
        for index, value in enumerate(self._values()):
            if index == following:
                yield index, value
                following = next(wanted, None)
                if following is None:
                    return

    def _values(self) -> Iterator[Any]:
        decoder, row = json.JSONDecoder(), 0

        def broken(reason: str) -> ProbeError:
            return ProbeError(f"probe.files: row {row + 1} of {self.file} is not JSON ({reason}); correct it")

        with readable(self.file, "a JSON"), _opened(self.file) as stream:
            blocks = self._texts(stream)
            text = next(blocks, "").lstrip(_SPACE)[1:]  # behind the bracket
            ended = False
            while True:
                text = text.lstrip(_SPACE)
                if row and text.startswith(","):
                    rest = text[1:].lstrip(_SPACE)
                    if rest[:1] not in ("", "]"):
                        text = rest
                    elif not ended:
                        text, ended = _longer(text, blocks)
                        continue
                    else:
                        raise broken("a comma and no row behind it")
                elif row and text[:1] not in ("", "]"):
                    raise broken("no comma before it")
                if text.startswith("]"):
                    rest = text[1:] + "".join(blocks)
                    if rest.strip(_SPACE):
                        raise broken("there is more behind the end of the array")
                    return
                try:
                    value, end = decoder.raw_decode(text)
                    complete = ended or end < len(text)  # a number could go on in the next block
                except RecursionError as error:
                    raise broken("it is nested too deep") from error
                except ValueError as error:
                    if ended:
                        raise broken("the array does not end" if not text else str(error)) from error
                    complete = False
                if not complete:
                    text, ended = _longer(text, blocks)
                    continue
                yield value
                row, text = row + 1, text[end:]

    def _texts(self, stream: BinaryIO) -> Iterator[str]:
        decoder, first = codecs.getincrementaldecoder("utf-8")(), True
        self.done = 0
        while True:
            block = stream.read(_BLOCK)
            self.done = min(self.done + len(block), self.size)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(self.file, f"near byte {self.done}") from error
            if first:
                text, first = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not block:
                return


def _longer(text: str, blocks: Iterator[str]) -> tuple[str, bool]:
    """A text with the next blocks behind it, at least as much as it has; and whether there are no more."""
    # Doubling keeps the work linear where one row is larger than many blocks.
    parts, wanted = [text], max(1, len(text))
    for block in blocks:
        parts.append(block)
        wanted -= len(block)
        if wanted <= 0:
            return "".join(parts), False
    return "".join(parts), True


def _decoded(line: bytes, file: Path, what: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, what, utf16=line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))) from error


def _not_utf8(file: Path, what: str, utf16: bool = False) -> ProbeError:
    is_what = "UTF-16, not UTF-8 text" if utf16 else "not UTF-8 text"
    return ProbeError(f"probe.files: {file} is {is_what} ({what}); give a JSONL file in UTF-8 or a Parquet file")
