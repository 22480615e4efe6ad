"""Random signs that need no memory: an integer hash of (seed, parameter, index in the whole tensor).

Whoever holds a part of a tensor makes the signs of that part, whatever its place in a sharding and on any device: all
arithmetic is on whole numbers below 2**63, so that nothing is rounded and nothing overflows.
"""

from __future__ import annotations

import hashlib

import torch

#: signs from one hash
_A_WORD = 16
_LOW = 0xFFFFFFFF
# Of "lowbias32" (C. Wellons, hash-prospector). The second is taken modulo 2**32: with a number below 2**32 its product
# then stays within 63 bits, and has the same lower 32 bits.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


def signs(seed: int, name: str, first: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A stretch of the direction of one parameter.

    Args:
        seed: of the direction.
        name: plain name of the parameter.
        first: index of the first element in the whole tensor, row by row.
        count: n, elements; their memory is several times that of the result, so ask for a part at a time.
        device: of the result.

    Returns:
        ``[n]`` float32, +1 and −1.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    keys = [int.from_bytes(digest[at : at + 4], "big") for at in (0, 4)]
    begin, end = first // _A_WORD, -(-(first + count) // _A_WORD)
    words = torch.arange(begin, end, dtype=torch.int64, device=device)
    # The index may pass 32 bits; the upper ones come in with the second key.
    upper = words >> 32
    words = _mixed(_mixed((words & _LOW) ^ keys[0]) ^ upper ^ keys[1])
    # The upper half of a hash, which fits into 32 bits with a sign.
    bits = (words >> 16).to(torch.int32).unsqueeze(1)
    bits = (bits >> torch.arange(_A_WORD, dtype=torch.int32, device=device)) & 1
    start = first - begin * _A_WORD
    return bits.flatten()[start : start + count].float().mul_(-2).add_(1)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """A permutation of the whole numbers below 2**32, int64 each, in which every input bit reaches every output bit."""
    words = words ^ (words >> 16)
    words = (words * _FIRST) & _LOW
    words = words ^ (words >> 15)
    words = (words * _SECOND) & _LOW
    return words ^ (words >> 16)
