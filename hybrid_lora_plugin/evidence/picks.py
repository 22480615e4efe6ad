"""What each arm picked: how often each module, by type and by third of the depth, and how alike between seeds."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

from hybrid_lora_plugin.evidence.arms import PlannedArm
from hybrid_lora_plugin.evidence.comparison import Comparison
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
