"""What each arm picked: how often each module, by type and by third of the depth, and how alike between seeds."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from typing import Any

from hybrid_lora_plugin.allocation.placement import placement_in_words
from hybrid_lora_plugin.evidence.arms import PlannedArm, baseline_of
from hybrid_lora_plugin.evidence.comparison import Comparison
from hybrid_lora_plugin.evidence.placed import record_of
from hybrid_lora_plugin.report.groups import depth_thirds, present_types, short_type


def picked(comparison: Comparison, arm: PlannedArm, base: str) -> dict[str, float]:
    """Share of starts and draws in which an arm tunes each module of a base fully."""
    study = comparison.study
    starts = [start for start in study.starts(comparison.seeds) if start.base == base]
    counts = Counter(
        name for start in starts for draw in range(arm.draws) for name in study.full_names(arm, start, draw)
    )
    total = len(starts) * arm.draws
    return {candidate.name: counts[candidate.name] / total for candidate in study.prepared.candidates[base]}


def left(comparison: Comparison, arm: PlannedArm, base: str) -> dict[str, float]:
    """Share of starts and draws in which an arm leaves a module of a base frozen, of those that it does in some."""
    study = comparison.study
    starts = [start for start in study.starts(comparison.seeds) if start.base == base]
    counts = Counter(
        name for start in starts for draw in range(arm.draws) for name in study.frozen_names(arm, start, draw)
    )
    return {name: count / (len(starts) * arm.draws) for name, count in counts.items()}


def agreement(comparison: Comparison, arm: PlannedArm) -> float | None:
    """Mean Jaccard of what an arm picks with two seeds on the same base and task; None of one seed."""
    study = comparison.study
    found = []
    for base, task in study.cells:
        chosen = [
            set(study.full_names(arm, start, 0))
            for start in study.starts(comparison.seeds)
            if (start.base, start.task) == (base, task)
        ]
        found += [
            len(one & other) / len(one | other) for one, other in itertools.combinations(chosen, 2) if one | other
        ]
    return statistics.fmean(found) if found else None


def picks_table(comparison: Comparison) -> list[str]:
    """Markdown: mean number of fully tuned modules of each type and third, over all starts."""
    study = comparison.study
    arms = [arm for arm in study.arms if arm.selects]
    if not arms:
        return ["No arm selects modules."]
    types = present_types([one for found in study.prepared.candidates.values() for one in found])
    thirds = ("first third", "middle", "last third")
    lines = [
        "Mean number of fully tuned modules over starts and draws; *agreement* is the mean Jaccard between seeds on "
        "the same base and task.",
        "",
        "| arm | modules | " + " | ".join(map(short_type, types)) + " | " + " | ".join(thirds) + " | agreement |",
        "| --- | ---: |" + " ---: |" * (len(types) + len(thirds) + 1),
    ]
    for arm in arms:
        by_type, by_third, bases = Counter(), Counter(), study.plan.bases
        for base in bases:
            candidates, shares = study.prepared.candidates[base], picked(comparison, arm, base)
            parts = depth_thirds(max(one.layer for one in candidates) + 1)
            for one in candidates:
                share = shares[one.name] / len(bases)
                by_type[one.type] += share
                (third,) = (at for at, part in enumerate(parts) if one.layer in part)
                by_third[third] += share
        alike = agreement(comparison, arm) if arm.draws == 1 else None
        cells = [
            f"{sum(by_type.values()):.1f}",
            *(f"{by_type[type_]:.1f}" for type_ in types),
            *(f"{by_third[third]:.1f}" for third in range(len(thirds))),
            "–" if alike is None else f"{alike:.2f}",
        ]
        lines.append(f"| {arm.name} | " + " | ".join(cells) + " |")
    return lines


def frozen_content(comparison: Comparison) -> dict[str, dict[str, dict[str, Any]]]:
    """By arm and base, of the arms that leave modules frozen: their placement, and means of how many and how much.

    ``placement`` is by component, or None where only what takes no adapter is frozen; ``modules`` of ``of``, and
    ``parameters``, are means over starts and draws.
    """
    study, found = comparison.study, {}
    for arm in study.arms:
        for base in study.plan.bases:
            candidates = study.prepared.candidates[base]
            parameters, shares = {one.name: one.parameters for one in candidates}, left(comparison, arm, base)
            if shares:
                found.setdefault(arm.name, {})[base] = {
                    "placement": record_of(arm.placement, candidates),
                    "modules": sum(shares.values()),
                    "of": len(candidates),
                    "parameters": sum(share * parameters[name] for name, share in shares.items()),
                }
    return found


def frozen_table(comparison: Comparison) -> list[str]:
    """Markdown: where arms may train and what they leave frozen; empty where none leaves anything."""
    rows = [
        f"| {arm} | {base} | {_words(one['placement'])} | {one['modules']:.1f} of {one['of']} | "
        f"{one['parameters']:,.0f} |"
        for arm, by_base in frozen_content(comparison).items()
        for base, one in by_base.items()
    ]
    if not rows:
        return []
    return [
        "## What each arm left frozen",
        "",
        "Modules that got neither a gradient nor an adapter, means over starts and draws. Arms that are not here left "
        "none.",
        "",
        "| arm | base | placement | modules | parameters |",
        "| --- | --- | --- | ---: | ---: |",
        *rows,
        "",
    ]


def _words(record: dict[str, str] | None) -> str:
    return "modules that take no adapter frozen" if record is None else placement_in_words(record)


def baselines_in_words(comparison: Comparison) -> list[str]:
    """Which arm each is compared with as ``random``, where placements make that differ."""
    arms = comparison.study.arms
    if not any(arm.placement for arm in arms):
        return []
    pairs = [(arm.name, one.name) for arm in arms if (one := baseline_of(arms, arm)) not in (None, arm)]
    said = [
        f"`{baseline}` for {', '.join(f'`{name}`' for name, other in pairs if other == baseline)}"
        for baseline in dict.fromkeys(other for _, other in pairs)
    ]
    return [f"- *against random* is against {'; '.join(said)}."] if said else []
