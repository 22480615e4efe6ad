"""``hybrid_additive``, mean plus half a standard deviation of the sensitivities (paper Table 2, Hybrid-LoRA-3)."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.hybrid import check_sensitivities
from hybrid_lora_plugin.scoring.measurements import SENSITIVITIES, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.moments import moments
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion("hybrid_additive", direction="lowest", source="paper Table 2, Hybrid-LoRA-3")
def score(measured: Measured) -> ModuleScores:
    """``μ + 0.5 σ``, lowest first."""
    series = measured.series(SENSITIVITIES)
    check_sensitivities(series)
    mean, std = moments(series)
    return ModuleScores.of_series(mean + 0.5 * std, series)
