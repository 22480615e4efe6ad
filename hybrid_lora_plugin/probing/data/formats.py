"""One data file of any format: one pass over all of it, then the rows asked for. Nothing else stays in memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.files import file_sha256
from hybrid_lora_plugin.probing.data.screen import unproven

if TYPE_CHECKING:
    import pyarrow

_COLUMNS = ("messages", "prompt", "response")
#: Rows decoded at a time: enough that the work per batch vanishes, few enough for rows of 100 kB.
_BATCH = 1024


class Store(Protocol):
    """A data file.

    Attributes:
        file: its path.
        sha256: of its bytes; known after ``scan``.
    """

    file: Path
    sha256: str

    def __len__(self) -> int:
        """Rows; known after ``scan``."""

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Pass over the file once, and give the rows that are not certain to be usable, numbered from 1.

        Raises:
            ProbeError: the file cannot be read.
        """

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Rows by index from 0, which must ascend."""


def open_store(file: Path) -> Store:
    """The store for a file, by its suffix."""
    return {".parquet": ParquetFile, ".arrow": SavedShard}.get(file.suffix, JsonLines)(file)


class JsonLines:
    """One JSON object a line; blank lines are no rows but count as lines. Keeps eight bytes a row."""

    def __init__(self, file: Path) -> None:
        self.file, self.sha256 = file, ""
        self._offsets = array("Q")

    def __len__(self) -> int:
        return len(self._offsets)

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Every row, as no line is certain before it is parsed; the number is that of the line."""
        digest, offset, self._offsets = hashlib.sha256(), 0, array("Q")
        with _readable(self.file, "a JSONL"), self.file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                digest.update(line)
                value = self._value(line, f"row {number}")
                if value is not None:
                    self._offsets.append(offset)
                    yield number, value[0]
                offset += len(line)
        self.sha256 = digest.hexdigest()

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """See ``Store``."""
        with _readable(self.file, "a JSONL"), self.file.open("rb") as stream:
            for index in indices:
                stream.seek(self._offsets[index])
                value = self._value(stream.readline(), f"the row at byte {self._offsets[index]}")
                yield index, value and value[0]

    def _value(self, line: bytes, what: str) -> tuple[Any] | None:
        """What a line holds, in a tuple because it may be null; None for a blank line."""
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ProbeError(
                f"probe.files: {self.file} is not UTF-8 text ({what}); give a JSONL or Parquet file"
            ) from error
        if not text.strip():
            return None
        try:
            return (json.loads(text),)
        except ValueError as error:
            raise ProbeError(f"probe.files: {what} of {self.file} is not JSON ({error}); correct it") from error


class ParquetFile:
    """A Parquet file, decoded a batch at a time and only in the columns a row is made of."""

    def __init__(self, file: Path) -> None:
        self.file, self.sha256 = file, ""
        self._groups: list[int] = []  # rows of each row group

    def __len__(self) -> int:
        return sum(self._groups)

    def scan(self) -> Iterator[tuple[int, Any]]:
        """See ``Store``."""
        with self._open() as parquet:
            self.sha256 = file_sha256(self.file)
            groups = range(parquet.num_row_groups)
            self._groups = [parquet.metadata.row_group(group).num_rows for group in groups]
            names = parquet.schema_arrow.names
            if any(name in names for name in _COLUMNS):
                batches = (batch for group in groups for batch in _group_batches(parquet, group))
                yield from _uncertain(batches, names)
            elif len(self):
                yield 1, dict.fromkeys(names)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """See ``Store``; each row group that holds one of the rows is decoded once, the others not at all."""
        with self._open() as parquet:
            end = 0
            for group, rows in enumerate(self._groups):
                start, end = end, end + rows
                wanted = indices[bisect_left(indices, start) : bisect_left(indices, end)]
                if not wanted:
                    continue
                for batch in _group_batches(parquet, group):
                    here = [index - start for index in wanted if start <= index < start + batch.num_rows]
                    yield from zip((start + place for place in here), _values(batch, here), strict=True)
                    start += batch.num_rows
                    if start > wanted[-1]:
                        break

    @contextmanager
    def _open(self) -> Iterator[Any]:
        from pyarrow import parquet

        with _readable(self.file, "a Parquet"), parquet.ParquetFile(self.file, memory_map=True) as opened:
            yield opened


class SavedShard:
    """An Arrow file written by ``datasets``, memory-mapped; its own types are decoded by ``datasets`` itself."""

    def __init__(self, file: Path) -> None:
        self.file, self.sha256 = file, ""
        self._dataset: Any = None

    def __len__(self) -> int:
        return 0 if self._dataset is None else len(self._dataset)

    def scan(self) -> Iterator[tuple[int, Any]]:
        """See ``Store``."""
        try:
            import datasets
        except ImportError as error:
            raise ProbeError(
                f"probe.files: {self.file} needs datasets; run `pip install datasets` or give Parquet"
            ) from error
        with _readable(self.file, "an Arrow"):
            dataset = datasets.Dataset.from_file(str(self.file))
            self.sha256 = file_sha256(self.file)
            names = dataset.column_names
            columns = [name for name in _COLUMNS if name in names]
            self._dataset = dataset.select_columns(columns)
            if columns:
                batches = self._dataset.data.table.to_batches(max_chunksize=_BATCH)
                for number, _ in _uncertain(batches, columns):
                    yield number, dict.fromkeys(names) | self._dataset[number - 1]
            elif len(dataset):
                yield 1, dict.fromkeys(names)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """See ``Store``."""
        with _readable(self.file, "an Arrow"):
            for index in indices:
                yield index, self._dataset[index]


def _group_batches(parquet: Any, group: int) -> Iterator[pyarrow.RecordBatch]:
    columns = [name for name in _COLUMNS if name in parquet.schema_arrow.names]
    return parquet.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns)


def _uncertain(batches: Iterable[pyarrow.RecordBatch], names: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """The rows of a whole table that a look at the columns cannot prove usable, numbered from 1.

    Args:
        batches: the table, in the columns a row is made of.
        names: all its columns, so that an error can list what a row has.
    """
    start = 1
    for batch in batches:
        batch.validate(full=True)  # else a text that is not UTF-8 would only be found when it is converted
        places = unproven(batch)
        for place, value in zip(places, _values(batch, places), strict=True):
            yield start + place, dict.fromkeys(names) | value
        start += batch.num_rows


def _values(batch: pyarrow.RecordBatch, places: Sequence[int]) -> list[dict]:
    import pyarrow

    return batch.take(pyarrow.array(places, pyarrow.int64())).to_pylist() if places else []


@contextmanager
def _readable(file: Path, form: str) -> Iterator[None]:
    """Turn what a library says about a broken or missing file into one line that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProbeError(f"probe.files: {file} is not {form} file ({reason}); give another file") from error
