"""``lora_ffn``, all attention modules fully tuned and LoRA on the feed-forward ones (paper §4.4)."""

from __future__ import annotations

import torch

from hybrid_lora_plugin.scoring.measurements import Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "lora_ffn", direction="lowest", needs=(), run="none", normalisable=False, source="paper §4.4, LoRA-FFN"
)
def score(measured: Measured) -> ModuleScores:
    """Names every module whose component is attention; the budget does not apply."""
    return ModuleScores.of_choice(torch.tensor([c.component == "attention" for c in measured.candidates]))
