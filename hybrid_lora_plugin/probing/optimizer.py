"""AdamW over named parameters, whose whole state can be written down and taken up again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


class NamedAdamW:
    """AdamW at a constant rate, without weight decay: it would pull e and alpha from 1 to 0, and the paper names none.

    Attributes:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], lr: float) -> None:
        """Make the parameters trainable."""
        self.parameters = dict(parameters)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, weight_decay=0.0)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One update from the gradients."""
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and both moments, under ``parameter/NAME``, ``exp_avg/NAME`` and ``exp_avg_sq/NAME``."""
        tensors = {f"parameter/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state = self._optimizer.state.get(parameter, {})
            tensors |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS if moment in state}
        return tensors

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``tensors`` gave after ``step`` updates; names of others are ignored."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"parameter/{name}"])
            if f"exp_avg/{name}" in tensors:
                moments = {moment: tensors[f"{moment}/{name}"].to(parameter.device).clone() for moment in _MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}

    def release(self) -> None:
        """Drop gradients and moments: scoring needs the memory, not them."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()
