"""One choice from probes of several seeds, and how far they agree.

A module's score is the mean of its ranks over the seeds: rank aggregation by Borda's count, as in ensembles of feature
selectors (Saeys, Abeel and Van de Peer 2008, "Robust feature selection using ensemble feature selection techniques").
Ranks and not scores, because the scale of a probe's scores follows how far its own warm-up went.

Measurements of seed number i are named ``seed_i/NAME``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_lora_plugin.allocation.budget import FULL, assign
from hybrid_lora_plugin.allocation.placement import placement_record, places_of
from hybrid_lora_plugin.allocation.schema import AgreementRecord, Allocation
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.errors import AllocationError
from hybrid_lora_plugin.scoring import Measured, ModuleScores, get_criterion, score_modules

METHOD = "mean rank"
_NAMED = re.compile(r"seed_(\d+)/(.+)")


def named_by_seed(measurements: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Measurements of several seeds under names of their own."""
    return {
        f"seed_{number}/{name}": tensor for number, each in enumerate(measurements) for name, tensor in each.items()
    }


def by_seed(measurements: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The reverse: the measurements of each seed, in order; those of a probe of one seed as they are.

    Raises:
        AllocationError: some are of a seed and some are not, or a seed is missing.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in measurements.items():
        if (match := _NAMED.fullmatch(name)) is not None:
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    if not found:
        return [dict(measurements)]
    if sum(map(len, found.values())) != len(measurements) or sorted(found) != list(range(len(found))):
        raise AllocationError(
            f"measurements: {', '.join(sorted(measurements))} are not those of seeds 0 to {len(found) - 1}; probe "
            f"again with hybrid-lora-probe"
        )
    return [found[number] for number in sorted(found)]


def score_each(config: Any, candidates: Sequence[Candidate], each: Sequence[Mapping[str, Tensor]]) -> ModuleScores:
    """The scores of one seed, or the consensus of several where anything was measured for the criterion.

    Args:
        config: a ``config.SelectionConfig``.
        candidates: the M candidates.
        each: measurements of each seed, ``[T, M]`` or ``[M]`` by name.

    Raises:
        ConfigurationError: as ``score_modules``.
    """
    used = each if get_criterion(config.criterion).method is not None else each[:1]
    scored = [
        score_modules(config.criterion, Measured(candidates, measured, config.control, config.normalise))
        for measured in used
    ]
    return scored[0] if len(scored) == 1 else consensus(scored)


def consensus(scored: Sequence[ModuleScores]) -> ModuleScores:
    """Mean rank of each module, 1 being the lowest score; equal scores share the mean of their ranks.

    Means and standard deviations are the means of those of the seeds. A module has a signal if it has one in every
    seed: where it has none its rank says nothing.
    """
    return ModuleScores(
        scores=torch.stack([_ranks(one.scores) for one in scored]).mean(dim=0),
        signal=torch.stack([one.signal for one in scored]).all(dim=0),
        means=torch.stack([one.means for one in scored]).mean(dim=0),
        stds=torch.stack([one.stds for one in scored]).mean(dim=0),
    )


def _ranks(scores: Tensor) -> Tensor:
    below = (scores[:, None] > scores[None, :]).sum(dim=1)
    equal = (scores[:, None] == scores[None, :]).sum(dim=1)
    return below.double() + (equal.double() + 1) / 2


def agreement(
    config: Any,
    candidates: Sequence[Candidate],
    each: Sequence[Mapping[str, Tensor]],
    direction: str,
    lora_rank: int,
    seeds: Sequence[int],
) -> AgreementRecord:
    """What each seed would choose alone, and how far two of them agree; nothing where the budget admits none of it.

    Args:
        config: a ``config.SelectionConfig``.
        candidates: the M candidates.
        each: measurements of each seed.
        direction: ``lowest`` or ``highest``.
        lora_rank: rank r of the adapters.
        seeds: as they were asked for.
    """
    chosen, places = [], places_of(placement_record(config.placement, candidates), candidates)
    for measured in each:
        scored = score_each(config, candidates, [measured])
        try:
            modules = assign(candidates, scored, config.budget, direction, lora_rank, places).modules
        except AllocationError:
            # Its first module may not fit where the first of all together does.
            modules = {}
        chosen.append([candidate.name for candidate in candidates if modules.get(candidate.name) == FULL])
    return AgreementRecord(METHOD, list(seeds), chosen, overlaps_of(chosen))


def overlaps_of(chosen: Sequence[Sequence[str]]) -> list[float]:
    """Jaccard index of each two choices: the first with each later one, then the second, and so on."""
    return [overlap(first, second) for first, second in itertools.combinations(chosen, 2)]


def overlap(first: Sequence, second: Sequence) -> float:
    """Jaccard index of two choices: what is in both over what is in either; 0 where both are empty."""
    either = set(first) | set(second)
    return len(set(first) & set(second)) / len(either) if either else 0.0


def times_chosen(allocation: Allocation) -> dict[str, int]:
    """How many seeds choose each module by themselves, by name; empty where there was one seed."""
    if allocation.agreement is None:
        return {}
    return {m.name: sum(m.name in chosen for chosen in allocation.agreement.chosen) for m in allocation.modules}


def agreement_in_words(allocation: Allocation) -> str:
    """How far the seeds agree, in a sentence; empty where there was one."""
    found = allocation.agreement
    if found is None:
        return ""
    times, count = list(times_chosen(allocation).values()), len(found.seeds)
    every, some = sum(time == count for time in times), sum(0 < time < count for time in times)
    mean = sum(found.overlaps) / len(found.overlaps)
    return (
        f"{count} seeds ({', '.join(map(str, found.seeds))}): {every} modules are chosen by all of them, {some} by "
        f"some; two choices overlap by {100 * mean:.0f} % on average (Jaccard), and random ones of their sizes by "
        f"{100 * _by_chance(found.chosen, len(times)):.0f} %"
    )


def _by_chance(chosen: Sequence[Sequence[str]], modules: int) -> float:
    """Mean over the pairs of the Jaccard index at the overlap that chance gives on average."""
    values = []
    for first, second in itertools.combinations(map(len, chosen), 2):
        both = first * second / modules
        values.append(both / (first + second - both) if both else 0.0)
    return sum(values) / len(values)
