"""``full_pruning``, Hybrid-LoRA-4: probe full deltas and prune the weak ones to LoRA."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.hybrid import hybrid_score
from hybrid_lora_plugin.scoring.measurements import FULL_SENSITIVITIES, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "full_pruning",
    direction="highest",
    needs=(FULL_SENSITIVITIES,),
    run="full_delta",
    source="paper Table 2, Hybrid-LoRA-4; its score is not defined there, μ · σ is our reading",
)
def score(measured: Measured) -> ModuleScores:
    """``mean · std`` of ``mean |D ⊙ ∂L/∂D|``, highest first: what matters stays full, the rest becomes LoRA."""
    series = measured.series(FULL_SENSITIVITIES)
    return ModuleScores.of_series(hybrid_score(series), series)
