"""Random access to Arrow tables: Parquet files, what ``datasets`` saved, and datasets of the hub."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.files import data_files, hub_split
from hybrid_lora_plugin.probing.data.json_files import open_json
from hybrid_lora_plugin.probing.data.layout import Layout
from hybrid_lora_plugin.probing.data.screen import unproven
from hybrid_lora_plugin.probing.data.store import Store, readable

if TYPE_CHECKING:
    import pyarrow

#: Rows decoded at a time: enough that the work per batch vanishes, few enough for rows of 100 kB.
_BATCH = 1024


def open_stores(entry: str, layout: Layout) -> list[tuple[str, Store]]:
    """The stores of one entry of ``probe.files``, each with the name it is recorded under."""
    split = hub_split(entry)
    if split is not None:
        return [(entry, HubSplit(entry, *split, layout))]
    return [(name, _open_store(file, layout)) for name, file in data_files(entry)]


def _open_store(file: Path, layout: Layout) -> Store:
    """The store for a file, by its suffix."""
    if file.suffix == ".parquet":
        return ParquetFile(file, layout)
    return SavedShard(file, layout) if file.suffix == ".arrow" else open_json(file)


class ParquetFile(Store):
    """A Parquet file, decoded a batch at a time and only in the columns a row is made of."""

    def __init__(self, file: Path, layout: Layout | None = None) -> None:
        super().__init__(file)
        self._layout = layout or Layout()
        self._groups: list[int] = []  # rows of each row group

    def __len__(self) -> int:
        return sum(self._groups)

    def scan(self) -> Iterator[tuple[int, tuple[Any] | None]]:
        """See ``Store``."""
        with self._open() as parquet:
            self.sha256 = self.digest_of_bytes()
            self._groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            self.columns = names = parquet.schema_arrow.names
            if not _may_be_rows(names, self._layout) and len(self):
                first = next(parquet.iter_batches(batch_size=1))
                yield 1, (first.to_pylist()[0],)
            batches = (batch for group, _ in enumerate(self._groups) for batch in self._batches(parquet, group))
            for number, value in _uncertain(batches, names, self._layout):
                self.done = int(self.size * number / max(1, len(self)))
                yield number, value

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """See ``Store``; each row group that holds one of the rows is decoded once, the others not at all."""
        with self._open() as parquet:
            end = 0
            for group, rows in enumerate(self._groups):
                start, end = end, end + rows
                wanted = indices[bisect_left(indices, start) : bisect_left(indices, end)]
                if not wanted:
                    continue
                for batch in self._batches(parquet, group):
                    here = [index - start for index in wanted if start <= index < start + batch.num_rows]
                    yield from zip((start + place for place in here), _values(batch, here), strict=True)
                    start += batch.num_rows
                    if start > wanted[-1]:
                        break

    def _batches(self, parquet: Any, group: int) -> Iterator[pyarrow.RecordBatch]:
        columns = self._layout.columns(parquet.schema_arrow.names)
        return parquet.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        from pyarrow import parquet

        with readable(self.file, "a Parquet"), parquet.ParquetFile(self.file, memory_map=True) as opened:
            yield opened


class SavedShard(Store):
    """An Arrow file written by ``datasets``, memory-mapped; its own types are decoded by ``datasets`` itself."""

    def __init__(self, file: Path, layout: Layout | None = None) -> None:
        super().__init__(file)
        self._layout = layout or Layout()
        self._dataset: Any = None

    def __len__(self) -> int:
        return 0 if self._dataset is None else len(self._dataset)

    def scan(self) -> Iterator[tuple[int, tuple[Any] | None]]:
        """See ``Store``."""
        datasets = _datasets(self.file)
        with readable(self.file, "an Arrow"):
            dataset = datasets.Dataset.from_file(str(self.file))
            self.sha256 = self.digest_of_bytes()
            yield from self._rows(dataset)

    def _rows(self, dataset: Any) -> Iterator[tuple[int, tuple[Any] | None]]:
        self.columns = names = dataset.column_names
        if not _may_be_rows(names, self._layout) and len(dataset):
            yield 1, (dataset[0],)
        self._dataset = dataset.select_columns(self._layout.columns(names))
        tables = self._dataset.with_format("arrow").iter(batch_size=_BATCH)
        batches = (batch for table in tables for batch in table.combine_chunks().to_batches())
        for number, value in _uncertain(batches, names, self._layout):
            self.done = int(self.size * number / max(1, len(self)))
            yield number, value and (dict.fromkeys(names) | without_nulls(self._dataset[number - 1]),)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """See ``Store``."""
        with readable(self.name, "an Arrow"):
            for index in indices:
                yield index, without_nulls(self._dataset[index])


class HubSplit(SavedShard):
    """A split of a dataset on the hub, loaded by ``datasets`` into its own cache.

    Attributes:
        sha256: of the rows, as Arrow writes them.
    """

    def __init__(
        self, entry: str, repository: str, configuration: str | None, revision: str | None, split: str, layout: Layout
    ) -> None:
        datasets = _datasets(entry)
        try:
            # `datasets` reads the split text itself, with parts such as `train[:500]` and `train[:10%]`.
            self._loaded = datasets.load_dataset(repository, configuration, revision=revision, split=split)
        except Exception as error:  # the libraries behind it raise whatever they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ProbeError(
                f"probe.files: {entry!r} cannot be loaded from the hub ({reason}); give NAME:SPLIT as on the dataset's "
                f"page, e.g. org/name:train[:500], NAME/CONFIGURATION:SPLIT where it has several, or local files"
            ) from error
        self.file, self.name, self._layout = Path(entry), entry, layout
        self.size, self.done, self.sha256, self.columns = self._loaded.num_rows, 0, "", []
        self._dataset = None

    def scan(self) -> Iterator[tuple[int, tuple[Any] | None]]:
        """See ``Store``."""
        with readable(self.name, "an Arrow"):
            yield from self._rows(self._loaded)
            digest = hashlib.sha256()
            for table in self._loaded.with_format("arrow").iter(batch_size=_BATCH):
                for batch in table.combine_chunks().to_batches():
                    digest.update(batch.serialize())
            self.sha256 = digest.hexdigest()


def _datasets(what: Path | str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ProbeError(f"probe.files: {what} needs datasets; run `pip install datasets` or give Parquet") from error
    return datasets


def _may_be_rows(names: Sequence[str], layout: Layout) -> bool:
    present = layout.columns(names)

    def there(name: str) -> bool:
        return name in present or name.partition(".")[0] in present

    return there(layout.messages) or (there(layout.prompts[0]) and there(layout.response))


def _uncertain(
    batches: Iterable[pyarrow.RecordBatch], names: Sequence[str], layout: Layout
) -> Iterator[tuple[int, tuple[Any] | None]]:
    """The rows of a whole table that a look at the columns cannot prove usable, numbered from 1; None after a batch.

    Args:
        batches: the table, in the columns a row is made of.
        names: all its columns, so that an error can list what a row has.
        layout: which columns make a row.
    """
    start = 1
    for batch in batches:
        batch.validate(full=True)  # else a text that is not UTF-8 would only be found when it is converted
        places = unproven(batch, layout)
        for place, value in zip(places, _values(batch, places), strict=True):
            yield start + place, (dict.fromkeys(names) | value,)
        start += batch.num_rows
        yield start - 1, None


def _values(batch: pyarrow.RecordBatch, places: Sequence[int]) -> list[dict]:
    import pyarrow

    if not places:
        return []
    return [without_nulls(value) for value in batch.take(pyarrow.array(places, pyarrow.int64())).to_pylist()]


def without_nulls(row: dict) -> dict:
    """A row of Arrow without the nulls inside its columns: Arrow gives each object the fields of all the others.

    A column keeps its null, and a list its nulls.
    """
    return {name: _pruned(value) for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pruned(inner) for name, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value
