"""From measurements to a decision: criterion, normalisation, budget, and the record of all three.

The one place where scoring and budget meet; a probe and ``hybrid-lora-allocate`` both end here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hybrid_lora_plugin.allocation.budget import allocate
from hybrid_lora_plugin.allocation.storage import (
    Allocation,
    BudgetRecord,
    CriterionRecord,
    ModelIdentity,
    ModuleRecord,
)
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ControlConfig
from hybrid_lora_plugin.errors import AllocationError
from hybrid_lora_plugin.scoring import Criterion, Measured, get_criterion, score_modules


def select_modules(
    config: Any,
    model: ModelIdentity,
    probe: CriterionRecord,
    candidates: Sequence[Candidate],
    measurements: Mapping[str, Tensor],
    *,
    environment: dict[str, str],
) -> Allocation:
    """Score the candidates and assign them within the budget.

    Args:
        config: anything with ``criterion``, ``direction``, ``normalise``, ``budget`` and ``control``.
        model: the model that was probed.
        probe: the settings of the probe; name, direction, normalise and options are replaced. Its rank r is that
            of the adapters in mode ``total_trainable``.
        candidates: the M candidates.
        measurements: by name, ``[T, M]`` or ``[M]`` float64.
        environment: versions to record.

    Returns:
        The allocation, ready for ``save_allocation``.

    Raises:
        ConfigurationError: no ranking can be made, a setting has no meaning here, or the budget admits no module.
    """
    criterion = get_criterion(config.criterion)
    direction = criterion.direction if config.direction == "auto" else config.direction
    measured = Measured(candidates, measurements, config.control, config.normalise)
    scored = score_modules(config.criterion, measured)
    if scored.fixed is not None and direction != criterion.direction:
        raise AllocationError(
            f"direction: {config.direction!r} has no effect on criterion {criterion.name!r}, which names its modules; "
            f"use direction=auto"
        )
    assignment = allocate(
        candidates,
        scored.scores,
        config.budget,
        direction,
        scored.signal,
        scored.means,
        rank=probe.rank,
        fixed=scored.fixed,
    )
    modules = [
        ModuleRecord(
            **dataclasses.asdict(candidate),
            mean=float(scored.means[index]),
            std=float(scored.stds[index]),
            score=float(scored.scores[index]),
            signal=bool(scored.signal[index]),
            assignment=assignment.modules[candidate.name],
        )
        for index, candidate in enumerate(candidates)
    ]
    return Allocation(
        model=model,
        criterion=dataclasses.replace(
            probe,
            name=criterion.name,
            direction=direction,
            normalise=config.normalise,
            options=_options(criterion, probe.options, config.control),
        ),
        budget=BudgetRecord(
            mode=assignment.mode,
            ratio=assignment.ratio,
            overflow=config.budget.overflow,
            limit=assignment.limit,
            used=assignment.used,
        ),
        modules=modules,
        environment=environment,
    )


def _options(criterion: Criterion, recorded: dict, control: ControlConfig) -> dict:
    """The options of the probe, and of ``control`` those that this criterion reads."""
    # An artifact of `random` records its seed; read off anew by another criterion, it has none.
    controls = {spec.name for spec in dataclasses.fields(ControlConfig)}
    kept = {name: value for name, value in recorded.items() if name not in controls}
    return kept | {name: getattr(control, name) for name in criterion.options}
