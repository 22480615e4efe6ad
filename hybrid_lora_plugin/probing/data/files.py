"""Which data files an entry of ``probe.files`` stands for: itself, or those of a pattern, a saved dataset, a folder."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.errors import ProbeError

_COMPRESSED = (".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
_FILES = (".jsonl", ".json", ".parquet", *_COMPRESSED)
# Not .json: in a folder that is metadata more often than rows.
_FILES_IN_FOLDERS = (".jsonl", ".parquet", ".jsonl.gz", ".jsonl.zst")
# `org/name:train[:500]`, `org/name/configuration@revision:train+test`
_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?(?:@(\w[\w./-]*))?:(\w[\w.\[\]:%+-]*)")
# How the hub names the split of a file: `train-00000-of-00010.parquet`, `train.jsonl`, `train/0000.parquet`.
_SPLIT = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}|(train|test|validation|valid|val|dev|eval)(?=[-.]|$)")


def data_files(entry: str) -> list[tuple[str, Path]]:
    """The data files of one entry, in the order in which their rows count.

    Args:
        entry: a JSON or Parquet file, JSON also as ``.gz`` or ``.zst``; a pattern of such files (``part-*.jsonl``,
            ``**`` for any depth); a folder saved by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` (its
            ``train`` split, or the only one); or a folder with files at any depth (those of the split ``train`` if
            file names tell splits).

    Returns:
        For each file its name relative to the entry's folder, which does not depend on where the data lie, and
        its path.

    Raises:
        ProbeError: nothing there, nothing usable in it, or more than one split or configuration to choose from.
    """
    path = Path(entry).expanduser()
    if path.is_dir():
        files = _saved_files(path) or _plain_files(path)
    elif not os.path.lexists(path) and glob.has_magic(entry):
        files = _matching_files(entry, path)
    else:
        files = [(path.name, path)]
    for _, file in files:
        _check_file(entry, file)
    return files


def hub_split(entry: str) -> tuple[str, str | None, str | None, str] | None:
    """Repository, configuration, revision and split of an entry that names a dataset on the hub; None for any other.

    Args:
        entry: ``org/name[/configuration][@revision]:split``; a file or folder of that name comes first.
    """
    match = _HUB.fullmatch(entry)
    return None if match is None or os.path.lexists(Path(entry)) else (match[1], match[2], match[3], match[4])


def is_there(entry: str) -> bool:
    """Whether an entry names something on this machine, or a dataset of the hub, which only loading can tell."""
    path = Path(entry).expanduser()
    return hub_split(entry) is not None or path.exists() or bool(glob.glob(str(path), recursive=True))


def absolute(entry: str) -> str:
    """An entry that means the same in another working folder."""
    return entry if hub_split(entry) is not None else os.path.abspath(os.path.expanduser(entry))


def _matching_files(entry: str, pattern: Path) -> list[tuple[str, Path]]:
    # The folder before the first part with a wildcard: names are relative to it.
    fixed = list(pattern.parts[:-1])
    while any(glob.has_magic(part) for part in fixed):
        fixed.pop()
    root = Path(*fixed)
    files = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if not os.path.isdir(name))
    if not files:
        raise ProbeError(f"probe.files: {entry!r} matches no file; give a pattern of files, e.g. data/*.jsonl")
    return [(file.relative_to(root).as_posix() if fixed else file.as_posix(), file) for file in files]


def _check_file(entry: str, file: Path) -> None:
    """Refuse what is no file with rows, before a library says so in words of its own."""
    if not file.is_file():
        if file.is_symlink():
            target = os.readlink(file)
            raise ProbeError(
                f"probe.files: {file} is a link to {target}, which is not there; fetch the file or give another"
            )
        if str(file) != str(Path(entry).expanduser()):
            raise ProbeError(f"probe.files: {file} is part of {entry} and is not there; save the dataset again")
        hub = "; a dataset of the hub needs its split, as in org/name:train" if entry.count("/") == 1 else ""
        raise ProbeError(
            f"probe.files: {entry!r} is not a file or folder; give a JSONL or Parquet file or a folder{hub}"
        )
    if not file.name.endswith((*_FILES, ".arrow")) or (file.suffix == ".arrow" and str(file) == entry):
        raise ProbeError(
            f"probe.files: {file} ends in {_suffix(file)!r}; give a .jsonl or .parquet file (JSON also as .gz or .zst)"
        )
    try:
        with file.open("rb") as stream:
            head = stream.read(200)
    except OSError as error:
        raise ProbeError(f"probe.files: {file} cannot be read ({error.strerror}); give a readable file") from error
    if not head and file.suffix in (".parquet", ".arrow"):
        raise ProbeError(f"probe.files: {file} is empty (0 bytes); write it again or fetch it again")
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", head)
        raise ProbeError(
            f"probe.files: {file} is a Git LFS pointer{f' to {int(size[1]):,} bytes' if size else ''} and not the "
            f"file; run `git lfs pull` where it was cloned, or download the file"
        )


def _suffix(file: Path) -> str:
    return "".join(file.suffixes[-2:]) if file.suffix in (".gz", ".zst") else file.suffix


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
    names = [name for name in present if name.endswith(_FILES_IN_FOLDERS)]
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
