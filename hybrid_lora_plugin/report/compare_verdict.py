"""Whether allocations agree, in words: against what chance gives, and what chance within types gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.report.compare import Comparison, Overlap, overlap
from hybrid_lora_plugin.report.groups import present_types

#: Chance is ruled out below this probability.
RARE = 0.01
#: Share of the smaller set in common from which on two choices agree, and not only in part.
MOST = 0.8


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence a pair, in the order of ``comparison.pairs``."""
    said = []
    for (i, j), pair in comparison.pairs.items():
        first, second = comparison.allocations[i], comparison.allocations[j]
        found = pair.overlap
        chance = f"{found.shared} in common, {found.chance:.1f} by chance"
        if abs(pair.chance_within_types - found.chance) > 0.05:
            chance += f" and {pair.chance_within_types:.1f} by chance within types"
        said.append(
            f"{comparison.labels[i]} ({found.first} modules) and {comparison.labels[j]} ({found.second}) "
            f"{agreement(found, _by_type(first, second))}: {chance}."
        )
    return said


def agreement(found: Overlap, by_type: Sequence[Overlap]) -> str:
    """What an overlap means.

    Args:
        found: over all candidates.
        by_type: the same, for each type of module.
    """
    if found.shared == found.first == found.second:
        return "choose the same modules"
    above, below = tails([found])
    if tails(by_type)[0] < RARE:
        return "agree" if found.of_smaller >= MOST else "agree in part"
    if above < RARE:
        return "prefer the same types of modules, and within them agree no more than chance"
    return "avoid each other's modules" if below < RARE else "agree no more than chance"


def tails(overlaps: Sequence[Overlap]) -> tuple[float, float]:
    """Probabilities that random choices share as much or more, and as much or less, in all parts together.

    Each part is hypergeometric: sets of the sizes that were chosen there, drawn at random among its modules.
    """
    total = np.ones(1)
    for part in overlaps:
        ways = math.comb(part.modules, part.second)
        shared = range(min(part.first, part.second) + 1)
        chosen = [math.comb(part.first, k) * math.comb(part.modules - part.first, part.second - k) for k in shared]
        total = np.convolve(total, [count / ways for count in chosen])
    seen = sum(part.shared for part in overlaps)
    return float(total[seen:].sum()), float(total[: seen + 1].sum())


def _by_type(first: Allocation, second: Allocation) -> list[Overlap]:
    return [
        overlap(first, second, frozenset(m.name for m in first.modules if m.type == type_))
        for type_ in present_types(first.modules)
    ]
