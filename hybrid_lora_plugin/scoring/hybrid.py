"""The Hybrid-Score and the variants that the paper compares it with in Table 2."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lora_plugin.errors import ScoringError
from hybrid_lora_plugin.scoring.measurements import FULL_SENSITIVITIES, SENSITIVITIES, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.moments import moments
from hybrid_lora_plugin.scoring.registry import register_criterion


def check_sensitivities(sensitivities: Tensor) -> None:
    """Refuse sensitivities ``[T, M]`` that allow no ranking by mean and spread.

    Raises:
        ScoringError: wrong shape, T < 2, NaN or infinity, a negative value, all zero, or no spread at all.
    """
    if sensitivities.ndim != 2 or sensitivities.shape[1] == 0:
        raise ScoringError(f"sensitivities: shape {list(sensitivities.shape)}; give [T, M] with at least one module")
    batches = sensitivities.shape[0]
    if batches < 2:
        raise ScoringError(
            f"sensitivities: {batches} validation batch; a spread needs 2 or more, raise probe.partitions"
        )
    bad = (~torch.isfinite(sensitivities)).any(dim=0)
    if bad.any():
        raise ScoringError(
            f"sensitivities: NaN or infinity in {int(bad.sum())} of {bad.numel()} modules, first column "
            f"{int(bad.nonzero()[0])}; lower probe.lr or use model.dtype=float32"
        )
    if (sensitivities < 0).any():
        raise ScoringError("sensitivities: negative values; give mean absolute values (Eq. 12)")
    if not sensitivities.any():
        raise ScoringError(
            "sensitivities: all are 0, so no gradient reached the adapters; raise probe.warmup_steps or check "
            "probe.files"
        )
    if not moments(sensitivities)[1].any():
        raise ScoringError(
            "sensitivities: every module has standard deviation 0, as if all validation batches were the same; "
            "give probe.files different rows"
        )


def hybrid_score(sensitivities: Tensor) -> Tensor:
    """Hybrid-Score ``H = mean · std`` over the validation batches (Eq. 14).

    Args:
        sensitivities: ``[T, M]``, non-negative (Eq. 12), any floating dtype.

    Returns:
        scores ``[M]``, float64. A module with score exactly 0 gave no signal.

    Raises:
        ScoringError: as ``check_sensitivities``.
    """
    check_sensitivities(sensitivities)
    mean, std = moments(sensitivities)
    return mean * std


@register_criterion("hybrid", direction="lowest", source="paper Eq. 14; lowest first by Algorithm 2")
def score_hybrid(measured: Measured) -> ModuleScores:
    """``H = mean · std`` of the sensitivities, lowest first."""
    series = measured.series(SENSITIVITIES)
    return ModuleScores.of_series(hybrid_score(series), series)


def guarded(values: Tensor) -> Tensor:
    """Denominators ``[M]``, at least 1e-12 of the largest, so that a spread of 1e-300 gives no infinity."""
    return values.clamp_min(1e-12 * values.max())


@register_criterion(
    "hybrid_ratio",
    direction="lowest",
    scale_free=True,
    source="paper Table 2, Hybrid-LoRA-1; the reciprocal of hybrid_cv",
)
def score_hybrid_ratio(measured: Measured) -> ModuleScores:
    """``μ/σ``, lowest first: the order of ``hybrid_cv`` reversed. No spread is no signal: there is no ratio."""
    series = measured.series(SENSITIVITIES)
    check_sensitivities(series)
    mean, std = moments(series)
    return ModuleScores.of_series(mean / guarded(std), series, signal=(mean != 0) & (std != 0))


@register_criterion(
    "hybrid_cv",
    direction="lowest",
    scale_free=True,
    source="paper Table 2, Hybrid-LoRA-2; the reciprocal of hybrid_ratio",
)
def score_hybrid_cv(measured: Measured) -> ModuleScores:
    """``σ/μ``, lowest first: the order of ``hybrid_ratio`` reversed."""
    series = measured.series(SENSITIVITIES)
    check_sensitivities(series)
    mean, std = moments(series)
    return ModuleScores.of_series(std / guarded(mean), series)


@register_criterion("hybrid_additive", direction="lowest", source="paper Table 2, Hybrid-LoRA-3")
def score_hybrid_additive(measured: Measured) -> ModuleScores:
    """``μ + 0.5 σ``, lowest first."""
    series = measured.series(SENSITIVITIES)
    check_sensitivities(series)
    mean, std = moments(series)
    return ModuleScores.of_series(mean + 0.5 * std, series)


@register_criterion(
    "full_pruning",
    direction="highest",
    needs=(FULL_SENSITIVITIES,),
    method="full_delta",
    source="paper Table 2, Hybrid-LoRA-4; its score is not defined there, μ · σ is our reading",
)
def score_full_pruning(measured: Measured) -> ModuleScores:
    """``mean · std`` of ``mean |D ⊙ ∂L/∂D|``, highest first: what matters stays full, the rest becomes LoRA."""
    series = measured.series(FULL_SENSITIVITIES)
    return ModuleScores.of_series(hybrid_score(series), series)
