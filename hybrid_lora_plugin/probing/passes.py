"""Forward and backward passes of one batch, over all ranks and in micro-batches, as if there were one of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.probing.loss import IGNORED, Batch, negative_log_likelihood
from hybrid_lora_plugin.probing.ranks import Ranks

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

    def __init__(self, model: nn.Module, ranks: Ranks, micro_batch_size: int | None = None) -> None:
        """For a model on the ranks' device, whole or sharded; ``micro_batch_size`` in rows, None for what holds 4096 tokens."""
        self.ranks = ranks
        self._model = model
        self._micro_batch_size = micro_batch_size

    def micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """This rank's micro-batches on its device, and whether each is the last."""
        mine = list(range(self.ranks.rank, batch.rows, self.ranks.size))
        longest = -(-batch.rows // self.ranks.size)
        # From the whole batch, so that it is the same on every rank.
        size = self._micro_batch_size or max(1, MICRO_BATCH_TOKENS // batch.input_ids.shape[1])
        for start in range(0, longest, size):
            rows = mine[start : start + size]
            micro = batch.take(rows or [0])
            if not rows:
                # Nothing is left for this rank; it passes a row whose tokens all do not count.
                micro = Batch(micro.input_ids, micro.attention_mask, torch.full_like(micro.labels, IGNORED))
            yield micro.to(self.ranks.device), start + size >= longest

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
