"""Rates of fully tuned modules beside the one of their group: a factor for each type, and a warm-up of their own.

An optimizer of ``torch.optim`` moves a weight by its rate times what does not depend on the rate, decay included, so a
move that is scaled afterwards is that of a scaled rate. Groups, optimizer states and checkpoints stay as they are, and
a run may resume under other factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hybrid_lora_plugin.errors import ConfigurationError


def factors_of(given: Iterable[str]) -> dict[str, float]:
    """``hybrid_lora.full_lr_factors``, whose form ``config`` checks: ``["q_proj:0.1"]`` as ``{"q_proj": 0.1}``."""
    return {kind: float(factor) for kind, _, factor in (entry.partition(":") for entry in given)}


class FullRate:
    """What scales the rate of each fully tuned weight.

    Args:
        factors: type of module, the last part of its name, to factor; 1 for every other.
        warmup_steps: N; the rate of all full modules rises linearly over the first N steps of verl's schedule.
        names: plain names of the P trained parameters, in the order of ``scale``.

    Raises:
        ConfigurationError: a factor for a type of which no module is fully tuned.
    """

    def __init__(self, factors: Mapping[str, float], warmup_steps: int, names: Sequence[str]):
        types = [name.rpartition(".")[0].rpartition(".")[2] for name in names]
        if unknown := sorted(set(factors) - set(types)):
            raise ConfigurationError(
                f"hybrid_lora.full_lr_factors: {unknown[0]!r} is no type of a module that this allocation tunes fully; "
                f"give some of {', '.join(sorted(set(types)))}",
                see="option-not-usable",
            )
        self._of_types = dict(factors)
        self._factors = [factors.get(kind, 1.0) for kind in types]
        self._warmup_steps = warmup_steps

    def warmed(self, step: int) -> float:
        """The part of the rate that step ``step`` of the schedule, from 0, has."""
        return min(1.0, (step + 1) / self._warmup_steps) if self._warmup_steps else 1.0

    def of_types(self, step: int) -> dict[str, float]:
        """Type -> all of its factor at a step, of the types that have one of their own."""
        return {kind: factor * self.warmed(step) for kind, factor in self._of_types.items()}

    @torch.no_grad()
    def scale(self, before: Sequence[Tensor], after: Sequence[Tensor], step: int) -> None:
        """Scale how far each weight has moved.

        Args:
            before: P tensors, the weights before the optimizer's step.
            after: the same weights after it; changed in place.
            step: of the schedule, from 0.
        """
        warmed = self.warmed(step)
        for old, new, factor in zip(before, after, self._factors, strict=True):
            if factor * warmed != 1:
                # old + f·(new − old), without a copy of either.
                new.lerp_(old, 1 - factor * warmed)
