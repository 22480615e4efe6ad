"""``snip``, connection sensitivity of the frozen weight (arXiv 1810.02340): a control."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.measurements import SNIP, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "snip", direction="highest", needs=(SNIP,), source="control; SNIP, arXiv 1810.02340; highest is our choice"
)
def score(measured: Measured) -> ModuleScores:
    """Mean over T of ``Σ |W ⊙ ∂L/∂W|``, highest first. No direction is established: ``direction`` turns it."""
    series = measured.series(SNIP)
    return ModuleScores.of_series(series.mean(dim=0), series)
