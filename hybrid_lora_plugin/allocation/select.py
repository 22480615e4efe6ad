"""From measurements to an allocation: criterion, normalisation and budget, and the record of all three.

The one place where scoring and budget meet; a probe and ``hybrid-lora-allocate`` both end here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hybrid_lora_plugin.allocation.budget import assign
from hybrid_lora_plugin.allocation.consensus import agreement, by_seed, score_each
from hybrid_lora_plugin.allocation.placement import placement_record, places_of
from hybrid_lora_plugin.allocation.schema import Allocation, ModelIdentity, ModuleRecord, ProbeRecord, SelectionRecord
from hybrid_lora_plugin.allocation.stability import bootstrap
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.errors import AllocationError
from hybrid_lora_plugin.scoring import get_criterion


def select_modules(
    config: Any,
    model: ModelIdentity,
    candidates: Sequence[Candidate],
    measurements: Mapping[str, Tensor],
    *,
    lora_rank: int,
    probe: ProbeRecord | None = None,
    environment: dict[str, str],
) -> Allocation:
    """Score the candidates, assign them within the budget, and say how sure that is.

    Args:
        config: a ``config.SelectionConfig``: criterion, direction, normalise, budget, placement and control.
        model: the model that was probed.
        candidates: the M candidates.
        measurements: by name, ``[T, M]`` or ``[M]`` float64; empty where nothing was probed; of several seeds named as
            ``consensus`` says, and then one choice is made of all.
        lora_rank: rank r of the adapters of the modules that stay LoRA.
        probe: how the measurements were made; None where nothing was.
        environment: versions to record.

    Returns:
        The allocation, ready for ``report.artifact.save_allocation``.

    Raises:
        ConfigurationError: no ranking can be made, a setting has no meaning here, or the budget admits no module.
    """
    criterion = get_criterion(config.criterion)
    direction = criterion.direction if config.direction == "auto" else config.direction
    each = by_seed(measurements)
    scored = score_each(config, candidates, each)
    if scored.fixed is not None and direction != criterion.direction:
        raise AllocationError(
            f"direction: {config.direction!r} has no effect on criterion {criterion.name!r}, which names its modules; "
            f"use direction=auto"
        )
    placement = placement_record(config.placement, candidates)
    assignment = assign(candidates, scored, config.budget, direction, lora_rank, places_of(placement, candidates))
    columns = zip(
        candidates,
        scored.means.tolist(),
        scored.stds.tolist(),
        scored.scores.tolist(),
        scored.signal.tolist(),
        strict=True,
    )
    return Allocation(
        model=model,
        selection=SelectionRecord(
            criterion=criterion.name,
            direction=direction,
            normalise=config.normalise,
            options={name: getattr(config.control, name) for name in criterion.options},
            placement=placement,
        ),
        budget=assignment.budget,
        modules=[
            ModuleRecord(
                **{spec.name: getattr(candidate, spec.name) for spec in dataclasses.fields(Candidate)},
                mean=mean,
                std=std,
                score=score,
                signal=signal,
                assignment=assignment.modules[candidate.name],
            )
            for candidate, mean, std, score, signal in columns
        ],
        environment=environment,
        probe=probe,
        stability=bootstrap(config, candidates, measurements, direction, lora_rank),
        # What nothing was measured for is the same whatever the seed.
        agreement=agreement(
            config, candidates, each, direction, lora_rank, [record.seed for record in (probe and probe.seeds) or ()]
        )
        if len(each) > 1 and criterion.method is not None
        else None,
    )
