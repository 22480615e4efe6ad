"""``hybrid``, the Hybrid-Score of the paper: mean times standard deviation of the batch sensitivities (Eq. 14, 15)."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lora_plugin.scoring.errors import ScoringError
from hybrid_lora_plugin.scoring.measurements import SENSITIVITIES, Measured
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
            "sensitivities: all are 0, so no gradient reached the adapters; raise probe.warmup_steps or check probe.files"
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
def score(measured: Measured) -> ModuleScores:
    """``H = mean · std`` of the sensitivities, lowest first."""
    series = measured.series(SENSITIVITIES)
    return ModuleScores.of_series(hybrid_score(series), series)
