"""The tensors of a checkpoint folder, from the headers of its safetensors files; no weight is read.

A safetensors file is eight bytes with the length N of a header, N bytes of JSON, and the values:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

from hybrid_lora_plugin.errors import ConfigurationError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: what Git LFS leaves in the place of a file whose content was not fetched
POINTER = b"version https://git-lfs"
#: longest header that the format's own library reads, in bytes
_LONGEST_HEADER = 100_000_000


class StoredTensor(NamedTuple):
    """Where a tensor lies and what it is."""

    file: Path
    #: as safetensors names it, e.g. ``BF16``
    dtype: str
    shape: tuple[int, ...]
    #: of its bytes in the file
    begin: int
    end: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor that transformers finds in a folder, by its name there; empty without safetensors weights.

    Raises:
        ConfigurationError: a file is missing, cut off, a Git LFS pointer, or not what the index says.
    """
    index = folder / INDEX
    if _is_there(folder / SINGLE):
        # transformers takes this one, and vLLM those that the index names.
        if index.is_file() and set(_weight_map(index).values()) != {SINGLE}:
            refuse(
                f"{folder} has {SINGLE} and an index of other files, {INDEX}, and the trainer would read the one and "
                f"the rollout engine the other",
                "remove the older of them",
            )
        return _header(folder / SINGLE)
    if not index.is_file():
        return {}
    found: dict[str, StoredTensor] = {}
    weight_map = _weight_map(index)
    for shard in sorted(set(weight_map.values())):
        if not _is_there(folder / shard):
            refuse(f"{index} names {shard}, which is not there", "copy the checkpoint again, with all its shards")
        found |= {name: tensor for name, tensor in _header(folder / shard).items() if weight_map.get(name) == shard}
    if absent := sorted(weight_map.keys() - found.keys()):
        refuse(
            f"{index} puts {absent[0]} into {weight_map[absent[0]]}, which does not hold it ({len(absent)} such names)",
            "copy the checkpoint again",
        )
    return found


def refuse(what: str, way_out: str) -> None:
    """Raise the error for a folder whose weights cannot be read."""
    raise ConfigurationError(f"model: {what}; {way_out}", see="checkpoint-without-weights")


def refuse_pointer(file: Path) -> None:
    """Raise ``ConfigurationError`` if Git LFS has left a pointer in the place of a file."""
    with file.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            refuse(f"{file} is a Git LFS pointer without the content", "fetch it with git lfs pull")


def _is_there(file: Path) -> bool:
    if file.is_symlink() and not file.exists():
        refuse(f"{file} is a link to {file.readlink()}, which is not there", "copy the checkpoint with its files")
    return file.is_file()


def _weight_map(index: Path) -> dict[str, str]:
    refuse_pointer(index)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # Files beside it, and names that fit into a line.
        if weight_map and all(Path(shard).name == shard for shard in weight_map.values()):
            if all(name.isprintable() and shard.isprintable() for name, shard in weight_map.items()):
                return weight_map
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    refuse(f"{index} is no index of weights", "copy the checkpoint again")


def _header(file: Path) -> dict[str, StoredTensor]:
    refuse_pointer(file)
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"its header should have {length:,} bytes")
            start = 8 + length
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                file, str(one["dtype"]), tuple(map(int, one["shape"])), *(start + int(at) for at in one["data_offsets"])
            )
            for name, one in header.items()
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        refuse(f"{file} is no safetensors file ({size:,} bytes; {error})", "copy the checkpoint again")
    end = max((tensor.end for tensor in tensors.values()), default=start)
    if end != size:
        refuse(f"{file} has {size:,} bytes where its header describes {end:,}", "copy the checkpoint again")
    return tensors
