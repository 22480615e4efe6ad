"""What a criterion says about every module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_lora_plugin.scoring.moments import has_signal, moments


@dataclass(frozen=True)
class ModuleScores:
    """Scores of the M candidates, in their order.

    Attributes:
        scores: ``[M]`` float64; ``Criterion.direction`` says which end is fully fine-tuned.
        signal: ``[M]`` bool; a module without signal is never selected by its score.
        means: ``[M]`` float64, mean over T of the series the criterion read; breaks ties of the score.
        stds: ``[M]`` float64, population standard deviation over T, 0 for one value a module.
        fixed: ``[M]`` bool, the modules to tune fully, from a criterion that names them itself; else None.
    """

    scores: Tensor
    signal: Tensor
    means: Tensor
    stds: Tensor
    fixed: Tensor | None = None

    @classmethod
    def of_series(cls, scores: Tensor, series: Tensor, signal: Tensor | None = None) -> ModuleScores:
        """Scores ``[M]`` made from a series ``[T, M]``, with its moments."""
        means, stds = moments(series)
        return cls(scores, has_signal(scores) if signal is None else signal, means, stds)

    @classmethod
    def of_values(cls, scores: Tensor, signal: Tensor | None = None, means: Tensor | None = None) -> ModuleScores:
        """Scores ``[M]`` made from one value a module; ``means`` is the score unless ties need another."""
        return cls(
            scores,
            has_signal(scores) if signal is None else signal,
            scores if means is None else means,
            torch.zeros_like(scores),
        )

    @classmethod
    def of_choice(cls, fixed: Tensor) -> ModuleScores:
        """Modules named without a measurement, ``fixed [M]`` bool: score 1 for those, 0 (no signal) for others."""
        scores = fixed.double()
        return cls(scores, fixed, scores, torch.zeros_like(scores), fixed)
