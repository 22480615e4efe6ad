"""One data file of any format: one pass over all of it, then the rows asked for. Nothing else stays in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.files import file_sha256


class Store(ABC):
    """A data file.

    Attributes:
        file: its path.
        name: how to name it in messages.
        size: its bytes.
        done: about how many of them the scan has passed.
        sha256: of its bytes; known after ``scan``.
        columns: names of all its columns; known after ``scan``.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.name = file, str(file)
        self.size, self.done = file.stat().st_size, 0
        self.sha256, self.columns = "", []

    @abstractmethod
    def __len__(self) -> int:
        """Rows; known after ``scan``."""

    @abstractmethod
    def scan(self) -> Iterator[tuple[int, tuple[Any] | None]]:
        """Pass over the file once, and give the rows that are not certain to be usable, numbered from 1.

        Each is in a tuple, as a row may be null. None says how many rows were passed without one to look at.

        Raises:
            ProbeError: the file cannot be read.
        """

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Rows by index from 0, which must ascend."""

    def digest_of_bytes(self) -> str:
        """SHA-256 of the file as it lies on disk."""
        return file_sha256(self.file)


@contextmanager
def readable(file: Path | str, form: str) -> Iterator[None]:
    """Turn what a library says about a broken or missing file into one line that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProbeError(f"probe.files: {file} is not {form} file ({reason}); give another file") from error
