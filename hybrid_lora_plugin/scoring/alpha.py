"""``alpha``, the learned scale of a module's probe branch (Eq. 8)."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.measurements import ALPHA, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion("alpha", direction="lowest", needs=(ALPHA,), source="paper Eq. 8")
def score(measured: Measured) -> ModuleScores:
    """``|α|``, lowest first.

    Not gauge-invariant: halving α and doubling e, A or B leaves the module as it is and changes this score. The
    sensitivities of ``hybrid`` do not change under that.
    """
    return ModuleScores.of_values(measured.values(ALPHA).abs())
