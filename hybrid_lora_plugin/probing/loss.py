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

    @property
    def rows(self) -> int:
        """B."""
        return self.input_ids.shape[0]

    @property
    def response_tokens(self) -> int:
        """Tokens that the loss is a mean over; the first token of a row is never one."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    def take(self, rows: list[int]) -> Batch:
        """Some of the rows, with no more padding than they need: ``[len(rows), S']``."""
        length = int(self.attention_mask[rows].sum(dim=1).max())
        return Batch(self.input_ids[rows, :length], self.attention_mask[rows, :length], self.labels[rows, :length])


def negative_log_likelihood(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood summed over all response tokens of the batch.

    Args:
        model: a Hugging Face causal language model.
        batch: ``[B, S]``; without any response token the sum is 0, with a gradient of 0.

    Returns:
        A scalar, float32 (float64 for a float64 model).
    """
    targets = batch.labels[:, 1:]  # [B, S-1], the token after each position
    # Only positions that predict a response token in some row need logits: with 150k tokens of vocabulary
    # the rest would be most of the memory.
    positions = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)  # [P]
    empty = not len(positions)
    if empty:
        positions = positions.new_zeros(1)
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=positions
    ).logits  # [B, P, V]
    # At least float32: a sum over a vocabulary in bfloat16 keeps two digits.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if empty:
        return logits.sum() * 0
    return functional.cross_entropy(
        logits.flatten(0, 1), targets[:, positions].flatten(), ignore_index=IGNORED, reduction="sum"
    )
