"""``explicit``, modules that the user names."""

from __future__ import annotations

import difflib

import torch

from hybrid_lora_plugin.scoring.errors import ScoringError
from hybrid_lora_plugin.scoring.measurements import Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "explicit",
    direction="lowest",
    needs=(),
    run="none",
    normalisable=False,
    options=("modules",),
    source="control: any set of modules can be tried",
)
def score(measured: Measured) -> ModuleScores:
    """Names exactly ``control.modules``; the budget does not apply.

    Raises:
        ScoringError: no name, an unknown one or one given twice.
    """
    wanted, known = list(measured.control.modules), [candidate.name for candidate in measured.candidates]
    if not wanted:
        raise ScoringError("control.modules: nothing given; name the modules to tune fully, e.g. " + known[0])
    for index, name in enumerate(wanted):
        if name not in known:
            (closest,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ScoringError(f"control.modules: {name!r} is no candidate module; the closest name is {closest!r}")
        if name in wanted[:index]:
            raise ScoringError(f"control.modules: {name!r} is given twice; name each module once")
    return ModuleScores.of_choice(torch.tensor([name in set(wanted) for name in known]))
