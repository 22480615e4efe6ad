"""What training holds on one rank, in bytes, beside the least that it could hold."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.training.dtensor import local_tensor
from hybrid_lora_plugin.training.reference import BaseSnapshot


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of one rank between two steps; activations and what is gathered for a layer come on top.

    Attributes:
        frozen: weights that never train.
        trained: fp32 masters of full modules and LoRA factors.
        gradients: of ``trained``, once a backward pass has run.
        moments: of the optimizer, Adam's two for every trained value.
        reference: the snapshot of the full modules' original values.
        sent: besides, in the host's memory, what ``sparse_merge`` remembers of its last sync; no part of ``total``.
    """

    frozen: float
    trained: float
    gradients: float
    moments: float
    reference: float
    sent: float = 0

    @property
    def total(self) -> float:
        """Bytes where the model is."""
        return sum(astuple(self)) - self.sent

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in vars(self).items() if name != "sent")
        besides = f"; and {self.sent / 1e6:,.1f} MB of the host for what was sent last" if self.sent else ""
        return f"{self.total / 1e6:,.1f} MB on each rank: {parts}{besides}"


def rank_bytes(model: torch.nn.Module, snapshot: BaseSnapshot | None = None, sent: float = 0) -> TrainingBytes:
    """What this rank will hold, from its shards as they are: gradients and moments are those of Adam on them.

    Args:
        model: the hybrid model, sharded or not.
        snapshot: the reference policy's.
        sent: bytes of what its syncs keep, from ``sync.sent_weights``.
    """
    frozen = trained = 0
    for parameter in model.parameters():
        size = local_tensor(parameter).nbytes
        if parameter.requires_grad:
            trained += size
        else:
            frozen += size
    return TrainingBytes(frozen, trained, trained, 2 * trained, snapshot.bytes if snapshot is not None else 0, sent)


def least_bytes(counts: ParameterCounts, ranks: int) -> TrainingBytes:
    """The floor for a bf16 checkpoint: ``(2·N_frozen + 16·(F + A) + 2·F) / R`` for R ranks (docs/training-cost.md)."""
    trains = counts.full + counts.lora
    parts = (2 * counts.frozen, 4 * trains, 4 * trains, 8 * trains, 2 * counts.full)
    return TrainingBytes(*(part / ranks for part in parts))
