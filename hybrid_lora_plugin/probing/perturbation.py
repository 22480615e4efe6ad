"""What the loss gains when one module's update is left out (paper Eq. 9)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hybrid_lora_plugin.probing.loss import Batch
from hybrid_lora_plugin.probing.passes import Passes
from hybrid_lora_plugin.probing.svd_lora import SvdLoraLinear


def perturbation(layers: Mapping[str, SvdLoraLinear], passes: Passes, batch: Batch) -> Tensor:
    """``L(without module m) − L`` of each module, by 1 + M forward passes and no backward.

    Args:
        layers: the M warmed-up layers; all active again afterwards.
        passes: how to run a batch on the model the layers are attached to.
        batch: validation batch ``[B, S]``.

    Returns:
        ``[M]`` float64 on the CPU; positive where the update helps.
    """
    for layer in layers.values():
        layer.active = True
    whole = passes.loss(batch)
    changes = []
    for layer in layers.values():
        layer.active = False
        try:
            changes.append(passes.loss(batch) - whole)
        finally:
            layer.active = True
    return torch.tensor(changes, dtype=torch.float64)
