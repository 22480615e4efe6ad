"""Safetensors files that are written and read one tensor at a time, so that nobody has to hold a file in memory.

The library's own ``save_file`` takes all tensors of a file at once. Here the header comes first, from what is known of
the tensors, and each is then written to its place, in any order; the bytes are those of ``save_file``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

#: torch's types by their names in the format, in the order in which safetensors 0.8 lays out tensors: last ones first
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = list(_NAMES)
#: what ends the name of a file that is not complete; no reader of models takes it for weights
UNFINISHED = ".unfinished"


class TensorEntry(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return self.dtype.itemsize * self.elements


def entry_of(tensor: torch.Tensor) -> TensorEntry:
    """The entry of a tensor on any device."""
    return TensorEntry(tensor.dtype, tuple(tensor.shape))


class TensorFile:
    """A safetensors file that is being written; it has its name once the last tensor is in it.

    Args:
        file: in a folder that exists.
        entries: all tensors of the file, by name.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, file: Path, entries: Mapping[str, TensorEntry]) -> None:
        self._file, self._entries = file, dict(entries)
        self._unfinished = file.with_name(file.name + UNFINISHED)
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        self._place: dict[str, int] = {}
        end = 0
        for name in sorted(entries, key=lambda name: (-_ORDER.index(entries[name].dtype), name)):
            first, end = end, end + entries[name].bytes
            dtype, shape = entries[name]
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
            self._place[name] = first
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._stream = self._unfinished.open("wb", buffering=0)
        self._write(0, len(text).to_bytes(8, "little") + text)
        self._waiting = set(entries)
        if not entries:
            self._finish()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor on the CPU.

        Raises:
            OSError: it cannot be written.
            ValueError: it is not of the type and shape that were said.
        """
        if entry_of(tensor) != self._entries[name]:
            raise ValueError(f"{name}: {entry_of(tensor)} came where {self._entries[name]} was said")
        self._waiting.remove(name)
        if tensor.numel():
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._write(self._data + self._place[name], memoryview(data))
        if not self._waiting:
            self._finish()

    @property
    def is_complete(self) -> bool:
        """Whether every tensor is in it."""
        return not self._waiting

    def close(self) -> None:
        """Let go of the file; it keeps its unfinished name where a tensor is missing."""
        self._stream.close()

    def _write(self, place: int, data: bytes | memoryview) -> None:
        self._stream.seek(place)
        view = memoryview(data)
        while view:
            view = view[self._stream.write(view) :]

    def _finish(self) -> None:
        self._stream.close()
        self._unfinished.rename(self._file)


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a file; the memory it takes is given back with it.

    Raises:
        OSError, SafetensorError: the file cannot be read, or holds no such tensor.
    """
    # Opened for each: one mapping of the file would keep every page that was ever looked at.
    with safe_open(file, framework="pt", device="cpu") as opened:
        return opened.get_tensor(name)


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a file, from its header; raises as ``read_tensor``."""
    with safe_open(file, framework="pt", device="cpu") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
