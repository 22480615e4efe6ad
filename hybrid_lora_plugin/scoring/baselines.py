"""Published scores that the paper sets beside its own."""

from __future__ import annotations

from hybrid_lora_plugin.errors import ScoringError
from hybrid_lora_plugin.scoring.measurements import (
    ADALORA_IMPORTANCE,
    ADALORA_RANK,
    ALPHA,
    AUTOLORA_ALPHA,
    FEATURE_NORM,
    LORA_OUTPUT,
    PERTURBATION,
    Measured,
)
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "adalora",
    direction="lowest",
    needs=(ADALORA_RANK, ADALORA_IMPORTANCE),
    method="adalora",
    normalisable=False,
    source="paper §4.4; AdaLoRA, arXiv 2303.10512",
)
def score_adalora(measured: Measured) -> ModuleScores:
    """Final rank, lowest first; equal ranks are ordered by the summed triplet importance.

    Rank 0 is a finding and not a missing one: a module has a signal when its importance is above 0.
    """
    importance = measured.values(ADALORA_IMPORTANCE)
    return ModuleScores.of_values(measured.values(ADALORA_RANK), signal=importance > 0, means=importance)


@register_criterion(
    "autolora",
    direction="lowest",
    needs=(AUTOLORA_ALPHA,),
    method="autolora",
    source="paper §4.4; AutoLoRA, arXiv 2403.09113",
)
def score_autolora(measured: Measured) -> ModuleScores:
    """``|α|``, lowest first.

    One un-normalised scalar a module: AutoLoRA's own softmax runs over the components of a module, whose mean
    is the same in all of them.
    """
    return ModuleScores.of_values(measured.values(AUTOLORA_ALPHA).abs())


@register_criterion(
    "lora_drop", direction="lowest", needs=(LORA_OUTPUT,), source="paper §4.4; LoRA-Drop, arXiv 2402.07721"
)
def score_lora_drop(measured: Measured) -> ModuleScores:
    """``I = g / Σ g`` over modules with ``g = Σ ||ΔW x||²`` over all batches, lowest first.

    Raises:
        ScoringError: no adapter puts out anything.
    """
    series = measured.series(LORA_OUTPUT)
    output = series.sum(dim=0)
    if not output.sum() > 0:
        raise ScoringError("lora_output: all are 0, so no adapter was trained; raise probe.warmup_steps")
    return ModuleScores.of_series(output / output.sum(), series)


@register_criterion("alpha", direction="lowest", needs=(ALPHA,), source="paper Eq. 8")
def score_alpha(measured: Measured) -> ModuleScores:
    """``|α|``, lowest first.

    Not gauge-invariant: halving α and doubling e, A or B leaves the module as it is and changes this score. The
    sensitivities of ``hybrid`` do not change under that.
    """
    return ModuleScores.of_values(measured.values(ALPHA).abs())


@register_criterion("perturbation", direction="lowest", needs=(PERTURBATION,), source="paper Eq. 9")
def score_perturbation(measured: Measured) -> ModuleScores:
    """Mean over T of ``L(without m) − L``, lowest first; negative where the branch does harm."""
    series = measured.series(PERTURBATION)
    return ModuleScores.of_series(series.mean(dim=0), series)


@register_criterion(
    "plop",
    direction="lowest",
    needs=(FEATURE_NORM,),
    method="features",
    scale_free=True,
    source="PLoP, arXiv 2506.20629, which selects types of modules for LoRA; lowest as there",
)
def score_plop(measured: Measured) -> ModuleScores:
    """Mean over T of the normalised feature norm, lowest first: weights that are least aligned with their inputs.

    PLoP means it over all modules of a type and adapts the types with the lowest; here each module has its own.
    """
    series = measured.series(FEATURE_NORM)
    return ModuleScores.of_series(series.mean(dim=0), series)
