"""The SVD-style LoRA layer of the probe (paper Eq. 7, after AdaLoRA), and how it is put on a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.seeding import generator


class SvdLoraLinear(nn.Module):
    """``y = base(x) + alpha · ((x A) ∘ e) B``, with a switch that disables the second term.

    The base is frozen and keeps its dtype. ``A [d_in, r]``, ``B [r, d_out]``, ``e [r]`` and ``alpha [1]`` are float32
    whatever the base is: a step of 2.5e-5 at 1.0 vanishes in bfloat16.

    Attributes:
        active: whether the branch takes part; set by the masks of Algorithm 1.
        e_origin, alpha_origin: what the parameters ``e`` and ``alpha`` are counted from, 0 unless centred.
    """

    def __init__(
        self, base: nn.Linear, rank: int, rng: torch.Generator, init: str = "default", centred: bool = False
    ) -> None:
        """Wrap ``base``.

        Args:
            base: the linear module, on any device.
            rank: r.
            rng: a CPU generator; values are drawn on the CPU, so they are equal on every device.
            init: ``default`` is A kaiming-uniform, B = 0, e = 1; ``adalora`` is A and B from N(0, 0.02²), e = 0.
            centred: ``e`` and ``alpha`` hold the distance from their initial values, for a wrapper that casts
                parameters to bfloat16 for the forward pass: near 0 that loses nothing, at 1 it hides the first 0.4 %.
        """
        super().__init__()
        self.base = base
        self.active = True
        # A base whose values are still to come has values here.
        device = "cpu" if base.weight.is_meta else base.weight.device
        # Drawn as [r, d_in], for which kaiming's fan-in is d_in.
        a, b, e = torch.empty(rank, base.in_features), torch.zeros(rank, base.out_features), torch.ones(rank)
        if init == "adalora":
            a.normal_(0, 0.02, generator=rng)
            b.normal_(0, 0.02, generator=rng)
            e.zero_()
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)
        self.e_origin, self.alpha_origin = (float(e[0]), 1.0) if centred else (0.0, 0.0)
        self.A = nn.Parameter(a.T.contiguous().to(device))
        self.B = nn.Parameter(b.to(device))
        self.e = nn.Parameter((e - self.e_origin).to(device))
        # A vector of one: FSDP2 shards no scalars.
        self.alpha = nn.Parameter(torch.ones(1, device=device) - self.alpha_origin)

    @property
    def coefficients(self) -> Tensor:
        """``e`` of Eq. 7, ``[r]``, at least float32."""
        return _from_origin(self.e, self.e_origin)

    @property
    def scale(self) -> Tensor:
        """``alpha`` of Eq. 7, ``[1]``, at least float32."""
        return _from_origin(self.alpha, self.alpha_origin)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., d_in] -> [..., d_out]`` in the dtype of ``x``."""
        y = self.base(x)
        return y + self.branch(x) if self.active else y

    def branch(self, x: Tensor) -> Tensor:
        """The update's part of the output, ``ΔW x``: ``[..., d_in] -> [..., d_out]``."""
        components = x @ self.A.to(x.dtype)  # [..., r]
        # e and alpha act in float32: they are small, and bfloat16 would hide what the warm-up learned.
        gate = self.scale * self.coefficients
        components = (components.to(gate.dtype) * gate).to(x.dtype)
        return components @ self.B.to(x.dtype)

    @torch.no_grad()
    def delta_norm(self) -> Tensor:
        """``||alpha · A diag(e) B||_F``, a float64 scalar; from r × r products, the update is never formed."""
        a, b = self.A.double() * self.coefficients.double(), self.B.double()
        square = ((a.T @ a) * (b @ b.T)).sum()
        return self.scale.double().abs().squeeze() * square.clamp_min(0).sqrt()


def _from_origin(parameter: Tensor, origin: float) -> Tensor:
    wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    return wide + origin if origin else wide


def attach(
    model: nn.Module,
    candidates: Sequence[Candidate],
    rank: int,
    seed: int,
    init: str = "default",
    centred: bool = False,
) -> dict[str, SvdLoraLinear]:
    """Freeze a model and put an ``SvdLoraLinear`` in the place of every candidate.

    Args:
        model: a plain Hugging Face model; changed in place.
        candidates: the M candidates.
        rank: LoRA rank r.
        seed: decides the random values, for each module by its own stream.
        init, centred: as ``SvdLoraLinear``.

    Returns:
        module name -> its layer, in candidate order.
    """
    model.requires_grad_(False)
    layers = {}
    for index, candidate in enumerate(candidates):
        base = model.get_submodule(candidate.name)
        layers[candidate.name] = SvdLoraLinear(base, rank, generator(seed, "adapter", index), init, centred)
        replace(model, candidate.name, layers[candidate.name])
    return layers


def detach(model: nn.Module, layers: dict[str, SvdLoraLinear]) -> None:
    """Put the untouched linear modules back; the model stays frozen.

    Args:
        model: the model given to ``attach``.
        layers: what ``attach`` returned.
    """
    for name, layer in layers.items():
        replace(model, name, layer.base)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``."""
    parent_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent_name), leaf, module)
