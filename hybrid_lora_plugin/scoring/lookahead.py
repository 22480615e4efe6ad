"""What the loss gains when the weight of one module is moved as full fine-tuning would move it."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.measurements import LOOKAHEAD, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "lookahead",
    direction="highest",
    needs=(LOOKAHEAD,),
    method="lookahead",
    source="own; beat random and LoRA of the same size in one registered study on a toy, and not in three later ones",
)
def score_lookahead(measured: Measured) -> ModuleScores:
    """Mean over T of ``L − L(weight moved)``, highest first: the loss saved, and not per parameter.

    A finite step sees the curvature that every first-order score misses; negative where the step does harm.
    """
    series = measured.series(LOOKAHEAD)
    return ModuleScores.of_series(series.mean(dim=0), series)
