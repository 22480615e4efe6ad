"""The one formula that turns a base weight and its LoRA factors into a plain weight.

Trainer, export and rollout must agree bit for bit, so nobody writes this product a second time. It is evaluated
in fp32 from the untouched base and rounded once: merging and unmerging in place drifts, and ``(sB)@A`` or
``addmm(alpha=s)`` round differently.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def merge_weight(
    base: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, dtype: torch.dtype
) -> torch.Tensor:
    """``W0 + s·(B A)`` in fp32, rounded once to ``dtype``.

    Args:
        base: [d_out, d_in] original weight, any floating dtype; not changed.
        lora_a: [r, d_in] factor A.
        lora_b: [d_out, r] factor B.
        scaling: s = alpha / rank.
        dtype: of the result.
    """
    return (base.float() + scaling * (lora_b.float() @ lora_a.float())).to(dtype)
