"""``perturbation``, what the loss loses when a module's branch is taken away (Eq. 9)."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.measurements import PERTURBATION, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion("perturbation", direction="lowest", needs=(PERTURBATION,), source="paper Eq. 9")
def score(measured: Measured) -> ModuleScores:
    """Mean over T of ``L(without m) − L``, lowest first; negative where the branch does harm."""
    series = measured.series(PERTURBATION)
    return ModuleScores.of_series(series.mean(dim=0), series)
