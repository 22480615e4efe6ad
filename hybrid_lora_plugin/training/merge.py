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
) -> torch.Tensor:
    """``W0 + s·(B A)`` in fp32, rounded once to ``dtype``.

    Rounded stochastically, W0 is brought to ``dtype`` first, to nearest as a rollout engine loads it: a weight without
    an update is then the engine's own. (It is the same for a checkpoint in ``dtype``.)

    Args:
        base: [d_out, d_in] original weight, any floating dtype; not changed.
        lora_a: [r, d_in] factor A.
        lora_b: [d_out, r] factor B.
        scaling: s = alpha / rank.
        dtype: of the result.
        rounding: to ``dtype``.
        name: plain name of the weight, for the rounding's thresholds and for messages.
        arrival: counts how much of the update is in the result, from some rows of it.

    Raises:
        WeightSyncError: a weight is too large for float16, or no number.
    """
    if dtype == torch.bfloat16 and not rounding.is_stochastic(dtype):
        # Otherwise the rounding looks at every element; here the factors tell, and are few.
        require_numbers(name, lora_a, lora_b)
    with _exact_fp32(base.device):
        update = (lora_b.float() @ lora_a.float()).mul_(scaling)
    if arrival is None:
        return _added(base, update, dtype, rounding, name)
    rows = arrival.rows(update.shape)
    exact = update[rows].clone()
    merged = _added(base, update, dtype, rounding, name)
    arrival.add("lora", exact, merged[rows].float() - base[rows].to(dtype).float())
    return merged


def _added(base, update, dtype: torch.dtype, rounding: Rounding, name: str) -> torch.Tensor:
    if dtype == torch.float32:
        # In place on the product: one matrix instead of two, and the same bits, since addition commutes.
        return update.add_(base)
    return round_weight(name, update, dtype, rounding, base, spent=True)
