"""A keyed sum over the 16-bit elements of a weight, which can be taken in parts and kept up to date.

With one odd 64-bit factor for each row and one for each column, the sum of ``row · column · bits`` modulo 2**64 over
the elements of a weight is the sum of what its shards come to, whichever way it is sharded, and when elements change,
the difference of their own terms is all that has to be added. A change of one element always changes it, changes of
several cancel with a probability of about 2**-48. Like the other digests it is for faults, not against forgery.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

#: elements that are summed at once
_CHUNK = 1 << 20
#: fewest factors that are made, so that one table serves nearly every weight
_LEAST = 1 << 16
_ROW, _COLUMN = 0x0D15EA5E, 0xC0FFEE11


def sum_of(bits: torch.Tensor, corner: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """The sum over a block of a weight.

    Args:
        bits: [n, k] int16, any strides.
        corner: row and column of the whole weight at which the block begins.

    Returns:
        A scalar int64 on the device of ``bits``.
    """
    rows = _factors(_ROW, corner[0] + bits.shape[0], bits.device)[corner[0] : corner[0] + bits.shape[0]]
    columns = _factors(_COLUMN, corner[1] + bits.shape[1], bits.device)[corner[1] : corner[1] + bits.shape[1]]
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    step = max(1, _CHUNK // max(1, bits.shape[1]))
    for first in range(0, bits.shape[0], step):
        # int64 products and sums wrap around modulo 2**64 on every device.
        terms = bits[first : first + step].to(torch.int64).mul_(columns)
        total += terms.sum(1).mul_(rows[first : first + step]).sum()
    return total


def sum_at(rows: torch.Tensor, columns: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The sum over some elements of a weight.

    Args:
        rows, columns: [n] int64, where they are in the whole weight.
        bits: [n] int16 or int64, their values or by how much these changed.

    Returns:
        A scalar int64.
    """
    if not rows.numel():
        return torch.zeros((), dtype=torch.int64, device=bits.device)
    of_row = _factors(_ROW, int(rows.max()) + 1, bits.device)[rows]
    of_column = _factors(_COLUMN, int(columns.max()) + 1, bits.device)[columns]
    return of_row.mul_(of_column).mul_(bits.to(torch.int64)).sum()


def wrapped(value: int) -> int:
    """``value`` modulo 2**64 as a signed number, which is how an int64 holds it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _factors(kind: int, count: int, device: torch.device) -> torch.Tensor:
    """At least ``count`` odd int64 factors, the same on every device and however many are asked for."""
    return _table(kind, max(_LEAST, 1 << (count - 1).bit_length()), device)


@functools.cache
def _table(kind: int, count: int, device: torch.device) -> torch.Tensor:
    # SplitMix64; unsigned 64-bit integers wrap around
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(kind)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return torch.from_numpy((state | np.uint64(1)).view(np.int64)).to(device)
