"""How far allocations of one model agree: the overlap of what they fully fine-tune, and of their order.

Pure functions over loaded allocations; ``compare_tables`` and ``compare_plot`` show the result.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.errors import AllocationError
from hybrid_lora_plugin.report.groups import module_groups, present_types
from hybrid_lora_plugin.report.ranking import FEWEST_FOR_RANKS, by_preference, chosen_by_rule, spearman


@dataclass(frozen=True)
class Overlap:
    """Two sets of fully fine-tuned modules, A and B, among ``modules`` candidates.

    Attributes:
        shared, first, second: ``|A ∩ B|``, ``|A|``, ``|B|`` in modules.
        shared_parameters, first_parameters, second_parameters: the same in parameters.
        modules: M, the candidates that both chose from.
    """

    shared: int
    first: int
    second: int
    shared_parameters: int
    first_parameters: int
    second_parameters: int
    modules: int

    @property
    def chance(self) -> float:
        """Mean of ``|A ∩ B|`` if both were drawn at random at their sizes (hypergeometric): ``|A| |B| / M``."""
        return self.first * self.second / self.modules

    @property
    def jaccard(self) -> float | None:
        """``|A ∩ B| / |A ∪ B|``; None if both are empty."""
        return _share(self.shared, self.first + self.second - self.shared)

    @property
    def of_smaller(self) -> float | None:
        """``|A ∩ B|`` as a share of the smaller set; None if it is empty."""
        return _share(self.shared, min(self.first, self.second))

    @property
    def jaccard_parameters(self) -> float | None:
        """``jaccard`` with every module counted by its parameters."""
        return _share(self.shared_parameters, self.first_parameters + self.second_parameters - self.shared_parameters)

    @property
    def of_smaller_parameters(self) -> float | None:
        """``of_smaller`` with every module counted by its parameters."""
        return _share(self.shared_parameters, min(self.first_parameters, self.second_parameters))


@dataclass(frozen=True)
class RankAgreement:
    """Spearman's correlation of two orders of preference, or why there is none.

    Attributes:
        value: in [-1, 1]; None where it is not defined.
        modules: the modules with a signal in both, over which it is taken.
        reason: why ``value`` is None.
    """

    value: float | None
    modules: int
    reason: str | None = None


@dataclass(frozen=True)
class Pair:
    """What two allocations have in common.

    Attributes:
        overlap: over all candidates.
        chance_within_types: mean overlap of random choices that keep each allocation's number per type.
        groups: the overlap within each group of ``Comparison.groups``.
        ranks: agreement of the orders of preference.
    """

    overlap: Overlap
    chance_within_types: float
    groups: dict[str, Overlap]
    ranks: RankAgreement


@dataclass(frozen=True)
class Comparison:
    """Two or more allocations of one model and every pair of them.

    Attributes:
        labels: one text an allocation.
        allocations: as loaded.
        groups: group title -> module names, see ``groups.module_groups``.
        pairs: ``(i, j)`` with ``i < j`` -> what allocations i and j have in common.
    """

    labels: list[str]
    allocations: list[Allocation]
    groups: dict[str, frozenset[str]]
    pairs: dict[tuple[int, int], Pair]

    @property
    def letters(self) -> list[str]:
        """A short sign for each allocation: A, B, C, ..."""
        signs = list(string.ascii_uppercase)
        return [signs[i] if i < len(signs) else str(i + 1) for i in range(len(self.allocations))]

    @property
    def full_in_all(self) -> frozenset[str]:
        """The modules that every allocation fully fine-tunes."""
        return frozenset.intersection(*(frozenset(a.full_names) for a in self.allocations))


def make_labels(allocations: Sequence[Allocation], paths: Sequence[str | Path]) -> list[str]:
    """Criterion, normalisation unless ``none``, and the folder's name where that does not tell them apart."""
    plain = []
    for allocation in allocations:
        name, normalise = allocation.selection.criterion, allocation.selection.normalise
        plain.append(name if normalise == "none" else f"{name}, {normalise}")
    count = Counter(plain)
    folders = []
    for path in map(Path, paths):
        folders.append((path.parent if path.suffix == ".json" else path).resolve().name)
    return [label if count[label] == 1 else f"{label} ({folder})" for label, folder in zip(plain, folders, strict=True)]


