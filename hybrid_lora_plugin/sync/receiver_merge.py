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
from hybrid_lora_plugin.sync.live_weight import LiveWeight
from hybrid_lora_plugin.sync.mode_base import RolloutModel, SyncMode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.wire import SyncHeader
from hybrid_lora_plugin.training.merge import merge_weight

#: bytes of merged weights that are loaded at once: one call of the engine's loader costs more than a small matrix
BATCH = 32 << 20


class ReceiverMergeReceiver(FactorReceiver):
    """Merges a module as soon as its second factor is there: with tensor parallelism this worker's part of it."""

    factor_dtype = torch.float32

    def __init__(self, header: SyncHeader, rollout: RolloutModel):
        super().__init__(header, rollout)
        self._merged: list[tuple[str, torch.Tensor]] = []
        self._bytes = 0

    def take_pair(self, module: str, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        name, device = f"{module}.weight", self.rollout.device
        base, live = self.rollout.checkpoint[name], self._sharded(name)
        # Copies: the kernel of a product may depend on how its operands are aligned, and a transfer buffer packs
        # tightly.
        factors = lora_a.to(device, copy=True), lora_b.to(device, copy=True)
        # The proof is of the whole weight, of which a part shows that it has the same bits.
        whole = self._merge(name, base, factors) if live is None or name in self.header.merged else None
        if live is None:
            self._prove(name, whole)
            self._merged.append((name, whole))
            self._bytes += whole.nbytes
            if self._bytes >= BATCH:
                self._load()
            return
        part = self._merge(name, live.part_of(base), factors, live.corner)
        if whole is not None:
            self._prove(name, whole, torch.equal(live.part_of(whole), part))
        self.rollout.load_part(name, part)

    def _sharded(self, name: str) -> LiveWeight | None:
        """Where this worker's part of a weight lies; None where it holds all of it, or the layout is not known."""
        try:
            live = self.rollout.live(name)
        except WeightSyncError:
            return None  # whether that matters is said when it is loaded
        return None if live.dimension is None else live

    def _merge(self, name: str, base: torch.Tensor, factors, corner: tuple[int, int] = (0, 0)) -> torch.Tensor:
        header, base = self.header, base.to(self.rollout.device, non_blocking=True)
        return merge_weight(base, *factors, header.scaling, header.torch_dtype, header.rounding, name, corner=corner)

    def _prove(self, name: str, whole: torch.Tensor, part_is_of_it: bool = True) -> None:
        wanted = self.header.merged.get(name)
        if wanted is not None and not (part_is_of_it and digest_of(whole) == wanted):
            raise WeightSyncError(
                f"{name}: merged here to other bits than in the trainer, though from the same factors: the two compute "
                f"their products differently; give hybrid_lora.sync=merge",
                see="merged-to-other-bits",
            )

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
