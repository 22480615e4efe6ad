"""``random``, the control every claim about a score needs beside it."""

from __future__ import annotations

import hashlib

import torch

from hybrid_lora_plugin.scoring.measurements import Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "random",
    direction="lowest",
    needs=(),
    run="none",
    normalisable=False,
    options=("seed",),
    source="control: any score must beat several draws of this",
)
def score(measured: Measured) -> ModuleScores:
    """Uniform in [0, 1), from ``control.seed`` and nothing else; every module may be drawn."""
    digest = hashlib.sha256(f"random/{measured.control.seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    drawn = torch.rand(len(measured.candidates), generator=generator, dtype=torch.float64)
    return ModuleScores.of_values(drawn, signal=torch.ones_like(drawn, dtype=torch.bool))
