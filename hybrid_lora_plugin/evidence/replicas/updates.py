"""What R replicas of one base train, and how AdamW moves it: each replica its own modules, at its own two rates.

Every candidate of every replica is ``P + s·B·A``, with P the base's weight and B zero at first, or DoRA's
``m · (P + s·B·A) / ‖P + s·B·A‖``. Masks on the updates decide: P moves where the module is fully tuned, A, B and m
where it has an adapter, and nothing where it is frozen. As a module never has both, this is what ``training.apply``
trains one model at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_lora_plugin.evidence.protocol import Run
from hybrid_lora_plugin.evidence.replicas.forward import BIASED, TYPES, SharedParts, Weights, module_name
from hybrid_lora_plugin.evidence.replicas.frozen_weights import FrozenWeights
from hybrid_lora_plugin.seeding import generator_for

#: as verl's, and torch's default
BETAS, EPSILON = (0.9, 0.999), 1e-8
#: kinds of trained tensors, by the rate that they move at
FULL, LORA = "full", "lora"


def adapter_init(seed: int, name: str, rank: int, width: int) -> Tensor:
    """First value of A, ``[rank, width]`` float32: PEFT's, uniform in ±1/√width; B begins at 0.

    Args:
        seed: of the start; arms with one rank begin alike in every module that they adapt.
        name: of the module.
    """
    draws = generator_for(f"replicas/adapter/{seed}/{name}")
    return (2 * torch.rand(rank, width, generator=draws) - 1) / math.sqrt(width)


def factor_width(rank: int) -> int:
    """Rank of the factors that hold an adapter of ``rank``: the next power of two, 0 for 0.

    So that runs of many ranks train at once. What is beyond a run's own rank is 0 in A and B and has no gradient.
    """
    return 1 << (rank - 1).bit_length() if rank else 0


@dataclass
class Trained:
    """One stacked tensor that trains.

    Attributes:
        value, mean, square: the values ``[L, R, ...]`` and AdamW's moments.
        kind: ``full`` or ``lora``.
        mask: ``[L, R, 1 ...]``, 1 where it trains.
    """

    value: Tensor
    kind: str
    mask: Tensor
    mean: Tensor
    square: Tensor


class Replicas:
    """R runs of one base, of one LoRA rank, with or without DoRA: their parameters and optimizer."""

    def __init__(
        self,
        base: SharedParts,
        runs: Sequence[Run],
        lora_scale: float,
        weight_decay: float,
        clip_grad: float,
        zeroth_epsilon: float = 1e-3,
        zeroth_directions: int = 1,
    ) -> None:
        """All at the base, adapters included.

        Args:
            base: what they share.
            runs: of that base; ``factor_width(choice.rank)``, ``choice.dora`` and ``choice.zeroth`` are one.
            lora_scale: alpha / r.
            weight_decay, clip_grad: of AdamW, and the norm that each run's gradient is cut to.
            zeroth_epsilon, zeroth_directions: ε and K of runs with ``choice.zeroth``.
        """
        (self.rank,) = {factor_width(run.choice.rank) for run in runs}
        (self.dora,) = {run.choice.dora for run in runs}
        self.base, self.count, self.scale = base, len(runs), lora_scale
        self.weight_decay, self.clip_grad, self.steps = weight_decay, clip_grad, 0
        like = base.embedding
        self._rates = {
            FULL: torch.tensor([run.full_lr for run in runs], device=like.device, dtype=like.dtype),
            LORA: torch.tensor([run.lora_lr for run in runs], device=like.device, dtype=like.dtype),
        }
        chosen, left = [set(run.choice.full) for run in runs], [set(run.choice.frozen) for run in runs]
        full = self._masks(chosen)
        adapted = {type_: 1 - full[type_] - frozen for type_, frozen in self._masks(left).items()}
        self.trains_full, self.trains_lora = any(chosen), self.rank > 0
        (zeroth,) = {run.choice.zeroth for run in runs}
        self.frozen = FrozenWeights(base, runs, zeroth_epsilon, zeroth_directions) if zeroth else None
        self.trained: dict[tuple[str, str], Trained] = {}
        if self.trains_full:
            for type_ in TYPES:
                self._add((type_, "weight"), self._repeated(base.matrices[type_]), FULL, full[type_])
            for type_ in BIASED:
                self._add((type_, "bias"), self._repeated(base.biases[type_]), FULL, full[type_])
        self._adapted = {type_: mask == 1 for type_, mask in adapted.items()}
        if self.trains_lora:
            first = [(run.start.seed, run.choice.rank) for run in runs]
            for type_ in TYPES:
                adapts, (_, outputs, inputs) = adapted[type_], base.matrices[type_].shape
                a = self._first_factors(type_, first, inputs)
                self._add((type_, "A"), a, LORA, adapts)
                self._add((type_, "B"), like.new_zeros(base.layers, self.count, outputs, self.rank), LORA, adapts)
                if self.dora:
                    norms = torch.linalg.vector_norm(base.matrices[type_], dim=-1)  # [L, d_out]
                    self._add((type_, "magnitude"), self._repeated(norms), LORA, adapts)

    def _masks(self, named: Sequence[set[str]]) -> dict[str, Tensor]:
        """``[L, R]`` of each type: 1 where a run's names hold the module."""
        like = self.base.embedding
        return {
            type_: torch.tensor(
                [[module_name(layer, type_) in names for names in named] for layer in range(self.base.layers)],
                device=like.device,
                dtype=like.dtype,
            )
            for type_ in TYPES
        }

    def _repeated(self, values: Tensor) -> Tensor:
        """``[L, ...]`` as ``[L, R, ...]`` of their own."""
        return values.unsqueeze(1).repeat(1, self.count, *(1 for _ in values.shape[1:]))

    def _first_factors(self, type_: str, first: Sequence[tuple[int, int]], width: int) -> Tensor:
        """A of every layer and run, ``[L, R, rank, width]``, of (seed, rank) of each run."""
        like, drawn = self.base.embedding, {}
        for seed, rank in set(first):
            factors = torch.zeros(self.base.layers, self.rank, width)
            for layer in range(self.base.layers):
                factors[layer, :rank] = adapter_init(seed, module_name(layer, type_), rank, width)
            drawn[seed, rank] = factors
        return torch.stack([drawn[key] for key in first], dim=1).to(like.device, like.dtype)

    def _add(self, key: tuple[str, str], value: Tensor, kind: str, mask: Tensor) -> None:
        value = value.requires_grad_(True)
        mask = mask.view(*mask.shape, *(1 for _ in value.shape[2:]))
        zeros = torch.zeros_like
        self.trained[key] = Trained(value, kind, mask, zeros(value), zeros(value))

    def weights(self) -> Weights:
        """The linear layers as they are now, with a way back for gradients."""
        return Weights(
            {type_: self._matrix(type_) for type_ in TYPES},
            {
                type_: self.trained[type_, "bias"].value
                if self.trains_full
                else self.base.biases[type_].unsqueeze(1).expand(-1, self.count, -1)
                for type_ in BIASED
            },
        )

    def _matrix(self, type_: str) -> Tensor:
        if self.trains_full:
            plain = self.trained[type_, "weight"].value
        elif self.frozen is not None:
            plain = self.frozen.held[type_]
        else:
            plain = self.base.matrices[type_].unsqueeze(1).expand(-1, self.count, -1, -1)
        if not self.trains_lora:
            return plain
        a, b = self.trained[type_, "A"].value, self.trained[type_, "B"].value
        # B stays 0 where the module is fully tuned or frozen.
        updated = torch.baddbmm(plain.flatten(0, 1), b.flatten(0, 1), a.flatten(0, 1), alpha=self.scale)
        updated = updated.view_as(plain)
        if not self.dora:
            return updated
        norms = torch.linalg.vector_norm(updated.detach(), dim=-1)  # DoRA §4.3 has no gradient through it
        factor = self.trained[type_, "magnitude"].value / norms
        return torch.where(self._adapted[type_].unsqueeze(-1), factor, 1.0).unsqueeze(-1) * updated

    def step(self, losses: Tensor) -> None:
        """One AdamW step of every replica on its own loss.

        Args:
            losses: ``[R]``, of ``weights()``.
        """
        values = [tensor.value for tensor in self.trained.values()]
        gradients = torch.autograd.grad(losses.sum(), values)
        with torch.no_grad():
            factors = self._clip_factors(gradients)
            self.steps += 1
            for tensor, gradient in zip(self.trained.values(), gradients, strict=True):
                self._move(tensor, gradient, factors)

    def zeroth_step(self, losses_of: Callable[[Weights], Tensor]) -> None:
        """One zeroth-order step of the weights under the adapters, after ``step``; nothing without ``choice.zeroth``.

        Args:
            losses_of: weights -> ``[R]``, the losses of the step's own data.
        """
        if self.frozen is not None:
            self.frozen.step(lambda: losses_of(self.weights()), self.steps - 1)

    def _clip_factors(self, gradients: Sequence[Tensor]) -> Tensor:
        """``[R]``: what each run's gradient is multiplied by, as ``torch.nn.utils.clip_grad_norm_`` does."""
        squares = torch.zeros_like(self._rates[FULL])
        for tensor, gradient in zip(self.trained.values(), gradients, strict=True):
            each = torch.linalg.vector_norm(gradient.flatten(2), dim=-1).square()  # [L, R]
            squares = squares + (each * tensor.mask.flatten(1).view_as(each)).sum(dim=0)
        return (self.clip_grad / (squares.sqrt() + 1e-6)).clamp(max=1.0)

    def _move(self, tensor: Trained, gradient: Tensor, factors: Tensor) -> None:
        def over_replicas(values: Tensor) -> Tensor:
            return values.view(1, -1, *(1 for _ in tensor.value.shape[2:]))

        # torch/optim/adamw.py, with a rate a replica that is 0 where the module does not train.
        rate = over_replicas(self._rates[tensor.kind]) * tensor.mask
        gradient = gradient * over_replicas(factors)
        tensor.value.mul_(1 - rate * self.weight_decay)
        tensor.mean.lerp_(gradient, 1 - BETAS[0])
        tensor.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        correction = 1 - BETAS[0] ** self.steps
        root = math.sqrt(1 - BETAS[1] ** self.steps)
        denominator = (tensor.square.sqrt() / root).add_(EPSILON)
        tensor.value.sub_((tensor.mean / denominator).mul_(rate / correction))
