"""Comparing folders that must hold the same files."""

from __future__ import annotations

from pathlib import Path


def assert_same_files(folder: Path, other: Path) -> None:
    """Same names, same bytes."""
    assert sorted(f.name for f in folder.iterdir()) == sorted(f.name for f in other.iterdir())
    different = [f.name for f in folder.iterdir() if f.read_bytes() != (other / f.name).read_bytes()]
    assert different == []
