"""``hybrid_cv``, the coefficient of variation of the sensitivities (paper Table 2, Hybrid-LoRA-2)."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.hybrid import check_sensitivities
from hybrid_lora_plugin.scoring.hybrid_ratio import guarded
from hybrid_lora_plugin.scoring.measurements import SENSITIVITIES, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.moments import moments
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "hybrid_cv",
    direction="lowest",
    scale_free=True,
    source="paper Table 2, Hybrid-LoRA-2; the reciprocal of hybrid_ratio",
)
def score(measured: Measured) -> ModuleScores:
    """``σ/μ``, lowest first: the order of ``hybrid_ratio`` reversed."""
    series = measured.series(SENSITIVITIES)
    check_sensitivities(series)
    mean, std = moments(series)
    return ModuleScores.of_series(std / guarded(mean), series)
