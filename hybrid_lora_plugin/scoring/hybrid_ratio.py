"""``hybrid_ratio``, mean over standard deviation of the sensitivities (paper Table 2, Hybrid-LoRA-1)."""

from __future__ import annotations

from torch import Tensor

from hybrid_lora_plugin.scoring.hybrid import check_sensitivities
from hybrid_lora_plugin.scoring.measurements import SENSITIVITIES, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.moments import moments
from hybrid_lora_plugin.scoring.registry import register_criterion


def guarded(values: Tensor) -> Tensor:
    """Denominators ``[M]``, at least 1e-12 of the largest, so that a spread of 1e-300 gives no infinity."""
    return values.clamp_min(1e-12 * values.max())


@register_criterion(
    "hybrid_ratio",
    direction="lowest",
    scale_free=True,
    source="paper Table 2, Hybrid-LoRA-1; the reciprocal of hybrid_cv",
)
def score(measured: Measured) -> ModuleScores:
    """``μ/σ``, lowest first: the order of ``hybrid_cv`` reversed. No spread is no signal: there is no ratio."""
    series = measured.series(SENSITIVITIES)
    check_sensitivities(series)
    mean, std = moments(series)
    return ModuleScores.of_series(mean / guarded(std), series, signal=(mean != 0) & (std != 0))
