"""``gradient_norm``, the norm of the frozen weight's gradient: a control."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.measurements import GRADIENT_NORM, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "gradient_norm",
    direction="highest",
    needs=(GRADIENT_NORM,),
    source="control asked for by the paper's reviewers; highest is our choice",
)
def score(measured: Measured) -> ModuleScores:
    """Mean over T of ``||∂L/∂W||_F``, highest first. No direction is established: ``direction`` turns it."""
    series = measured.series(GRADIENT_NORM)
    return ModuleScores.of_series(series.mean(dim=0), series)
