"""Sync mode ``adapter``: full modules as base weights, the factors as the rollout engine's own LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.names import split_factor, wire_factor
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.sync.hybrid_weights import trained_weights
from hybrid_lora_plugin.sync.mode_base import RolloutModel, SyncMode, SyncReceiver
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.wire import SyncHeader


class FactorReceiver(SyncReceiver):
    """Loads weights of full modules at once and brings the two factors of each other module together."""

    #: what factors travel in; None is the engine's dtype
    factor_dtype: torch.dtype | None = None

    def __init__(self, header: SyncHeader, rollout: RolloutModel):
        super().__init__(header, rollout)
        self._modules = frozenset(header.lora_modules)
        self._waiting = set(self._modules)
        self._first: dict[str, tuple[str, torch.Tensor]] = {}

    def take(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        plain = []
        for name, tensor in weights:
            factor = split_factor(name)
            if factor is None:
                self._check_plain(name, tensor)
                plain.append((name, tensor))
            else:
                self._take_factor(name, *factor, tensor)
        if plain:
            self.rollout.load(plain)

    def _check_plain(self, name: str, tensor: torch.Tensor) -> None:
        self.check_dtype(name, tensor)
        if name.removesuffix(".weight") in self._modules:
            raise WeightSyncError(
                f"{name}: sent as a weight, and the module has an adapter: one would undo the other",
                see="adapter-factors-disagree",
            )

    def _take_factor(self, name: str, module: str, kind: str, tensor: torch.Tensor) -> None:
        self._check_shape(name, module, kind, tensor)
        self.check_dtype(name, tensor, self.factor_dtype)
        if module not in self._waiting or self._first.get(module, ("",))[0] == kind:
            raise WeightSyncError(f"{name}: received twice in one sync", see="sync-with-parts-missing-or-repeated")
        if module not in self._first:
            # Cloned: the buffer it came in is written again.
            self._first[module] = (kind, tensor.clone())
            return
        _, earlier = self._first.pop(module)
        self._waiting.remove(module)
        self.take_pair(module, *((earlier, tensor) if kind == "B" else (tensor, earlier)))

    def _check_shape(self, name: str, module: str, kind: str, tensor: torch.Tensor) -> None:
        if module not in self._modules:
            raise WeightSyncError(f"{name}: {module} has no adapter in this run", see="adapter-factors-disagree")
        out_features, in_features = self.rollout.checkpoint.shape(f"{module}.weight")
        rank = self.header.lora_rank
        wanted = (rank, in_features) if kind == "A" else (out_features, rank)
        if tuple(tensor.shape) != wanted:
            raise WeightSyncError(
                f"{name}: received with shape {tuple(tensor.shape)}, wanted {wanted}: an adapter of another rank, or a "
                "shard of one",
                see="tensor-of-another-shape-or-dtype",
            )

    def take_pair(self, module: str, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Both factors of a module, A [r, d_in] and B [d_out, r]; one of them is a view of the transfer buffer."""
        raise NotImplementedError

    def finish(self) -> None:
        if self._waiting:
            module = min(self._waiting)
            kind = "B" if self._first.get(module, ("B",))[0] == "A" else "A"
            raise WeightSyncError(f"{wire_factor(module, kind)}: missing from the sync", see="adapter-factors-disagree")


class AdapterReceiver(FactorReceiver):
    """Gives the engine all factors as one adapter at the end: it takes no less than a whole one."""

    def __init__(self, header: SyncHeader, rollout: RolloutModel):
        super().__init__(header, rollout)
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def take_pair(self, module: str, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        self._factors[module] = (lora_a.clone(), lora_b.clone())

    def finish(self) -> None:
        super().finish()
        self.rollout.replace_adapter(self._factors, self.header)
        self._factors = {}


class AdapterSync(SyncMode):
    """2·F bytes for F fully tuned and 2·A for A adapter parameters in bf16; the engine runs its LoRA kernels."""

    name, receiver = "adapter", AdapterReceiver
    engine_adapter = partial = True

    def payload_bytes(self, counts: ParameterCounts, dtype: torch.dtype) -> int:
        return (counts.full + counts.lora) * dtype.itemsize

    @torch.no_grad()
    def outgoing(self, model: torch.nn.Module, plan: SyncPlan) -> Iterator[tuple[str, torch.Tensor]]:
        return trained_weights(model, plan, factor_dtype=plan.dtype)
