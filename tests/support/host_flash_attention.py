"""The path of flash attention on a CPU: transformers' own call, verl's Ulysses around it, and PyTorch's kernel at its
end.

flash-attn has no CPU build. What is replaced is the kernel alone; the collectives that Ulysses puts before and after
it, and the packed rows it is given, are the real ones.
"""

from __future__ import annotations

import torch

#: no "flash" in it, or transformers looks for a kernel of that name
NAME = "host_packed_attention"


def kernel(query, key, value, attention_mask, query_length, *_, position_ids, softmax_scale=None, **__):
    """Causal attention within each packed row; query [1, S, H, D], position_ids [1, S], from 0 in each row."""
    row = (position_ids[0] == 0).cumsum(0)
    steps = torch.arange(len(row))
    mask = (row[:, None] == row[None]) & (steps[:, None] >= steps[None])
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    result = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=softmax_scale, enable_gqa=True
    )
    return result.transpose(1, 2)


def register() -> str:
    """Make it known to transformers and verl; returns its name for ``attn_implementation``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import flash_attention_mask
    from verl.models.transformers import monkey_patch

    monkey_patch._flash_attention_forward = kernel
    AttentionInterface.register(NAME, flash_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    return NAME
