"""Digests of tensors: equal values in equal types give equal text, any changed bit another one.

On the host XXH3 with 128 bits reads memory about as fast as it can be read. On an accelerator the bytes stay where
they are: a keyed sum modulo 2**64 in plain torch operations. It is linear, so it is keyed: every position has its own
odd 64-bit factor, a single changed word always changes the sum, and changes of several words cancel with
probability about 2**-32 (an unkeyed sum misses every pair of opposite changes). Neither withstands someone who forges
tensors on purpose; they are for faults.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import xxhash

#: bytes up to which a tensor is hashed at once: just made, it lies in the caches, and that is faster than another
#: thread
_SMALL = 8 << 20
#: 32-bit words that are summed at once, with one factor each; larger tensors reuse the factors under another multiplier
_WORDS = 1 << 20
_MASK = (1 << 64) - 1


def digest_of(tensor: torch.Tensor) -> str:
    """A digest of the bytes of ``tensor`` in row-major order; it does not cover shape and dtype.

    Args:
        tensor: any dtype and device; a non-contiguous one is copied first.

    Returns:
        ``xxh3:`` or ``keyed:`` and hexadecimal digits. Only digests of one kind can be compared, and two tensors on
        devices of the same kind always give one kind.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.device.type == "cpu":
        return "xxh3:" + xxhash.xxh3_128_hexdigest(data.numpy())
    return "keyed:" + keyed_sum(data)


def digest_soon(tensor: torch.Tensor, digest: Callable[[torch.Tensor], str] = digest_of) -> Callable[[], str]:
    """Begin ``digest`` and return a function that waits for it.

    On the host other threads hash a large tensor, without Python's lock, while this one goes on; the bytes must stay
    until then.
    """
    if tensor.device.type == "cpu" and tensor.nbytes > _SMALL:
        return _hasher().submit(_digest_and_drop, digest, [tensor]).result
    found = digest(tensor)
    return lambda: found


def _digest_and_drop(digest: Callable[[torch.Tensor], str], box: list[torch.Tensor]) -> str:
    """When the digest is known, nothing here holds the tensor any more."""
    tensor = box.pop()
    found = digest(tensor)
    del tensor
    return found


@functools.cache
def _hasher() -> ThreadPoolExecutor:
    threads = min(4, len(os.sched_getaffinity(0)))
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="hybrid-lora-digest")


def keyed_sum(data: torch.Tensor) -> str:
    """The accelerator's digest, on any device.

    Args:
        data: [n] uint8.

    Returns:
        16 hexadecimal digits.
    """
    words = data.numel() // 4
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    factors = _factors(data.device)
    body = data[: words * 4]
    if body.storage_offset() % 4:
        body = body.clone()
    body = body.view(torch.int32)
    for index, start in enumerate(range(0, words, _WORDS)):
        chunk = body[start : start + _WORDS]
        # int64 products and sums wrap around modulo 2**64 on every device.
        total += (chunk.to(torch.int64) * factors[: chunk.numel()]).sum() * _signed(_mixed(index) | 1)
    value = total.item() & _MASK
    for position, byte in enumerate(data[words * 4 :].tolist()):
        value += byte * (_mixed(-1 - position) | 1)
    # The length apart from the sum: zeros add nothing.
    return f"{_mixed(_mixed(value) ^ data.numel()):016x}"


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    """[_WORDS] odd int64 factors, the same on every device."""
    generator = torch.Generator().manual_seed(0x5EED)
    drawn = torch.randint(-(2**63), 2**63 - 1, (_WORDS,), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(device)


def _mixed(value: int) -> int:
    """A bijection of 64-bit integers that spreads small ones (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
