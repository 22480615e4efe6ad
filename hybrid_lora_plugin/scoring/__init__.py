"""Criteria: pure functions from what a probe measured to module scores ``[M]``.

    measurements    the named tensors of a probing run, and how a criterion reads them
    normalise       what can be divided out of them
    module_scores   what a criterion gives back: scores, signal, moments
    registry        the table of criteria, and ``score_modules``
    hybrid          the Hybrid-Score and the variants of Table 2
    baselines       published scores beside it
    controls        what any claim about a score needs beside it
    lookahead       what moving one module's weight saves
    weight_gradient what the gradients of a weight have in common over the batches
    trial           what a trial of candidate allocations chose

To add one, write a function ``score_NAME(measured)`` with ``@register_criterion("NAME", direction=..., source=...)``
into one of these files or a new one, and add the name to ``CRITERIA`` in ``config_selection``.

Dimension letters: T validation batches, M modules, r rank.
"""

# First the parts that every criterion imports, then the criteria: importing one registers it.
from hybrid_lora_plugin.errors import ScoringError  # noqa: F401
from hybrid_lora_plugin.scoring.measurements import Measured  # noqa: F401
from hybrid_lora_plugin.scoring.module_scores import ModuleScores  # noqa: F401
from hybrid_lora_plugin.scoring.moments import has_signal, moments  # noqa: F401
from hybrid_lora_plugin.scoring.registry import (  # noqa: F401
    Criterion,
    get_criterion,
    register_criterion,
    score_modules,
)

# isort: split
from hybrid_lora_plugin.scoring import baselines, controls, hybrid, lookahead, trial, weight_gradient  # noqa: F401
from hybrid_lora_plugin.scoring.hybrid import hybrid_score  # noqa: F401
