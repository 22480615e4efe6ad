"""Sync mode ``receiver_merge``: few bytes travel, and the rollout engine runs a plain model.

The receiver computes ``W0 + s·BA`` itself, from the original W0 each time. With the trainer's formula and fp32 factors
the result is the trainer's merge bit for bit; factors in bf16 would change a third of the elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hybrid_lora_plugin.allocation.report import Census
from hybrid_lora_plugin.sync.adapter import FactorReceiver
from hybrid_lora_plugin.sync.hybrid_weights import trained_weights
from hybrid_lora_plugin.sync.modes import SyncMode
from hybrid_lora_plugin.training.merge import merge_weight


class ReceiverMergeReceiver(FactorReceiver):
    """Merges a module as soon as its second factor is there.

    With tensor parallelism every worker merges the whole weight and keeps its shard: a product of fewer rows may be
    summed in another order, and would not be the trainer's bit for bit.
    """

    def take_pair(self, module: str, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        name, device = f"{module}.weight", self.rollout.device
        base = self.rollout.checkpoint[name].to(device, non_blocking=True)
        merged = merge_weight(base, lora_a.to(device), lora_b.to(device), self.header.scaling, self.header.torch_dtype)
        self.rollout.load([(name, merged)])


class ReceiverMergeSync(SyncMode):
    """2·F bytes for F fully tuned parameters in bf16 and 4·A for A adapter parameters."""

    name, engine_adapter, partial, receiver = "receiver_merge", False, True, ReceiverMergeReceiver

    def payload_bytes(self, census: Census, dtype: torch.dtype) -> int:
        return census.full * dtype.itemsize + census.lora * torch.float32.itemsize

    @torch.no_grad()
    def outgoing(
        self, model: torch.nn.Module, scaling: float, dtype: torch.dtype, device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        return trained_weights(model, dtype, torch.float32, device)
