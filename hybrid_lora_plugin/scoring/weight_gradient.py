"""What the gradients of a frozen weight have in common over the batches."""

from __future__ import annotations

import math

import torch

from hybrid_lora_plugin.scoring.measurements import (
    GRADIENT_ENERGY,
    GRADIENT_SIGNAL,
    RESIDUAL_SIGNAL,
    SIGN_AGREEMENT,
    Measured,
)
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion


@register_criterion(
    "signal_to_noise",
    direction="highest",
    needs=(GRADIENT_SIGNAL, GRADIENT_ENERGY),
    method="weight_gradient",
    scale_free=True,
    source="own; beat random in a registered comparison on a toy",
)
def score_signal_to_noise(measured: Measured) -> ModuleScores:
    """``‖E G‖² / E ‖G‖²`` of the weight's gradient G over batches, on the model as it is; highest first.

    The numerator has no share of the noise, so it may be negative.
    """
    series = measured.series(GRADIENT_SIGNAL)
    signal, energy = series.mean(dim=0), measured.series(GRADIENT_ENERGY).mean(dim=0)
    there = energy > 0
    return ModuleScores.of_series(torch.where(there, signal / energy.where(there, energy.new_ones(())), 0.0), series)


@register_criterion(
    "sign_consistency",
    direction="highest",
    needs=(SIGN_AGREEMENT,),
    method="weight_gradient",
    scale_free=True,
    source="after arXiv 2605.12207, which selects single entries",
)
def score_sign_consistency(measured: Measured) -> ModuleScores:
    """Mean over entries of ``|Σ_t sign G_t| / T`` minus what random signs give, ``sqrt(2 / (π T))``; highest first.

    A module without any gradient has no signal.
    """
    series = measured.series(SIGN_AGREEMENT)
    agreement = series.mean(dim=0)
    chance = math.sqrt(2 / (math.pi * len(series)))
    return ModuleScores.of_series(agreement - chance, series, signal=agreement != 0)


@register_criterion(
    "residual_gradient",
    direction="highest",
    needs=(RESIDUAL_SIGNAL,),
    method="weight_gradient",
    source="own: the paper's hypothesis as a formula; lost to random on a toy",
)
def score_residual_gradient(measured: Measured) -> ModuleScores:
    """``‖E R‖²`` per parameter, R the part of G that the warmed-up adapter cannot follow; highest first.

    ``R = (I − P_B) G (I − P_A)``, with the projectors on what A and B span.
    """
    series = measured.series(RESIDUAL_SIGNAL)
    entries = torch.tensor([c.in_features * c.out_features for c in measured.candidates], dtype=torch.float64)
    return ModuleScores.of_series(series.mean(dim=0) / entries, series)
