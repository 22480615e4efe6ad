"""Figures of a benchmark as files, and between the markers of a page of ``docs``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def written_into(page: str, text: str, begin: str, end: str) -> str:
    """``page`` with ``text`` between its markers; ValueError where it has not exactly one of each."""
    head, rest = page.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{text}\n\n{end}{tail}"


def write_page(page: Path, text: str, begin: str, end: str) -> None:
    """Replace what stands between the markers of a page."""
    page.write_text(written_into(page.read_text(encoding="utf-8"), text, begin, end), encoding="utf-8")


def save_figures(folder: Path, name: str, result: Any) -> None:
    """All figures as ``FOLDER/NAME.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
