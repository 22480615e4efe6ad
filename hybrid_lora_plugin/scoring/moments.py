"""Mean and spread over the validation batches (Eq. 15), and the rule of what counts as a signal."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(series: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each module (Eq. 15).

    Args:
        series: ``[T, M]``, any floating dtype.

    Returns:
        mean ``[M]`` and std ``[M]``, float64. The std of a column of equal values is exactly 0.
    """
    values = series.double()
    mean = values.mean(dim=0)
    std = (values - mean).square().mean(dim=0).sqrt()
    # The mean of equal numbers may be rounded, which would leave a spread of 1e-17 where there is none.
    constant = values.amax(dim=0) == values.amin(dim=0)
    return mean, torch.where(constant, torch.zeros_like(std), std)


def has_signal(scores: Tensor) -> Tensor:
    """Which modules have a usable score ``[M] -> bool [M]``: exactly 0 means nothing was measured."""
    return scores != 0
