"""Rows of files, folders and the hub, one at a time and from any row on."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError, ProbeError, reason_of
from hybrid_lora_plugin.files import file_sha256
from hybrid_lora_plugin.probing.data.files import data_files, hub_split
from hybrid_lora_plugin.probing.data.json_files import open_json
from hybrid_lora_plugin.probing.data.store import readable

#: Rows decoded at a time: of Mixture-of-Thoughts about 15 MB.
_BATCH = 256


class Rows(ABC):
    """The rows of what one option names.

    Attributes:
        share: how much has been read, from 0 to 1; None where that is not known.
    """

    share: float | None = None

    @abstractmethod
    def origin(self) -> list[dict]:
        """What the rows are, so that the same can be told from others: name and SHA-256 of each file, or a commit."""

    @abstractmethod
    def read(self, start: int = 0) -> Iterator[tuple[str, Any]]:
        """Rows from number ``start`` (from 0) on, each with how to name it in an error.

        Raises:
            ConfigurationError: a file cannot be read, or has something else than rows in it.
        """


def open_rows(entry: str, option: str) -> Rows:
    """The rows of a file, a pattern, a folder, or ``org/name[/configuration][@revision]:split`` on the hub.

    Args:
        entry: as ``probing.data.files.data_files``, and ``.csv``.
        option: where the user gave it, for errors.

    Raises:
        ConfigurationError: nothing there, or no access to the hub.
    """
    split = hub_split(entry)
    if split is not None:
        return HubRows(*split, option=option)
    path = Path(entry).expanduser()
    if path.suffix == ".csv" and path.is_file():
        return FileRows([(path.name, path)], option)
    with said_of(option):
        return FileRows(data_files(entry), option)


class FileRows(Rows):
    """Files on this machine: Parquet, JSON in all its forms, CSV, and what ``datasets`` saved."""

    def __init__(self, files: list[tuple[str, Path]], option: str) -> None:
        self._files, self._option, self.share = files, option, 0.0
        self._total = max(1, sum(file.stat().st_size for _, file in files))

    def origin(self) -> list[dict]:
        """See ``Rows``."""
        return [{"name": name, "sha256": file_sha256(file)} for name, file in self._files]

    def read(self, start: int = 0) -> Iterator[tuple[str, Any]]:
        """See ``Rows``; of Parquet whole files and row groups before ``start`` are not decoded."""
        before = 0
        with said_of(self._option):
            for _, file in self._files:
                size, read, rows = file.stat().st_size, _READERS.get(file.suffix, _json), 0
                for number, done, row in read(file, start):
                    rows = number + 1
                    self.share = (before + size * done) / self._total
                    if number >= start:
                        yield f"row {rows} of {file}", row
                start, before = max(0, start - rows), before + size
        self.share = 1.0


class HubRows(Rows):
    """A split of a data set on the hub, streamed: nothing but the part that is read is downloaded."""

    def __init__(self, repository: str, configuration: str | None, revision: str | None, split: str, *, option: str):
        from huggingface_hub import HfApi

        self._repository, self._configuration, self._split, self._option = repository, configuration, split, option
        with self._reachable():
            # The commit, so that what is read after an interruption is what was read before it.
            self._commit = HfApi().dataset_info(repository, revision=revision).sha

    def origin(self) -> list[dict]:
        """See ``Rows``."""
        parts = [self._repository, *([self._configuration] if self._configuration else [])]
        return [{"name": f"{'/'.join(parts)}:{self._split}", "commit": self._commit}]

    def read(self, start: int = 0) -> Iterator[tuple[str, Any]]:
        """See ``Rows``."""
        import datasets

        with self._reachable():
            rows = datasets.load_dataset(
                self._repository, self._configuration, revision=self._commit, split=self._split, streaming=True
            )
            splits = getattr(rows.info, "splits", None) or {}
            total = getattr(splits.get(self._split), "num_examples", None)
            for number, row in enumerate(rows.skip(start) if start else rows, start):
                self.share = (number + 1) / total if total else None
                yield f"row {number + 1} of {self._repository}", row

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (ConfigurationError, GeneratorExit):
            raise
        except Exception as error:  # the libraries behind it raise whatever they like
            gated = "gated" in str(error).lower() or "gated" in type(error).__name__.lower()
            way_out = (
                "accept its conditions on its page and run `hf auth login`, or give a file of it"
                if gated
                else "check the network and the name, or give a file or folder on this machine"
            )
            raise ConfigurationError(
                f"{self._option}: {self._repository} cannot be read from the hub ({reason_of(error)}); {way_out}"
            ) from error


@contextmanager
def said_of(option: str) -> Iterator[None]:
    """Let what the probe's readers say of ``probe.files`` be said of the option that named the file here."""
    try:
        yield
    except ProbeError as error:
        raise ConfigurationError(str(error).replace("probe.files", option)) from error


def _parquet(file: Path, start: int) -> Iterator[tuple[int, float, Any]]:
    """Number, share of the file and row; of those before ``start`` only the last of each row group, without a row."""
    from pyarrow import parquet

    with readable(file, "a Parquet"), parquet.ParquetFile(file, memory_map=True) as opened:
        total, end = max(1, opened.metadata.num_rows), 0
        for group in range(opened.num_row_groups):
            first, end = end, end + opened.metadata.row_group(group).num_rows
            if first < end <= start:
                yield end - 1, end / total, None
                continue
            for batch in opened.iter_batches(batch_size=_BATCH, row_groups=[group]):
                if first + batch.num_rows > start:
                    here = max(0, start - first)
                    for number, row in enumerate(batch.slice(here).to_pylist(), first + here):
                        yield number, (number + 1) / total, row
                first += batch.num_rows


def _json(file: Path, start: int) -> Iterator[tuple[int, float, Any]]:
    store, number = open_json(file), -1
    for _, value in store.scan():
        if value is not None:
            number += 1
            yield number, store.done / max(1, store.size), value[0]


def _arrow(file: Path, start: int) -> Iterator[tuple[int, float, Any]]:
    import datasets

    with readable(file, "an Arrow"):
        rows = datasets.Dataset.from_file(str(file))
        if start >= len(rows) > 0:
            yield len(rows) - 1, 1.0, None
        for number in range(start, len(rows)):
            yield number, (number + 1) / len(rows), rows[number]


def _csv(file: Path, start: int) -> Iterator[tuple[int, float, Any]]:
    size = max(1, file.stat().st_size)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream, strict=True)):
                yield number, min(1.0, stream.buffer.tell() / size), row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ProbeError(f"probe.files: {file} is not a CSV file ({reason_of(error)}); give another file") from error


_READERS = {".parquet": _parquet, ".arrow": _arrow, ".csv": _csv}
