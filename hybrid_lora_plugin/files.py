"""Folders that appear only when they are complete, files that are replaced whole, and digests of files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the name ``folder`` when the body has ended without an error.

    It is written beside its place under a hidden name, ``.<name>.writing``. What an interrupted process left there is
    removed by the next one.

    Args:
        folder: where the result goes; it must not exist or be an empty folder, unless ``replace``.
        replace: whether an older folder of that name gives way, once the new one is complete.

    Raises:
        OSError: something cannot be written, or ``folder`` holds something.
    """
    unfinished = folder.parent / f".{folder.name}.writing"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if replace and folder.exists():
            shutil.rmtree(folder)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def complete_file(file: Path) -> Iterator[Path]:
    """A file to write, which replaces ``file`` when the body has ended without an error."""
    unfinished = file.with_name(file.name + ".tmp")
    yield unfinished
    os.replace(unfinished, file)


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
