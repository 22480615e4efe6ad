"""Sync mode ``receiver_merge``: few bytes travel, and the rollout engine runs a plain model.

The receiver computes ``W0 + s·BA`` itself, from the original W0 each time. With the trainer's formula and fp32 factors
the result is the trainer's merge bit for bit; factors in bf16 would change a third of the elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.names import BASE_WEIGHT, PEFT_PREFIX
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.sync.adapter import FactorReceiver
from hybrid_lora_plugin.sync.digest import digest_of
from hybrid_lora_plugin.sync.hybrid_weights import layer_state, merged, trained_weights
from hybrid_lora_plugin.sync.mode_base import RolloutModel, SyncMode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.wire import SyncHeader
from hybrid_lora_plugin.training.merge import merge_weight

#: bytes of merged weights that are loaded at once: one call of the engine's loader costs more than a small matrix
BATCH = 32 << 20


class ReceiverMergeReceiver(FactorReceiver):
    """Merges a module as soon as its second factor is there.

    With tensor parallelism every worker merges the whole weight and keeps its shard: a product of fewer rows may be
    summed in another order, and would not be the trainer's bit for bit.
    """

    factor_dtype = torch.float32

    def __init__(self, header: SyncHeader, rollout: RolloutModel):
        super().__init__(header, rollout)
        self._merged: list[tuple[str, torch.Tensor]] = []
        self._bytes = 0

    def take_pair(self, module: str, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        name, device = f"{module}.weight", self.rollout.device
        base = self.rollout.checkpoint[name].to(device, non_blocking=True)
        # Copies: the kernel of a product may depend on how its operands are aligned, and a transfer buffer packs
        # tightly.
        lora_a, lora_b = lora_a.to(device, copy=True), lora_b.to(device, copy=True)
        header = self.header
        weight = merge_weight(base, lora_a, lora_b, header.scaling, header.torch_dtype, header.rounding, name)
        if name in self.header.merged and digest_of(weight) != self.header.merged[name]:
            raise WeightSyncError(
                f"{name}: merged here to other bits than in the trainer, though from the same factors: the two compute "
                f"their products differently; give hybrid_lora.sync=merge",
                see="merged-to-other-bits",
            )
        self._merged.append((name, weight))
        self._bytes += weight.nbytes
        if self._bytes >= BATCH:
            self._load()

    def _load(self) -> None:
        self.rollout.load(self._merged)
        self._merged, self._bytes = [], 0

    def finish(self) -> None:
        super().finish()
        if self._merged:
            self._load()


class ReceiverMergeSync(SyncMode):
    """2·F bytes for F fully tuned parameters in bf16 and 4·A for A adapter parameters."""

    name, receiver = "receiver_merge", ReceiverMergeReceiver
    partial = receiver_merges = True

    def payload_bytes(self, counts: ParameterCounts, dtype: torch.dtype) -> int:
        return counts.full * dtype.itemsize + counts.lora * torch.float32.itemsize

    @torch.no_grad()
    def outgoing(self, model: torch.nn.Module, plan: SyncPlan) -> Iterator[tuple[str, torch.Tensor]]:
        return trained_weights(model, plan, factor_dtype=torch.float32)

    @torch.no_grad()
    def merged_digest(self, model: torch.nn.Module, module: str, plan: SyncPlan) -> dict[str, str]:
        layer, plain = PEFT_PREFIX + module, f"{module}.weight"
        return {plain: digest_of(merged(layer_state(model, layer), plain, layer + BASE_WEIGHT, plan))}
