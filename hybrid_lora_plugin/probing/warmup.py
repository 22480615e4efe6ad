"""The warm-up of the probe: AdamW at a constant rate on A, B, e and alpha (paper Algorithm 1, §4.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.probing.errors import ProbeError
from hybrid_lora_plugin.probing.loss import Batch, response_loss
from hybrid_lora_plugin.probing.svd_lora import SvdLoraLinear

_PARAMETERS = ("A", "B", "e", "alpha")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Warmup:
    """The optimizer with its position; ``tensors`` and ``load`` make it resumable bit for bit.

    Attributes:
        step: optimizer steps taken.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SvdLoraLinear], lr: float) -> None:
        """Make A, B, e and alpha of all layers trainable; dropout of the model is off throughout."""
        self.step = 0
        self._model = model.eval()
        self._named = {
            f"{name}.{which}": getattr(layer, which) for name, layer in layers.items() for which in _PARAMETERS
        }
        for parameter in self._named.values():
            parameter.requires_grad_(True)
        # No weight decay: it would pull e and alpha from 1 to 0, and the paper names none.
        self._optimizer = torch.optim.AdamW(self._named.values(), lr=lr, weight_decay=0.0)

    def run(self, batch: Batch) -> float:
        """One optimizer step.

        Args:
            batch: ``[B, S]``.

        Returns:
            The loss before the step.

        Raises:
            ProbeError: the loss is NaN or infinite.
        """
        self._optimizer.zero_grad(set_to_none=True)
        loss = response_loss(self._model, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise ProbeError(
                f"probe.lr: the loss is {value} at warm-up step {self.step + 1}; lower probe.lr, use model.dtype=float32 "
                f"or check that the checkpoint is sound"
            )
        loss.backward()
        self._optimizer.step()
        self.step += 1
        return value

    def tensors(self) -> dict[str, Tensor]:
        """Everything a continuation needs: adapter parameters and both AdamW moments, all float32."""
        tensors = {f"parameter/{name}": parameter.detach() for name, parameter in self._named.items()}
        for name, parameter in self._named.items():
            state = self._optimizer.state.get(parameter, {})
            tensors |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS if moment in state}
        return tensors

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``tensors`` gave after ``step`` steps."""
        self.step = step
        for name, parameter in self._named.items():
            parameter.data.copy_(tensors[f"parameter/{name}"])
            if f"exp_avg/{name}" in tensors:
                moments = {moment: tensors[f"{moment}/{name}"].to(parameter.device).clone() for moment in _MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}

    def release(self) -> None:
        """Drop gradients and moments: scoring needs the memory, not them."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()


def check_trained(layers: Mapping[str, SvdLoraLinear]) -> None:
    """Refuse adapters whose sensitivities would all be 0 by construction.

    Raises:
        ProbeError: ``max|B|`` or ``max|e|`` over all modules is 0, or a parameter is not finite.
    """
    for which in ("B", "e"):
        largest = max(float(getattr(layer, which).detach().abs().max()) for layer in layers.values())
        if math.isnan(largest) or math.isinf(largest):
            raise ProbeError(f"probe.lr: the warm-up left {largest} in {which}; lower probe.lr")
        if largest == 0:
            raise ProbeError(
                f"probe.warmup_steps: max|{which}| is 0 after the warm-up, so every sensitivity would be 0; "
                f"give probe.warmup_steps of at least 1 (500 in the paper)"
            )