def compare(allocations: Sequence[Allocation], labels: Sequence[str]) -> Comparison:
    """Compare allocations of one model, pair by pair.

    Args:
        allocations: two or more, each from ``load_allocation``.
        labels: one for each; messages name allocations by it.

    Raises:
        AllocationError: fewer than two, or they are not of one model.
    """
    allocations, labels = list(allocations), list(labels)
    if len(allocations) < 2:
        raise AllocationError(
            f"allocations: {len(allocations)} given, 2 or more are wanted; write allocations=[FOLDER,FOLDER]"
        )
    for allocation, label in zip(allocations[1:], labels[1:], strict=True):
        _require_one_model(allocations[0], allocation, labels[0], label)
    first = allocations[0]
    groups = module_groups(first.modules, first.model.num_layers)
    pairs = {
        (i, j): _pair(allocations[i], allocations[j], (labels[i], labels[j]), groups)
        for i, j in combinations(range(len(allocations)), 2)
    }
    return Comparison(labels, allocations, groups, pairs)


def overlap(first: Allocation, second: Allocation, among: frozenset[str] | None = None) -> Overlap:
    """The overlap of what two allocations of one model fully fine-tune.

    Args:
        first, second: allocations with the same modules.
        among: count only modules of these names; None counts all.
    """
    parameters = {m.name: m.parameters for m in first.modules if among is None or m.name in among}
    a, b = (parameters.keys() & set(allocation.full_names) for allocation in (first, second))
    sizes = [sum(parameters[name] for name in names) for names in (a & b, a, b)]
    return Overlap(len(a & b), len(a), len(b), *sizes, modules=len(parameters))


def rank_agreement(first: Allocation, second: Allocation, labels: tuple[str, str]) -> RankAgreement:
    """Spearman's correlation of the orders in which two allocations prefer modules for full fine-tuning.

    The sign of a score follows its criterion's direction, so 1 means the same order even if one criterion takes
    its lowest scores first and the other its highest. Taken over the modules with a signal in both.
    """
    scores = []
    for allocation, label in zip((first, second), labels, strict=True):
        if not by_preference(allocation):
            why = "chooses without scores" if chosen_by_rule(allocation) else "gives all modules one score"
            return RankAgreement(None, 0, f"{label} {why}")
        sign = -1 if allocation.selection.direction == "lowest" else 1
        scores.append({m.name: sign * m.score for m in allocation.modules if m.signal})
    common = [name for name in scores[0] if name in scores[1]]
    if len(common) < FEWEST_FOR_RANKS:
        return RankAgreement(
            None, len(common), f"{' and '.join(labels)} have a signal in {len(common)} modules in common"
        )
    value = spearman(*([values[name] for name in common] for values in scores))
    reason = None if value is not None else f"{' or '.join(labels)} gives one score to all modules in common"
    return RankAgreement(value, len(common), reason)


def _pair(first: Allocation, second: Allocation, labels: tuple[str, str], groups: dict[str, frozenset[str]]) -> Pair:
    of_type = [
        overlap(first, second, frozenset(m.name for m in first.modules if m.type == type_))
        for type_ in present_types(first.modules)
    ]
    return Pair(
        overlap=overlap(first, second),
        chance_within_types=sum(part.chance for part in of_type),
        groups={title: overlap(first, second, names) for title, names in groups.items()},
        ranks=rank_agreement(first, second, labels),
    )


def _require_one_model(first: Allocation, other: Allocation, first_label: str, other_label: str) -> None:
    mine, theirs = ({m.name: m.parameters for m in allocation.modules} for allocation in (first, other))
    if mine.keys() != theirs.keys():
        odd = min(mine.keys() ^ theirs.keys())
        difference = f"{len(mine)} modules against {len(theirs)}, {odd} is in only one of them"
    elif mine != theirs:
        odd = next(name for name in mine if mine[name] != theirs[name])
        difference = f"{odd} has {mine[odd]:,} parameters against {theirs[odd]:,}"
    elif first.model.config_sha256 != other.model.config_sha256:
        difference = f"config_sha256 {first.model.config_sha256[:12]} against {other.model.config_sha256[:12]}"
    else:
        return
    raise AllocationError(
        f"allocations: {first_label} is for {first.model.name_or_path!r} and {other_label} for "
        f"{other.model.name_or_path!r}: {difference}; give allocations of one model"
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
