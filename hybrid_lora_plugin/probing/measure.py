"""What is measured on a validation batch: sensitivities from complementary masked passes (paper Algorithm 1, Eq. 10 to
13), and what the loss gains when one module is left out (Eq. 9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.probing.forward import Batch, Passes
from hybrid_lora_plugin.probing.layers import SvdLoraLinear
from hybrid_lora_plugin.seeding import generator


class Maskable(Protocol):
    """A layer whose extra branch can be disabled."""

    active: bool


def draw_partition(seed: int, index: int, modules: int) -> Tensor:
    """The random two-bucket partition number ``index`` (Eq. 10).

    Args:
        seed: ``probe.seed``.
        index: t, from 0.
        modules: M.

    Returns:
        bool ``[M]``: True in bucket A, False in its complement B, each with probability 0.5.
    """
    return torch.rand(modules, generator=generator(seed, "partition", index)) < 0.5


def prepare_scoring(model: nn.Module, layers: Mapping[str, SvdLoraLinear]) -> None:
    """Leave a gradient to ``e`` alone and switch dropout off."""
    model.eval()
    for layer in layers.values():
        for parameter in (layer.A, layer.B, layer.alpha):
            parameter.requires_grad_(False)
        layer.e.requires_grad_(True)


def masked_gradients(
    layers: Sequence[Maskable], parameters: Sequence[nn.Parameter], passes: Passes, batch: Batch, in_bucket_a: Tensor
) -> float:
    """``∂(L_A + L_B)/∂parameters`` into ``.grad``: one pass with bucket A disabled, one with B (Eq. 11).

    Each module is active in exactly one of the two passes.

    Args:
        layers: the M layers, all active before and after.
        parameters: of the layers' branches; their gradients are cleared first.
        passes: how to run a batch.
        batch: validation batch ``[B, S]``.
        in_bucket_a: bool ``[M]``.

    Returns:
        The mean of the two losses.
    """
    for parameter in parameters:
        parameter.grad = None
    losses = []
    try:
        for active in (~in_bucket_a, in_bucket_a):
            for layer, on in zip(layers, active.tolist(), strict=True):
                layer.active = on
            # With every module disabled the loss does not depend on any branch: its gradient is 0.
            losses.append(passes.backward(batch, parameters) if active.any() else passes.loss(batch))
    finally:
        for layer in layers:
            layer.active = True
    return sum(losses) / 2


def batch_sensitivities(
    layers: Mapping[str, SvdLoraLinear], passes: Passes, batch: Batch, in_bucket_a: Tensor
) -> tuple[Tensor, float]:
    """One row of the sensitivity matrix: ``s = mean_j |e_j g_j|`` (Eq. 11, 12).

    The gradient is summed over both passes, micro-batches and ranks **before** the absolute value.

    Args:
        layers: the M layers, after ``prepare_scoring``.
        passes: how to run a batch on the model the layers are attached to.
        batch: validation batch ``[B, S]``.
        in_bucket_a: bool ``[M]``.

    Returns:
        sensitivities ``[M]`` float64 on the CPU, and the mean of the two losses.
    """
    wrapped = list(layers.values())
    loss = masked_gradients(wrapped, [layer.e for layer in wrapped], passes, batch, in_bucket_a)
    return sensitivities_of([(layer.e, layer.e.grad) for layer in wrapped]), loss


def sensitivities_of(values_and_gradients: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """``mean_j |e_j g_j|`` of each module (Eq. 12): ``[M]`` float64 on the CPU; 0 where there is no gradient."""
    return torch.stack(
        [
            torch.zeros((), dtype=torch.float64)
            if gradient is None
            else (values.detach().double() * gradient.double()).abs().mean().cpu()
            for values, gradient in values_and_gradients
        ]
    )


def perturbation(layers: Mapping[str, SvdLoraLinear], passes: Passes, batch: Batch) -> Tensor:
    """``L(without module m) − L`` of each module, by 1 + M forward passes and no backward.

    Args:
        layers: the M warmed-up layers; all active again afterwards.
        passes: how to run a batch on the model the layers are attached to.
        batch: validation batch ``[B, S]``.

    Returns:
        ``[M]`` float64 on the CPU; positive where the update helps.
    """
    for layer in layers.values():
        layer.active = True
    whole = passes.loss(batch)
    changes = []
    for layer in layers.values():
        layer.active = False
        try:
            changes.append(passes.loss(batch) - whole)
        finally:
            layer.active = True
    return torch.tensor(changes, dtype=torch.float64)
