"""PEFT's LoRA layer with fewer passes over memory: one product with A for adapters that read the same input.

PEFT 0.21.2 (``tuners/lora/layer.py``, ``Linear.forward``) computes y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ in five steps, three of which
write a tensor of y's size. Here B's product is added where y lies, and q, k and v (gate and up) share one product with
their stacked A. Parameters, their names and their first values are PEFT's own, so what is saved and synced is too.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear

from hybrid_lora_plugin.names import ADAPTER

#: children of one module that Qwen2, Llama and their relatives call with one input
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedInput:
    """Lets adapters that read one input compute their first product together, during a call of the module around them.

    Outside such a call every adapter answers for itself: only there is it certain that nothing changes between the
    first of them and the last, and that what was computed together is gone afterwards.

    Args:
        parent: the module that calls them with one input, one after the other.
        members: its adapters, of one input width.
    """

    def __init__(self, parent: torch.nn.Module, members: list[LoraLinear]):
        self.members = members
        self._forget()
        # Bound methods, which a copy of the model binds to its own.
        parent.register_forward_pre_hook(self._enter)
        # Also when the call fails or stops early, as a recomputation for the backward pass does.
        parent.register_forward_hook(self._leave, always_call=True)

    def _forget(self) -> None:
        self._of: tuple | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def _enter(self, *_) -> None:
        for member in self.members:
            member.shared_input = self

    def _leave(self, *_) -> None:
        self._forget()
        for member in self.members:
            member.shared_input = None

    def part(self, member: LoraLinear, x: torch.Tensor) -> torch.Tensor | None:
        """x·Aᵀ of one of them, [N, r] for x [..., K] with N rows in all; None where they cannot compute it together."""
        if x.is_inference():
            return None  # such a tensor does not tell whether it has been changed
        of = (x, x._version, torch.is_grad_enabled())
        if self._of is None or self._of[0] is not x or self._of[1:] != of[1:]:
            self._forget()
            factors = [one.lora_A[ADAPTER] for one in self.members]
            if not all(_is_here(factor, x) for factor in factors):
                return None
            product = torch.nn.functional.linear(x.flatten(0, -2), torch.cat([factor.weight for factor in factors]))
            parts = product.split([factor.out_features for factor in factors], dim=1)
            self._of, self._parts = of, dict(zip(map(id, self.members), parts, strict=True))
        return self._parts[id(member)]


def _is_here(layer: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether the layer's weight can be read without calling the layer: no unit of FSDP's own, and not a shard."""
    if type(layer) is not torch.nn.Linear:
        return False
    weight = layer.weight
    return weight.dtype == x.dtype and weight.dim() == 2 and not hasattr(weight, "to_local")


class LoraLinear(Linear):
    """A linear layer with one LoRA adapter; wherever something else is asked of it, PEFT's own ``forward`` answers."""

    #: set by the module around it while that is called
    shared_input: SharedInput | None = None

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether ``forward`` is y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ on parameters that are here, in one type."""
        if self.disable_adapters or self.merged or self.lora_variant or self.active_adapters != [ADAPTER]:
            return False
        # Under FSDP1 a factor is a unit of its own, whose weight is gathered by its own forward only.
        layers = self.base_layer, self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        if x.dim() < 2 or self.lora_bias[ADAPTER] or not all(_is_here(layer, x) for layer in layers):
            return False
        device = x.device.type
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return not cast or torch.get_autocast_dtype(device) == x.dtype

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Output [..., M] for input [..., K]; in x's type."""
        if args or kwargs or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        rows, dropout, reduced = x.flatten(0, -2), self.lora_dropout[ADAPTER], None
        if self.shared_input is not None and isinstance(dropout, torch.nn.Identity):
            reduced = self.shared_input.part(self, x)
        if reduced is None:
            reduced = self.lora_A[ADAPTER](dropout(rows))
        # The product of two matrices is no view and is not kept for the backward pass, so it may be added to in place.
        result = self.base_layer(rows)
        result.addmm_(reduced, self.lora_B[ADAPTER].weight.t(), alpha=self.scaling[ADAPTER])
        return result.unflatten(0, x.shape[:-1])


def share_inputs(model: torch.nn.Module) -> list[SharedInput]:
    """Let the adapters of a model that read one input compute their first product together; returns these sets."""
    found = []
    for parent in model.modules():
        for names in SHARING:
            members = [getattr(parent, name, None) for name in names]
            members = [member for member in members if isinstance(member, LoraLinear)]
            if len(members) > 1 and len({member.in_features for member in members}) == 1:
                found.append(SharedInput(parent, members))
    return found
