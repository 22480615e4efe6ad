"""A batch, its loss, and the passes that evaluate it over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hybrid_lora_plugin.probing.distributed import Ranks

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


def negative_log_likelihood(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Negative log-likelihood summed over all response tokens of the batch.

    Args:
        model: a Hugging Face causal language model, or what calls one.
        batch: ``[B, S]``; without any response token the sum is 0, with a gradient of 0.

    Returns:
        A scalar, float32 (float64 for a float64 model).
    """
    logits, targets = response_logits(model, batch)
    if (targets == IGNORED).all():
        return logits.sum() * 0
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def response_logits(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[B, P, V]``, at least float32, at the P positions that predict a response token in some row, and the
    token behind each, ``[B, P]``, ``IGNORED`` where it is none of its row. Without any such token P is 1.
    """
    targets = batch.labels[:, 1:]  # [B, S-1], the token after each position
    # Only positions that predict a response token in some row need logits: with 150k tokens of vocabulary
    # the rest would be most of the memory.
    positions = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)  # [P]
    if not len(positions):
        positions = positions.new_zeros(1)
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=positions
    ).logits  # [B, P, V]
    # At least float32: a sum over a vocabulary in bfloat16 keeps two digits.
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[:, positions]


#: Tokens of a micro-batch, padding included, unless the user says how many rows: one row of the default max_length
#: on a large model still fits beside its weights, and short rows are not passed one by one.
MICRO_BATCH_TOKENS = 4096


class Passes:
    """Evaluates the mean response loss of a batch that every rank is given whole.

    Each rank takes every ``size``-th row, in micro-batches; all ranks take the same number of them, since a sharded
    model needs every rank in every pass. Losses are divided by the tokens of the whole batch before they are added up,
    so neither ranks nor micro-batches change the result beyond rounding.

    Attributes:
        ranks: the processes that share the work.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        ranks: Ranks,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
    ) -> None:
        """For a model on the ranks' device, whole or sharded.

        Args:
            model: see above.
            ranks: who shares the work.
            micro_batch_size: most rows of a micro-batch, in the order of the batch; None for what holds 4096 tokens.
            micro_batch_tokens: most tokens of one, padding included, in place of ``micro_batch_size``: rows of like
                length come together. A longer row is alone.
        """
        self.ranks = ranks
        self._model = model
        self._micro_batch_size = micro_batch_size
        self._micro_batch_tokens = micro_batch_tokens

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """This rank's micro-batches on its device, and whether each is the last."""
        order, ends = self._by_length(batch) if self._micro_batch_tokens else self._as_they_come(batch)
        mine = order[self.ranks.rank :: self.ranks.size]
        for start, end in zip([0, *ends], ends, strict=False):
            rows = mine[start:end]
            # The shortest, where it is passed for company.
            micro = batch.take(rows or order[-1:])
            if not rows:
                # Nothing is left for this rank; it passes a row whose tokens all do not count.
                micro = Batch(micro.input_ids, micro.attention_mask, torch.full_like(micro.labels, IGNORED))
            yield micro.to(self.ranks.device), end == ends[-1]

    def rows_at_once(self, batch: Batch) -> int:
        """Most rows of a micro-batch that is not bound by its tokens; from the whole batch, as every rank has it."""
        return self._micro_batch_size or max(1, MICRO_BATCH_TOKENS // batch.input_ids.shape[1])

    def _as_they_come(self, batch: Batch) -> tuple[list[int], list[int]]:
        """Rows in an order that the ranks take turns in, and where the micro-batches of a rank's rows end."""
        longest, size = -(-batch.rows // self.ranks.size), self.rows_at_once(batch)
        return list(range(batch.rows)), [min(start + size, longest) for start in range(0, longest, size)]

    def _by_length(self, batch: Batch) -> tuple[list[int], list[int]]:
        """The same with the longest rows first. The first rank has the longest row of each turn: what fits there fits
        everywhere, and all ranks have as many micro-batches.
        """
        lengths = batch.attention_mask.sum(dim=1).tolist()
        order = sorted(range(batch.rows), key=lambda row: (-lengths[row], row))
        first, ends, start = order[:: self.ranks.size], [], 0
        for place in range(len(first)):
            if place > start and (place + 1 - start) * lengths[first[start]] > self._micro_batch_tokens:
                ends.append(place)
                start = place
        return order, [*ends, len(first)]

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """Mean negative log-likelihood of the response tokens of ``batch`` ``[B, S]``."""
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for micro, _ in self.micro_batches(batch):
            total += negative_log_likelihood(self._model, micro).double()
        return float(self.ranks.sum_(total)) / batch.response_tokens

    def backward(self, batch: Batch, parameters: Sequence[nn.Parameter]) -> float:
        """The same loss, and its gradient added to what ``.grad`` of the parameters holds.

        Args:
            batch: ``[B, S]``.
            parameters: replicated on every rank; their ``.grad`` is equal on all ranks before and after. A parameter
                the loss does not depend on keeps its ``.grad``, None included.
        """
        before: list[Tensor | None] = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        tokens, total = batch.response_tokens, torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for micro, _ in self.micro_batches(batch):
            loss = negative_log_likelihood(self._model, micro) / tokens
            loss.backward()
            total += loss.detach().double()
        self.ranks.sum_gradients_([parameter.grad for parameter in parameters if parameter.grad is not None])
        for parameter, earlier in zip(parameters, before, strict=True):
            if parameter.grad is None:
                parameter.grad = earlier
            elif earlier is not None:
                parameter.grad += earlier
        return float(self.ranks.sum_(total))
