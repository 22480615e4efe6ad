"""The weights under the adapters of R replicas, where zeroth order moves them: each replica's own, at its own rate.

Directions and moves are those of ``training.zeroth_order`` for the seed of a run's start, so that a replica is the
model which that trains alone. Weights of the candidate modules move, their biases stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybrid_lora_plugin.evidence.protocol import Run
from hybrid_lora_plugin.evidence.replicas.forward import TYPES, SharedParts, module_name
from hybrid_lora_plugin.training.zeroth_order.signs import signs
from hybrid_lora_plugin.training.zeroth_order.two_point import direction_seed


class FrozenWeights:
    """R copies of the base's linear layers.

    Attributes:
        held: type -> ``[L, R, d_out, d_in]``: the weights, and while a slope is measured ``w ± εz``.
    """

    def __init__(self, base: SharedParts, runs: Sequence[Run], epsilon: float, directions: int) -> None:
        """All at the base.

        Args:
            base: what the replicas share.
            runs: R; of each ``start.seed`` and ``zeroth_lr`` count.
            epsilon, directions: ε and K.
        """
        self.held = {type_: base.matrices[type_].unsqueeze(1).repeat(1, len(runs), 1, 1) for type_ in TYPES}
        self._layers, self._epsilon, self._directions = base.layers, epsilon, directions
        like = base.embedding
        self._rates = torch.tensor([run.zeroth_lr for run in runs], dtype=torch.float64, device=like.device)
        self._seeds = list(dict.fromkeys(run.start.seed for run in runs))
        self._of_seed = torch.tensor([self._seeds.index(run.start.seed) for run in runs], device=like.device)

    @torch.no_grad()
    def step(self, losses: Callable[[], Tensor], step: int) -> None:
        """Measure K slopes at the same weights, then move along each by the mean; see ``two_point_step``.

        Args:
            losses: of the replicas as they are held, ``[R]``.
            step: number of the optimizer step, from 0.
        """
        weights, moves = self.held, []
        for number in range(self._directions):
            z = self._direction(step, number)
            plus, minus = (self._measured(weights, z, sign * self._epsilon, losses) for sign in (1, -1))
            # In float64, and the length of a move in float32, as one model has them.
            slopes = (plus.double() - minus.double()) / (2 * self._epsilon)
            lengths = (self._rates / self._directions * slopes).float()
            moves.append((torch.where(lengths.isfinite(), lengths, 0.0), z))
        self.held = weights
        for lengths, z in moves:
            for type_, values in weights.items():
                values.sub_(lengths.to(values.dtype).view(1, -1, 1, 1) * z[type_])

    def _measured(
        self, weights: dict[str, Tensor], z: dict[str, Tensor], by: float, losses: Callable[[], Tensor]
    ) -> Tensor:
        self.held = {type_: torch.add(values, z[type_], alpha=by) for type_, values in weights.items()}
        return losses()

    def _direction(self, step: int, number: int) -> dict[str, Tensor]:
        """z of every replica, type -> ``[L, R, d_out, d_in]``."""
        found = {}
        for type_, values in self.held.items():
            stacked = torch.stack([self._of_layers(seed, step, number, type_) for seed in self._seeds], dim=1)
            found[type_] = stacked.to(values.dtype)[:, self._of_seed]
        return found

    def _of_layers(self, seed: int, step: int, number: int, type_: str) -> Tensor:
        """z of one start, ``[L, d_out, d_in]`` float32."""
        values = self.held[type_]
        of_direction, size = direction_seed(seed, step, number), values[0, 0].numel()
        names = [f"{module_name(layer, type_)}.weight" for layer in range(self._layers)]
        return torch.stack([signs(of_direction, name, 0, size, values.device).view(values.shape[2:]) for name in names])
