"""What the trainer makes the tensors of one weight sync with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from hybrid_lora_plugin.sync.sent_weights import Changes
from hybrid_lora_plugin.training.arrival import Arrival, TrainedPiece
from hybrid_lora_plugin.training.rounding import NEAREST, Rounding


@dataclass(frozen=True)
class SyncPlan:
    """Everything but the model that decides which tensors a sync sends."""

    #: LoRA's s = alpha / rank
    scaling: float
    #: what the rollout engine computes in
    dtype: torch.dtype
    #: where whole tensors are put together
    device: torch.device | str | int
    #: of merged and fully tuned weights to ``dtype``
    rounding: Rounding = NEAREST
    #: counts how much of the update is in what is sent
    arrival: Arrival | None = None
    #: this rank's rows of the full modules' original weights, by their name in ``state_dict()``: only what training
    #: added to them is rounded by thresholds, and what arrived of it is counted. A full module without one is rounded
    #: as a whole, which is the same where the checkpoint is of ``dtype``
    originals: Mapping[str, torch.Tensor] = field(default_factory=dict)
    #: what this rank holds of the full modules, by the same names, where their tensors in ``state_dict()`` are not it:
    #: counted as arrived as ``originals`` are
    pieces: Mapping[str, TrainedPiece] = field(default_factory=dict)
    #: makes the model's ``state_dict()``
    state_of: Callable[[torch.nn.Module], dict[str, torch.Tensor]] = torch.nn.Module.state_dict
    #: what this sync builds on, for a mode that does; without it everything is sent
    changes: Changes | None = None
