"""The one formula that turns a base weight and its LoRA factors into a plain weight.

Trainer, export and rollout must agree bit for bit, so nobody writes this product a second time. It is evaluated
in fp32 from the untouched base and rounded once: merging and unmerging in place drifts, and ``(sB)@A`` or
``addmm(alpha=s)`` round differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hybrid_lora_plugin.training.arrival import Arrival
from hybrid_lora_plugin.training.rounding import NEAREST, Rounding, require_numbers, round_weight

#: rows and columns of a product that is computed at once; a part of a weight needs the blocks that it touches
BLOCK, ACCELERATOR_BLOCK = (256, 1024), (1024, 2048)


@contextmanager
def _exact_fp32(device: torch.device) -> Iterator[None]:
    """fp32 products at full precision: no TF32, which another library may have switched on, and no autocast."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Somebody uses torch's newer setting, and then the older one may not even be read.
        with _ieee_products(), torch.autocast(device.type, enabled=False):
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _ieee_products() -> Iterator[None]:
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@torch.no_grad()
def merge_weight(
    base: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    rounding: Rounding = NEAREST,
    name: str = "",
    arrival: Arrival | None = None,
    corner: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """``W0 + s·(B A)`` in fp32, rounded once to ``dtype``; of a part of a weight, the bits that the whole has there.

    Rounded stochastically, W0 is brought to ``dtype`` first, to nearest as a rollout engine loads it: a weight without
    an update is then the engine's own. (It is the same for a checkpoint in ``dtype``.)

    Args:
        base: [d_out, d_in] original weight or [n, k] a part of it, any floating dtype; not changed.
        lora_a: [r, d_in] factor A.
        lora_b: [d_out, r] factor B.
        scaling: s = alpha / rank.
        dtype: of the result.
        rounding: to ``dtype``.
        name: plain name of the weight, for the rounding's thresholds and for messages.
        arrival: counts how much of the update is in the result, from some rows of it.
        corner: row and column of the whole weight with which ``base`` begins.

    Raises:
        WeightSyncError: a weight is too large for float16, or no number.
    """
    if dtype == torch.bfloat16 and not rounding.is_stochastic(dtype):
        # Otherwise the rounding looks at every element; here the factors tell, and are few.
        require_numbers(name, lora_a, lora_b)
    with _exact_fp32(base.device):
        update = _update(lora_a.float(), lora_b.float(), scaling, corner, base.shape)
    if arrival is None:
        return _added(base, update, dtype, rounding, name, corner)
    rows = arrival.rows(update.shape)
    exact = update[rows].clone()
    merged = _added(base, update, dtype, rounding, name, corner)
    arrival.add("lora", exact, merged[rows].float() - base[rows].to(dtype).float())
    return merged


def _update(lora_a, lora_b, scaling: float, corner: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """``s·(B A)`` of one part of a weight, from the products of the blocks that it touches.

    A product of fewer rows or columns may take another kernel, which sums in another order. So the blocks lie where
    they lie in the whole weight, and each is computed whole, from operands that begin at an address of their own.
    """
    high, wide = BLOCK if lora_b.device.type == "cpu" else ACCELERATOR_BLOCK
    (top, left), (rows, columns) = corner, shape
    update = torch.empty(shape, dtype=torch.float32, device=lora_b.device)
    scratch = update.new_empty(min(high, len(lora_b)) * min(wide, lora_a.shape[1]))
    for first_column in range(left // wide * wide, left + columns, wide):
        factor = lora_a[:, first_column : first_column + wide].contiguous()
        across, to_columns = _overlap(first_column, factor.shape[1], left, columns)
        for first_row in range(top // high * high, top + rows, high):
            of_rows = lora_b[first_row : first_row + high].contiguous()
            down, to_rows = _overlap(first_row, len(of_rows), top, rows)
            block = scratch[: len(of_rows) * factor.shape[1]].view(len(of_rows), -1)
            torch.mm(of_rows, factor, out=block)
            torch.mul(block[down, across], scaling, out=update[to_rows, to_columns])
    return update


def _overlap(block: int, size: int, part: int, length: int) -> tuple[slice, slice]:
    """What a block and a part of one dimension have in common, as places in the block and in the part."""
    first, last = max(block, part), min(block + size, part + length)
    return slice(first - block, last - block), slice(first - part, last - part)


def _added(base, update, dtype: torch.dtype, rounding: Rounding, name: str, corner: tuple[int, int]) -> torch.Tensor:
    if dtype == torch.float32:
        # In place on the product: one matrix instead of two, and the same bits, since addition commutes.
        return update.add_(base)
    return round_weight(name, update, dtype, rounding, base, spent=True, corner=corner)
