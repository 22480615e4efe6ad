"""The difference of two tensors of one type as bytes that compress well, from which the bits of one come back.

Numbers of one sign follow each other as their bit patterns do, so weights that training has moved a little have
patterns that differ by little. The differences, with their sign in the lowest bit, are small whole numbers: of their
bytes the upper ones are nearly all zero, and these lie together and are packed by zlib. Nothing is rounded.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

#: whole numbers as wide as a number of that many bytes
_WIDTH = {2: torch.int16, 4: torch.int32}
#: zlib's fastest: what is zero packs as well, and the lowest byte hardly at all
_LEVEL = 1


def pack(values: torch.Tensor, reference: torch.Tensor) -> bytes:
    """What takes ``reference`` to ``values``.

    Args:
        values, reference: of one shape and one type of 16 or 32 bits, on the CPU.
    """
    width = _WIDTH[values.dtype.itemsize]
    bits = width.itemsize * 8
    # Both wrap around at the ends of the type.
    difference = values.contiguous().view(width).reshape(-1) - reference.contiguous().view(width).reshape(-1)
    folded = (difference << 1) ^ (difference >> (bits - 1))
    planes = folded.numpy().view(np.uint8).reshape(-1, width.itemsize)
    return b"".join(_packed(np.ascontiguousarray(planes[:, plane])) for plane in range(width.itemsize))


def _packed(plane: np.ndarray) -> bytes:
    data = zlib.compress(plane, _LEVEL)
    return len(data).to_bytes(8, "little") + data


def unpack(data: bytes, reference: torch.Tensor) -> torch.Tensor:
    """The values of which ``data`` is the difference to ``reference``, in its type and shape, bit for bit.

    Raises:
        ValueError: it is none, or that of a tensor of another size.
    """
    width = _WIDTH[reference.dtype.itemsize]
    planes = np.empty((reference.numel(), width.itemsize), dtype=np.uint8)
    rest = memoryview(data)
    for plane in range(width.itemsize):
        length = int.from_bytes(rest[:8], "little")
        planes[:, plane] = _unpacked(rest[8 : 8 + length], reference.numel())
        rest = rest[8 + length :]
    if rest:
        raise ValueError(f"{len(rest)} bytes too many")
    folded = torch.from_numpy(planes.reshape(-1).view(np.dtype(f"i{width.itemsize}")))
    # The shift must not bring the sign along.
    upper = (folded >> 1) & torch.iinfo(width).max
    difference = upper ^ -(folded & 1)
    bits = reference.contiguous().view(width).reshape(-1) + difference
    return bits.view(reference.dtype).view(reference.shape)


def _unpacked(data: memoryview, size: int) -> np.ndarray:
    unpacking = zlib.decompressobj()
    try:
        # No more than it should be, whatever the file makes of it.
        plane = unpacking.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(plane) != size or not unpacking.eof or unpacking.unused_data:
        raise ValueError(f"{len(plane)} bytes where {size} belong")
    return np.frombuffer(plane, dtype=np.uint8)
