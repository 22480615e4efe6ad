"""What the trainer makes the tensors of one weight sync with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_lora_plugin.sync.sent_weights import Changes
from hybrid_lora_plugin.training.arrival import Arrival
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
    #: what this sync builds on, for a mode that does; without it everything is sent
    changes: Changes | None = None
