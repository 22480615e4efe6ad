"""``autolora``, the selection scalar learned on validation batches (arXiv 2403.09113)."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.measurements import AUTOLORA_ALPHA, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "autolora",
    direction="lowest",
    needs=(AUTOLORA_ALPHA,),
    run="autolora",
    source="paper §4.4; AutoLoRA, arXiv 2403.09113",
)
def score(measured: Measured) -> ModuleScores:
    """``|α|``, lowest first.

    One un-normalised scalar a module: AutoLoRA's own softmax runs over the components of a module, whose mean
    is the same in all of them.
    """
    return ModuleScores.of_values(measured.values(AUTOLORA_ALPHA).abs())
