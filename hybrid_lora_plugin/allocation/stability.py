"""How sure a choice of modules is: a bootstrap over the validation batches that an artifact holds, without a model.

Of T batches T are drawn with replacement, the modules are scored and chosen again, and that many times. It tells what
other batches of the same rows would have chosen. It says nothing of another warm-up, other rows or another seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_lora_plugin.allocation.budget import FULL, assign
from hybrid_lora_plugin.allocation.consensus import by_seed, score_each
from hybrid_lora_plugin.allocation.placement import placement_record, places_of
from hybrid_lora_plugin.allocation.schema import Allocation, ModuleRecord, StabilityRecord
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.scoring import get_criterion

DRAWS, SEED = 200, 0
#: Share of draws from which on a module is certain; below the rest to 1 it is out.
DECIDED = 0.95
CERTAIN, EDGE, OUT = "certain", "on the edge", "out"
#: of the scores that the draws gave
QUANTILES = (0.05, 0.95)


def bootstrap(
    config: Any, candidates: Sequence[Candidate], measurements: Mapping[str, Tensor], direction: str, lora_rank: int
) -> StabilityRecord | None:
    """Choose again from batches drawn with replacement.

    Draws of one batch alone have no spread and are drawn again; so are those that the criterion or the budget refuses.

    Args:
        config: a ``config.SelectionConfig``, as of ``select_modules``.
        candidates: the M candidates.
        measurements: by name, ``[T, M]`` or ``[M]``; those without batches are the same in each draw.
        direction: ``lowest`` or ``highest``.
        lora_rank: rank r of the adapters.

    Returns:
        What the draws chose, or None where there is nothing to draw from: the criterion reads no series, or T is 1.

    Raises:
        ConfigurationError: never for a selection that ``select_modules`` makes.
    """
    needs, each = get_criterion(config.criterion).needs, by_seed(measurements)
    counts = []
    for measured in each:
        batches = {len(measured[name]) for name in needs if name in measured and measured[name].ndim == 2}
        if len(batches) != 1 or batches == {1}:
            return None
        counts += batches
    places = places_of(placement_record(config.placement, candidates), candidates)
    generator = torch.Generator().manual_seed(SEED)
    chosen, scores, failed = torch.zeros(len(candidates), dtype=torch.float64), [], 0
    while len(scores) < DRAWS and failed < DRAWS:
        rows = [torch.randint(count, (count,), generator=generator) for count in counts]
        if any((drawn == drawn[0]).all() for drawn in rows):
            continue
        drawn = [
            {name: t[row] if t.ndim == 2 and len(t) == len(row) else t for name, t in measured.items()}
            for measured, row in zip(each, rows, strict=True)
        ]
        try:
            scored = score_each(config, candidates, drawn)
            assignment = assign(candidates, scored, config.budget, direction, lora_rank, places)
        except ConfigurationError:
            failed += 1
            continue
        chosen += torch.tensor([assignment.modules[candidate.name] == FULL for candidate in candidates])
        scores.append(scored.scores)
    if not scores:
        return None
    low, high = torch.stack(scores).quantile(torch.tensor(QUANTILES, dtype=torch.float64), dim=0).tolist()
    return StabilityRecord(
        draws=len(scores), batches=sum(counts), seed=SEED, shares=(chosen / len(scores)).tolist(), low=low, high=high
    )


def is_decided(share: float, chosen: bool) -> bool:
    """Whether nearly all draws do with a module, chosen in ``share`` of them, what was done with it."""
    return share >= DECIDED if chosen else share <= round(1 - DECIDED, 9)


def shares_of(allocation: Allocation) -> dict[str, float]:
    """Share of the draws that chose each module, by name; empty where nothing was drawn."""
    if allocation.stability is None:
        return {}
    return {m.name: share for m, share in zip(allocation.modules, allocation.stability.shares, strict=True)}


def by_standing(allocation: Allocation) -> dict[str, list[ModuleRecord]]:
    """The modules that are ``certain`` (chosen, and in nearly every draw), ``out`` (not, and in nearly none) or ``on
    the edge``, in model order; empty where nothing was drawn.
    """
    shares = shares_of(allocation)
    groups = {name: [] for name in (CERTAIN, EDGE, OUT)} if shares else {}
    for module in allocation.modules if shares else ():
        share, is_full = shares[module.name], module.assignment == FULL
        groups[(CERTAIN if is_full else OUT) if is_decided(share, is_full) else EDGE].append(module)
    return groups


def in_words(allocation: Allocation) -> str:
    """How sure the choice is, in half a sentence; empty where nothing was drawn."""
    groups = by_standing(allocation)
    if not groups:
        return ""
    chosen, drawn = len(allocation.full_names), allocation.stability
    return (
        f"{len(groups[CERTAIN])} of the {chosen} are certain, {len(groups[EDGE])} modules are on the edge and "
        f"{len(groups[OUT])} out, by {drawn.draws} draws from the {drawn.batches} validation batches"
    )
