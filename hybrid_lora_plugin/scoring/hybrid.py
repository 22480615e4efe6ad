"""The Hybrid-Score of the paper: mean times standard deviation of the batch sensitivities (Eq. 14, 15)."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lora_plugin.config import ConfigurationError
from hybrid_lora_plugin.scoring.registry import register_criterion


class ScoringError(ConfigurationError):
    """Sensitivities from which no ranking can be made."""


def moments(sensitivities: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each module (Eq. 15).

    Args:
        sensitivities: ``[T, M]``, any floating dtype.

    Returns:
        mean ``[M]`` and std ``[M]``, float64. The std of a column of equal values is exactly 0.
    """
    values = sensitivities.double()
    mean = values.mean(dim=0)
    std = (values - mean).square().mean(dim=0).sqrt()
    # The mean of equal numbers may be rounded, which would leave a spread of 1e-17 where there is none.
    constant = values.amax(dim=0) == values.amin(dim=0)
    return mean, torch.where(constant, torch.zeros_like(std), std)


def has_signal(scores: Tensor) -> Tensor:
    """Which modules have a usable score ``[M] -> bool [M]``: exactly 0 means nothing was measured."""
    return scores != 0


@register_criterion("hybrid", direction="lowest")
def hybrid_score(sensitivities: Tensor) -> Tensor:
    """Hybrid-Score ``H = mean · std`` over the validation batches (Eq. 14).

    Args:
        sensitivities: ``[T, M]``, non-negative (Eq. 12).

    Returns:
        scores ``[M]``, float64. A module with score exactly 0 gave no signal.

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
    mean, std = moments(sensitivities)
    if not std.any():
        raise ScoringError(
            "sensitivities: every module has standard deviation 0, as if all validation batches were the same; "
            "give probe.files different rows"
        )
    return mean * std
