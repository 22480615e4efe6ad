"""The table of criteria, each with the end of its score that goes to full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hybrid_lora_plugin.config import ConfigurationError

_CRITERIA: dict[str, Criterion] = {}


@dataclass(frozen=True)
class Criterion:
    """A way to score modules.

    Attributes:
        name: the value of ``criterion`` in the configuration.
        direction: ``lowest`` or ``highest``: which end is fully fine-tuned when the user says ``auto``.
        score: ``sensitivities [T, M] -> scores [M]``.
    """

    name: str
    direction: str
    score: Callable[[Tensor], Tensor]


def register_criterion(name: str, *, direction: str) -> Callable[[Callable], Callable]:
    """Decorator that puts a scoring function into the table.

    Example:
        >>> @register_criterion("mean", direction="lowest")
        ... def mean_score(sensitivities):  # [T, M] -> [M]
        ...     return sensitivities.double().mean(dim=0)

    Raises:
        ValueError: the name is taken or the direction is neither ``lowest`` nor ``highest``.
    """
    if direction not in ("lowest", "highest"):
        raise ValueError(f"criterion {name!r}: direction {direction!r}; give 'lowest' or 'highest'")
    if name in _CRITERIA:
        raise ValueError(f"criterion {name!r} is registered already; choose another name")

    def keep(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        _CRITERIA[name] = Criterion(name, direction, score)
        return score

    return keep


def get_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ConfigurationError: there is none; the message lists those there are.
    """
    if name not in _CRITERIA:
        raise ConfigurationError(f"criterion: {name!r} is unknown; choose one of {', '.join(sorted(_CRITERIA))}")
    return _CRITERIA[name]
