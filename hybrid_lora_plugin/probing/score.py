"""Sensitivities from complementary masked passes (paper Algorithm 1, Eq. 10 to 13)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.probing.loss import Batch, response_loss
from hybrid_lora_plugin.probing.seeding import generator
from hybrid_lora_plugin.probing.svd_lora import SvdLoraLinear


def draw_partition(seed: int, index: int, modules: int) -> Tensor:
    """The random two-bucket partition of validation batch ``index`` (Eq. 10).

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


def batch_sensitivities(
    model: nn.Module, layers: Mapping[str, SvdLoraLinear], batch: Batch, in_bucket_a: Tensor
) -> tuple[Tensor, float]:
    """One row of the sensitivity matrix: ``s = mean_j |e_j g_j|`` (Eq. 11, 12).

    Two passes, one with bucket A disabled and one with B disabled. Their gradients are added **before** the
    absolute value; each module is active in exactly one of them.

    Args:
        model: the model that ``layers`` is attached to, after ``prepare_scoring``.
        layers: the M layers.
        batch: validation batch ``[B, S]``.
        in_bucket_a: bool ``[M]``.

    Returns:
        sensitivities ``[M]`` float64 on the CPU, and the mean of the two losses.
    """
    wrapped = list(layers.values())
    for layer in wrapped:
        layer.e.grad = None
    losses = []
    try:
        for active in (~in_bucket_a, in_bucket_a):
            for layer, on in zip(wrapped, active.tolist(), strict=True):
                layer.active = on
            with torch.set_grad_enabled(bool(active.any())):
                loss = response_loss(model, batch)
            # With every module disabled the loss does not depend on any e: its gradient is 0.
            if active.any():
                loss.backward()
            losses.append(loss.item())
    finally:
        for layer in wrapped:
            layer.active = True
    sensitivities = torch.stack(
        [torch.zeros((), dtype=torch.float64) if layer.e.grad is None else _mean_abs(layer) for layer in wrapped]
    )
    return sensitivities, sum(losses) / 2


def _mean_abs(layer: SvdLoraLinear) -> Tensor:
    product = layer.e.detach().double() * layer.e.grad.double()  # [r]
    return product.abs().mean().cpu()
