"""The validation and warm-up loss: negative log-likelihood of the response tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100


@dataclass
class Batch:
    """Rows padded on the right.

    Attributes:
        input_ids: ``[B, S]`` int64.
        attention_mask: ``[B, S]`` int64, 0 on padding.
        labels: ``[B, S]`` int64, ``IGNORED`` everywhere but on response tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def response_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood over all response tokens of the batch (not a mean of row means).

    Args:
        model: a Hugging Face causal language model.
        batch: ``[B, S]``; every row has at least one response token, none of them the first token.

    Returns:
        A scalar, float32 (float64 for a float64 model).
    """
    targets = batch.labels[:, 1:]  # [B, S-1], the token after each position
    # Only positions that predict a response token in some row need logits: with 150k tokens of vocabulary
    # the rest would be most of the memory.
    positions = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)  # [P]
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=positions
    ).logits  # [B, P, V]
    # At least float32: a sum over a vocabulary in bfloat16 keeps two digits.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits.flatten(0, 1), targets[:, positions].flatten(), ignore_index=IGNORED)
