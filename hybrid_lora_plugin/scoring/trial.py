"""The modules of the candidate allocation that did best when each was trained for a while."""

from __future__ import annotations

from hybrid_lora_plugin.scoring.measurements import TRIAL, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "trial",
    direction="highest",
    needs=(TRIAL,),
    method="trial",
    normalisable=False,
    source="own; successive halving as in Jamieson and Talwalkar, AISTATS 2016",
)
def score_trial(measured: Measured) -> ModuleScores:
    """1 for the modules of the allocation that a trial chose, which fit the budget it was made with; 0 for others.

    A trial rates allocations and not modules, so a smaller budget would be an allocation that nobody trained.
    """
    return ModuleScores.of_values(measured.values(TRIAL))
