"""Sync mode ``merge``: the trainer merges, the rollout engine receives a plain model, every weight of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hybrid_lora_plugin.names import is_wrapped
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.sync.hybrid_weights import merged, plain_state, unmerged
from hybrid_lora_plugin.sync.mode_base import SyncMode, SyncReceiver
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.training.apply import parts_of


@torch.no_grad()
def merged_weights(
    model: torch.nn.Module, plan: SyncPlan, trained_only: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(plain name, whole weight of ``plan.dtype``) of a plain model, in model order.

    Args:
        model: as of ``SyncMode.outgoing``.
        plan: of this sync.
        trained_only: leave out what training leaves alone.
    """
    state, trained = plan.state_of(model), parts_of(model).trained
    for plain, (name, tensor) in plain_state(model, state).items():
        if is_wrapped(name):
            yield plain, merged(state, plain, name, plan)
        elif name in trained or not trained_only:
            yield plain, unmerged(model, plain, name, tensor, plan)


class MergeReceiver(SyncReceiver):
    """Loads what comes."""

    def take(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.check_dtype(name, tensor)
        self.rollout.load(weights)

    def finish(self) -> None:
        pass  # nothing waits for the end


class MergeSync(SyncMode):
    """LoRA modules as ``W0 + s·BA`` from the untouched base, full modules and the rest as they are.

    2·N bytes in bf16 for a model of N parameters. The model itself is never changed.
    """

    name, receiver = "merge", MergeReceiver

    def payload_bytes(self, counts: ParameterCounts, dtype: torch.dtype) -> int:
        return (counts.frozen + counts.full) * dtype.itemsize

    def outgoing(self, model: torch.nn.Module, plan: SyncPlan) -> Iterator[tuple[str, torch.Tensor]]:
        return merged_weights(model, plan)
