"""Which data files an entry of ``probe.files`` stands for: itself, or those of a saved dataset or a plain folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.errors import ProbeError

_FILES = (".jsonl", ".json", ".parquet")
# Not .json: in a folder that is metadata more often than rows.
_FILES_IN_FOLDERS = (".jsonl", ".parquet")
# How the hub names the split of a file: `train-00000-of-00010.parquet`, `train.jsonl`, `train/0000.parquet`.
_SPLIT = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}|(train|test|validation|valid|val|dev|eval)(?=[-.]|$)")


def data_files(entry: str) -> list[tuple[str, Path]]:
    """The data files of one entry, in the order in which their rows count.

    Args:
        entry: a ``.jsonl``, ``.json`` or ``.parquet`` file; a folder saved by ``Dataset.save_to_disk`` or
            ``DatasetDict.save_to_disk`` (its ``train`` split, or the only one); or a folder with ``.jsonl`` and
            ``.parquet`` files at any depth (those of the split ``train`` if file names tell splits).

    Returns:
        For each file its name relative to the entry's folder, which does not depend on where the data lie, and
        its path.

    Raises:
        ProbeError: nothing there, nothing usable in it, or more than one split or configuration to choose from.
    """
    path = Path(entry)
    if path.is_dir():
        return _saved_files(path) or _plain_files(path)
    if not path.is_file():
        raise ProbeError(f"probe.files: {entry!r} is not a file or folder; give a JSONL or Parquet file or a folder")
    if path.suffix not in _FILES:
        raise ProbeError(f"probe.files: {entry} ends in {path.suffix!r}; give a .jsonl or .parquet file")
    return [(path.name, path)]


def _saved_files(folder: Path) -> list[tuple[str, Path]]:
    """Files of a folder that ``datasets`` saved, else none."""
    saved = folder
    if (folder / "dataset_dict.json").is_file():
        splits = _metadata(folder / "dataset_dict.json", "splits")
        if "train" not in splits and len(splits) != 1:
            raise ProbeError(
                f"probe.files: {folder} has no split `train` but {_listed(splits)}; give the folder of one of them"
            )
        saved = folder / ("train" if "train" in splits else splits[0])
        if not (saved / "state.json").is_file():
            raise ProbeError(f"probe.files: {saved} has no state.json; save the dataset again with `save_to_disk`")
    elif not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return []
    files = [saved / shard["filename"] for shard in _metadata(saved / "state.json", "_data_files")]
    return [(file.relative_to(folder).as_posix(), file) for file in files]


def _metadata(file: Path, key: str) -> list:
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))[key])
    except (ValueError, KeyError, TypeError) as error:
        raise ProbeError(
            f"probe.files: {file} is not what `datasets` writes (no list {key!r}); save the dataset again"
        ) from error


def _plain_files(folder: Path) -> list[tuple[str, Path]]:
    if (folder / "snapshots").is_dir() and (folder / "blobs").is_dir():
        raise ProbeError(
            f"probe.files: {folder} is a hub cache with any number of revisions; give one of its snapshots"
        )
    present = sorted(_walk(folder))
    names = [name for name in present if Path(name).suffix in _FILES_IN_FOLDERS]
    if not names:
        suffixes = sorted({Path(name).suffix or Path(name).name for name in present})
        raise ProbeError(
            f"probe.files: {folder} has no .jsonl or .parquet file (found: {_listed(suffixes)}); give a folder with "
            f"some"
        )
    _refuse_several_configurations(folder, names)
    splits = {name: _split(name) for name in names}
    known = sorted({split for split in splits.values() if split})
    if "train" in known:
        names = [name for name in names if splits[name] == "train"]
    elif len(known) > 1:
        raise ProbeError(
            f"probe.files: {folder} has no files of split `train` but of {_listed(known)}; give the files of one of "
            f"them"
        )
    return [(name, folder / name) for name in names]


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _split(name: str) -> str | None:
    for part in reversed(Path(name).parts):
        if match := _SPLIT.match(part):
            return match[1] or match[2]
    return None


def _refuse_several_configurations(folder: Path, names: Sequence[str]) -> None:
    """Refuse a dataset whose card declares several configurations with files here.

    They often hold the same rows (`all` beside `math` and `code`), and a row that is there twice could be both
    trained on and held out.
    """
    found = [
        str(configuration.get("config_name"))
        for configuration in _configurations(folder / "README.md")
        if any(fnmatch(name, pattern) for pattern in _patterns(configuration) for name in names)
    ]
    if len(found) > 1:
        raise ProbeError(
            f"probe.files: {folder} has the configurations {_listed(found)}, which may share rows; give the folder or "
            f"the files of one of them"
        )


def _configurations(card: Path) -> list[dict]:
    if not card.is_file():
        return []
    import yaml

    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        header = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return []  # a card is prose for people: a broken one is no reason to refuse the rows
    configurations = header.get("configs") if isinstance(header, dict) else None
    return [value for value in configurations if isinstance(value, dict)] if isinstance(configurations, list) else []


def _patterns(configuration: dict) -> list[str]:
    folder = configuration.get("data_dir")
    return _texts(configuration.get("data_files")) or ([f"{folder}/*"] if folder else [])


def _texts(value: Any) -> list[str]:
    """Every pattern in the forms a card allows: a text, a list of them, or of ``{split, path}``."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _texts(value.get("path"))
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "nothing"
