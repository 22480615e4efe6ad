"""The table of criteria, and the one door through which they score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybrid_lora_plugin.errors import ConfigurationError, ScoringError
from hybrid_lora_plugin.scoring.measurements import SENSITIVITIES, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.normalise import type_zscore

METHODS = ("svd_lora", "full_delta", "adalora", "autolora", "lookahead", "weight_gradient", "features", "trial")

_CRITERIA: dict[str, Criterion] = {}


@dataclass(frozen=True)
class Criterion:
    """A way to score modules.

    Attributes:
        name: the value of ``criterion`` in the configuration.
        direction: ``lowest`` or ``highest``: which end is fully fine-tuned when the user says ``auto``.
        score: ``Measured -> ModuleScores``.
        needs: names of the measurements it reads.
        method: the probe method that measures them, one of ``METHODS``; None needs no probe.
        normalisable: whether any ``normalise`` other than ``none`` is meaningful.
        scale_free: whether dividing a module's measurements by a number leaves its score as it is.
        options: fields of ``ControlConfig`` that it reads.
        source: the paper or the reason it is here.
    """

    name: str
    direction: str
    score: Callable[[Measured], ModuleScores]
    needs: tuple[str, ...]
    method: str | None
    normalisable: bool
    scale_free: bool
    options: tuple[str, ...]
    source: str


def register_criterion(
    name: str,
    *,
    direction: str,
    source: str,
    needs: tuple[str, ...] = (SENSITIVITIES,),
    method: str | None = "svd_lora",
    normalisable: bool = True,
    scale_free: bool = False,
    options: tuple[str, ...] = (),
) -> Callable[[Callable], Callable]:
    """Decorator that puts a scoring function into the table; the arguments are the fields of ``Criterion``.

    Example:
        >>> @register_criterion("mean", direction="lowest", source="the simplest control")
        ... def score(measured):
        ...     series = measured.series("sensitivities")  # [T, M]
        ...     return ModuleScores.of_series(series.mean(dim=0), series)

    Raises:
        ValueError: the name is taken, or the direction or the method is not one there is.
    """
    if direction not in ("lowest", "highest"):
        raise ValueError(f"criterion {name!r}: direction {direction!r}; give 'lowest' or 'highest'")
    if method is not None and method not in METHODS:
        raise ValueError(f"criterion {name!r}: method {method!r}; give None or one of {', '.join(METHODS)}")
    if name in _CRITERIA:
        raise ValueError(f"criterion {name!r} is registered already; choose another name")

    def keep(score: Callable[[Measured], ModuleScores]) -> Callable[[Measured], ModuleScores]:
        _CRITERIA[name] = Criterion(name, direction, score, needs, method, normalisable, scale_free, options, source)
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


def score_modules(name: str, measured: Measured) -> ModuleScores:
    """Score every module by a criterion and normalise as ``measured.normalise`` says.

    Whether a module has a signal is decided before ``type_zscore``, where 0 is an ordinary score.

    Args:
        name: of the criterion.
        measured: what it reads, with the M candidates.

    Returns:
        Scores, signal and moments, each ``[M]``.

    Raises:
        ConfigurationError: an unknown criterion, a normalisation without meaning for it, a missing or unusable
            measurement, or a score that is not finite.
    """
    criterion = get_criterion(name)
    _check_normalisation(criterion, measured.normalise)
    for need in criterion.needs:
        measured.require(need, criterion.name)
    result = criterion.score(measured)
    if measured.normalise == "type_zscore":
        result = dataclasses.replace(result, scores=type_zscore(result.scores, measured.candidates))
    bad = (~torch.isfinite(result.scores)).nonzero().flatten().tolist()
    if bad:
        raise ScoringError(
            f"criterion: {name!r} gives {result.scores[bad[0]].item()} for {measured.candidates[bad[0]].name} "
            f"({len(bad)} such modules); choose another criterion, or probe with model.dtype=float32"
        )
    return result


def _check_normalisation(criterion: Criterion, normalise: str) -> None:
    if normalise == "none":
        return
    if not criterion.normalisable:
        raise ScoringError(
            f"normalise: {normalise!r} has no meaning for criterion {criterion.name!r}; use normalise=none"
        )
    if criterion.scale_free and normalise in ("sqrt_dims", "delta_norm"):
        raise ScoringError(
            f"normalise: {normalise!r} has no effect on criterion {criterion.name!r}, a ratio in which any divisor of "
            f"the module cancels; use normalise=none or normalise=type_zscore"
        )
