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
        row = 0

        def broken(reason: str) -> ProbeError:
            return ProbeError(f"probe.files: row {row + 1} of {self.file} is not JSON ({reason}); correct it")

        with readable(self.file, "a JSON"), _opened(self.file) as stream:
            window = _Window(self._texts(stream))
            window.skip("[")
            while window.next() != "]":
                if not window.next():
                    raise broken("the array does not end")
                try:
                    value = window.value()
                except RecursionError as error:
                    raise broken("it is nested too deep") from error
                except ValueError as error:
                    raise broken(str(error)) from error
                yield value
                row += 1
                if window.skip(","):
                    if window.next() == "]":
                        raise broken("a comma and no row behind it")
                elif window.next() not in ("", "]"):
                    raise broken("no comma before it")
            window.skip("]")
            if window.next():
                raise broken("there is more behind the end of the array")

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


class _Window:
    """A part of a long text, from where it is read on."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks, self._text, self._at, self._ended = blocks, "", 0, False
        self._decoder = json.JSONDecoder()

    def next(self) -> str:
        """The next character that is no white space, without reading it; empty at the end of the text."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def skip(self, sign: str) -> bool:
        """Read one character if it is the next, and say whether it was."""
        found = self.next() == sign
        self._at += found
        return found

    def value(self) -> Any:
        """Read a JSON value.

        Raises:
            ValueError: there is none.
        """
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # a number could go on in the next block
                    self._at = end
                    return value
            except ValueError:
                if self._ended:
                    raise
            self._more()

    def _more(self) -> None:
        """Take in at least as much text as is there: the work stays linear where a row is larger than many blocks."""
        parts, wanted = [self._text[self._at :]], max(1, len(self._text) - self._at)
        self._at, self._ended = 0, True
        for block in self._blocks:
            parts.append(block)
            wanted -= len(block)
            if wanted <= 0:
                self._ended = False
                break
        self._text = "".join(parts)


def _decoded(line: bytes, file: Path, what: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, what, utf16=line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))) from error


def _not_utf8(file: Path, what: str, utf16: bool = False) -> ProbeError:
    is_what = "UTF-16, not UTF-8 text" if utf16 else "not UTF-8 text"
    return ProbeError(f"probe.files: {file} is {is_what} ({what}); give a JSONL file in UTF-8 or a Parquet file")
