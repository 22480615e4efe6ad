"""The SVD-style LoRA layer of the probe (paper Eq. 7, after AdaLoRA), and how it is put on a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.probing.seeding import generator


class SvdLoraLinear(nn.Module):
    """``y = base(x) + alpha · ((x A) ∘ e) B``, with a switch that disables the second term.

    The base is frozen and keeps its dtype. ``A [d_in, r]``, ``B [r, d_out]``, ``e [r]`` and the scalar
    ``alpha`` are float32 whatever the base is: a step of 2.5e-5 at 1.0 vanishes in bfloat16.

    Attributes:
        active: whether the branch takes part; set by the masks of Algorithm 1.
    """

    def __init__(self, base: nn.Linear, rank: int, rng: torch.Generator) -> None:
        """Wrap ``base``; ``A`` is kaiming-uniform from ``rng`` (a CPU generator), ``B = 0``, ``e = 1``, ``alpha = 1``."""
        super().__init__()
        self.base = base
        self.active = True
        device = base.weight.device
        # Drawn as [r, d_in], for which kaiming's fan-in is d_in, and on the CPU, for equal values on every device.
        a = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)
        self.A = nn.Parameter(a.T.contiguous().to(device))
        self.B = nn.Parameter(torch.zeros(rank, base.out_features, device=device))
        self.e = nn.Parameter(torch.ones(rank, device=device))
        self.alpha = nn.Parameter(torch.ones((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., d_in] -> [..., d_out]`` in the dtype of ``x``."""
        y = self.base(x)
        if not self.active:
            return y
        components = x @ self.A.to(x.dtype)  # [..., r]
        # e and alpha act in float32: they are small, and bfloat16 would hide what the warm-up learned.
        components = (components.to(self.e.dtype) * (self.alpha * self.e)).to(x.dtype)
        return y + components @ self.B.to(x.dtype)


def attach(model: nn.Module, candidates: Sequence[Candidate], rank: int, seed: int) -> dict[str, SvdLoraLinear]:
    """Freeze a model and put an ``SvdLoraLinear`` in the place of every candidate.

    Args:
        model: a plain Hugging Face model; changed in place.
        candidates: the M candidates.
        rank: LoRA rank r.
        seed: decides ``A``, for each module by its own stream.

    Returns:
        module name -> its layer, in candidate order.
    """
    model.requires_grad_(False)
    layers = {}
    for index, candidate in enumerate(candidates):
        parent_name, _, leaf = candidate.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layers[candidate.name] = SvdLoraLinear(getattr(parent, leaf), rank, generator(seed, "adapter", index))
        setattr(parent, leaf, layers[candidate.name])
    return layers


def detach(model: nn.Module, layers: dict[str, SvdLoraLinear]) -> None:
    """Put the untouched linear modules back; the model stays frozen.

    Args:
        model: the model given to ``attach``.
        layers: what ``attach`` returned.
    """
    for name, layer in layers.items():
        parent_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent_name), leaf, layer.base)
