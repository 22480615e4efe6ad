"""PEFT's LoRA layer with fewer passes over memory: one product with A for adapters that read the same input.

PEFT 0.21.2 (``tuners/lora/layer.py``, ``Linear.forward``) computes y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ in five steps, three of which
write a tensor of y's size. Here B's product is added where y lies, and q, k and v (gate and up) share one product with
their stacked A. Parameters, their names and their first values are PEFT's own, so what is saved and synced is too.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear

ADAPTER = "default"
#: children of one module that Qwen2, Llama and their relatives call with one input
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedInput:
    """What a set of adapters has computed together of one input, for as long as the call of their parent lasts.

    Args:
        parent: the module that calls them with one input, one after the other.
        members: its adapters.
    """

    def __init__(self, parent: torch.nn.Module, members: list[LoraLinear]):
        self.members = members
        self._forget()
        # Also when the call fails or stops early, as a recomputation for the backward pass does.
        parent.register_forward_hook(lambda *_: self._forget(), always_call=True)

    def _forget(self) -> None:
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, member: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        """x·Aᵀ of one of them, [N, r] for x [..., K] with N rows in all."""
        key = id(member)
        if self._input is not x or key not in self._parts:
            stacked = torch.cat([one.lora_A[ADAPTER].weight for one in self.members])
            product = torch.nn.functional.linear(x.flatten(0, -2), stacked)
            ranks = [one.r[ADAPTER] for one in self.members]
            parts = product.split(ranks, dim=1)
            self._input, self._parts = x, dict(zip(map(id, self.members), parts, strict=True))
        return self._parts.pop(key)


class LoraLinear(Linear):
    """A linear layer with one LoRA adapter; wherever something else is asked of it, PEFT's own ``forward`` answers."""

    shared_input: SharedInput | None = None

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether ``forward`` is y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ on parameters that are here, in one type."""
        if self.disable_adapters or self.merged or self.lora_variant or self.active_adapters != [ADAPTER]:
            return False
        # Under FSDP1 a factor is a unit of its own, whose weight is gathered by its own forward only.
        layers = self.base_layer, self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        if any(type(layer) is not torch.nn.Linear for layer in layers) or self.lora_bias[ADAPTER]:
            return False
        wanted = {x.dtype, *(layer.weight.dtype for layer in layers)}
        if torch.is_autocast_enabled(x.device.type):
            wanted.add(torch.get_autocast_dtype(x.device.type))
        return len(wanted) == 1 and x.dim() > 1

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Output [..., M] for input [..., K]; in x's type."""
        if args or kwargs or not self._is_plain(x):
            return super().forward(x, *args, **kwargs)
        rows, dropout = x.flatten(0, -2), self.lora_dropout[ADAPTER]
        if self.shared_input is not None and isinstance(dropout, torch.nn.Identity):
            reduced = self.shared_input.part(self, x)
        else:
            reduced = self.lora_A[ADAPTER](dropout(rows))
        # The product of two matrices is no view and is not kept for the backward pass, so it may be added to in place.
        result = self.base_layer(rows)
        result.addmm_(reduced, self.lora_B[ADAPTER].weight.t(), alpha=self.scaling[ADAPTER])
        return result.unflatten(0, x.shape[:-1])


def share_inputs(model: torch.nn.Module) -> int:
    """Let the adapters of a model that read one input compute their first product together.

    Returns:
        How many such sets there are.
    """
    found = 0
    for parent in model.modules():
        for names in SHARING:
            members = [getattr(parent, name, None) for name in names]
            members = [member for member in members if isinstance(member, LoraLinear)]
            if len(members) > 1:
                shared, found = SharedInput(parent, members), found + 1
                for member in members:
                    member.shared_input = shared
    return found
