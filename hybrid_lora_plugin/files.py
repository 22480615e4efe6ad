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
        if replace:
            put_in_place(unfinished, folder)
        else:
            os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Give a complete folder its name; an older one of that name gives way whole.

    No file system renames one folder over another. Between two renames the older one stands aside, and an interruption
    there leaves neither under the name: ``bring_back`` is for that.

    Raises:
        OSError: ``unfinished`` is not there, for one; an older folder then has its name again.
    """
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    try:
        os.rename(unfinished, folder)
    except OSError:
        bring_back(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def bring_back(folder: Path) -> bool:
    """Whether ``folder`` had been put aside by a process that ended before its successor was there; it is back then."""
    if folder.exists() or not _aside(folder).is_dir():
        return False
    os.rename(_aside(folder), folder)
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder, of which no part is left under its name at any moment; nothing where it is not there."""
    leaving = folder.parent / f".{folder.name}.removing"
    shutil.rmtree(leaving, ignore_errors=True)
    try:
        os.rename(folder, leaving)
    except FileNotFoundError:
        return
    shutil.rmtree(leaving, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.older"


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
