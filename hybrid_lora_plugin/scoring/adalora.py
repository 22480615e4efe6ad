"""``adalora``, the rank that AdaLoRA leaves a module (arXiv 2303.10512)."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.measurements import ADALORA_IMPORTANCE, ADALORA_RANK, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "adalora",
    direction="lowest",
    needs=(ADALORA_RANK, ADALORA_IMPORTANCE),
    run="adalora",
    normalisable=False,
    source="paper §4.4; AdaLoRA, arXiv 2303.10512",
)
def score(measured: Measured) -> ModuleScores:
    """Final rank, lowest first; equal ranks are ordered by the summed triplet importance.

    Rank 0 is a finding and not a missing one: a module has a signal when its importance is above 0.
    """
    importance = measured.values(ADALORA_IMPORTANCE)
    return ModuleScores.of_values(measured.values(ADALORA_RANK), signal=importance > 0, means=importance)
