"""Sync mode ``merge``: the trainer merges, the rollout engine receives a plain model, every weight of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hybrid_lora_plugin.names import is_wrapped
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.sync.hybrid_weights import factors_of, plain_state, unmerged
from hybrid_lora_plugin.sync.mode_base import SyncMode, SyncReceiver
from hybrid_lora_plugin.training.apply import parts_of
from hybrid_lora_plugin.training.arrival import Arrival
from hybrid_lora_plugin.training.dtensor import whole
from hybrid_lora_plugin.training.merge import merge_weight
from hybrid_lora_plugin.training.rounding import NEAREST, Rounding


@torch.no_grad()
def merged_weights(
    model: torch.nn.Module,
    scaling: float,
    dtype: torch.dtype,
    device,
    rounding: Rounding,
    arrival: Arrival | None,
    trained_only: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(plain name, whole weight of ``dtype``) of a plain model, in model order; arguments as of ``SyncMode.outgoing``.

    Args:
        trained_only: leave out what training leaves alone.
    """
    state, trained = model.state_dict(), parts_of(model).trained
    for plain, (name, tensor) in plain_state(model, state).items():
        if is_wrapped(name):
            lora_a, lora_b = factors_of(state, name, device)
            base = whole(tensor, device)
            yield plain, merge_weight(base, lora_a, lora_b, scaling, dtype, rounding, plain, arrival)
        elif name in trained or not trained_only:
            yield plain, unmerged(model, plain, name, tensor, dtype, device, rounding, arrival)


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

    def outgoing(
        self,
        model: torch.nn.Module,
        scaling: float,
        dtype: torch.dtype,
        device,
        rounding=NEAREST,
        arrival=None,
        changes=None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        return merged_weights(model, scaling, dtype, device, rounding, arrival)
