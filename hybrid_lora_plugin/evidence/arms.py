"""The arms of a plan: what each name stands for, with its draws and budgets."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrid_lora_plugin.candidates import TYPE_ORDER, Candidate
from hybrid_lora_plugin.config_evidence import EvidencePlanConfig
from hybrid_lora_plugin.config_selection import CRITERIA, NAMING, PLACEMENT_PRESETS
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.draws import stratified_draw
from hybrid_lora_plugin.evidence.placed import (
    OPTION,
    Placement,
    as_options,
    left_to_a_criterion,
    placement_in,
    read_placement,
    refuse_placement,
)
from hybrid_lora_plugin.evidence.protocol import ZEROTH, Arm, Start
from hybrid_lora_plugin.evidence.tuning import rates_of
from hybrid_lora_plugin.scoring import get_criterion

RANDOM, STRATIFIED = "random", "random_stratified"
LORA, LORA_MATCHED, LORA_FLOPS, DORA, FULL = "lora", "lora_matched", "lora_flops", "dora", "full"
#: LoRA with as many more steps as the forward passes of ``zeroth_order`` cost
LORA_PASSES = "lora_passes"
#: roles whose steps follow from the FLOPs of other runs
MATCHED_STEPS = (LORA_FLOPS, LORA_PASSES)
REVERSED, ONLY = ":reversed", "only:"
#: Criteria with no arm out of the box: ``explicit`` needs names, ``spread`` is ``only:TYPE`` here, and ``trial`` rates.
_NO_ARM = ("explicit", "spread", "trial")


@dataclass(frozen=True)
class PlannedArm:
    """One row of the tables.

    Attributes:
        name: with ``@RATIO`` behind it where the plan has several budgets.
        kind: one of ``protocol.KINDS``.
        selection: options of a ``hybrid`` arm, ``budget.ratio`` with them; empty otherwise.
        rank: LoRA rank; of ``lora_matched`` it follows from the arm it is matched to.
        draws: how many; 1 but for random arms.
        budget: ratio of a ``hybrid`` arm, and of the one that ``lora_matched`` and ``lora_flops`` are matched to; None
            where there is none.
        role: ``random``, ``random_stratified``, ``lora_matched``, ``lora_flops`` or ``lora_passes``, or "" where
            nothing is special.
        placement: where it may train, as ``placed.read_placement`` gives it; empty where that is everywhere.
    """

    name: str
    kind: str
    selection: tuple[tuple[str, Any], ...] = ()
    rank: int = 0
    draws: int = 1
    budget: float | None = None
    role: str = ""
    placement: Placement = ()

    @property
    def selects(self) -> bool:
        """Whether the protocol chooses its modules."""
        return self.kind == "hybrid"

    def draw_name(self, draw: int) -> str:
        """Name of one draw; the arm's own where it has one draw."""
        return self.name if self.draws == 1 else f"{self.name}/{draw}"

    def at(self, start: Start, draw: int, candidates: Sequence[Candidate]) -> Arm:
        """The arm as a protocol chooses for it at one start.

        Args:
            start: where; it decides a random arm's seed.
            draw: from 0.
            candidates: of the start's base.
        """
        selection = dict(self.selection)
        if self.role == RANDOM:
            selection["control.seed"] = _seed(start, draw, RANDOM)
        elif self.role == STRATIFIED:
            there = left_to_a_criterion(self.placement, candidates)
            drawn = stratified_draw(there, selection.pop("budget.ratio"), _seed(start, draw, STRATIFIED))
            # Named, so that neither the budget nor its overflow applies.
            selection = {"criterion": "explicit", "control.modules": drawn} | as_options(self.placement)
        return Arm(self.draw_name(draw), self.kind, selection, self.rank, draw)


def _seed(start: Start, draw: int, purpose: str) -> int:
    text = f"{purpose}/{start.base}/{start.task}/{start.seed}/{draw}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def planned_arms(plan: EvidencePlanConfig, candidates: Iterable[Sequence[Candidate]]) -> list[PlannedArm]:
    """The arms of a plan, in the order of its tables.

    Args:
        plan: that was checked.
        candidates: of each base.

    Raises:
        ConfigurationError: an arm is unknown, there twice, or needs another one that is not there.
    """
    candidates = list(candidates)
    types = _common_types(candidates)
    named: dict[str, PlannedArm] = {}
    for arm in _entry("all", plan, types) if "all" in plan.arms else ():
        named[arm.name] = arm
    given = [arm for entry in plan.arms if entry != "all" for arm in _entry(entry, plan, types)]
    for at, arm in enumerate(given):
        if any(arm.name == other.name for other in given[:at]):
            raise ConfigurationError(f"arms: {arm.name} is there twice; name each arm once")
        # One of your own takes the place of that of ``all``.
        named[arm.name] = arm
    for name in plan.without:
        if named.pop(name, None) is None:
            raise ConfigurationError(f"without: {name!r} is none of the arms{_closest(name, named)}")
    named = {name: _with_placement_checked(arm, candidates) for name, arm in named.items()}
    arms = [
        _with_budget(arm, budget, len(plan.budgets) > 1)
        for arm in named.values()
        for budget in (plan.budgets if _takes_budget(arm, plan, named, candidates) else [None])
    ]
    _check(plan, arms)
    return arms


def base_name(name: str) -> str:
    """A name without its budget."""
    return name.partition("@")[0]


def find_arms(arms: Sequence[PlannedArm], name: str, field: str) -> list[PlannedArm]:
    """The arms of a name, one for each budget.

    Raises:
        ConfigurationError: there is none; ``field`` of the plan is what says so.
    """
    found = [arm for arm in arms if name in (arm.name, base_name(arm.name))]
    if not found:
        raise ConfigurationError(f"{field}: {name!r} is none of the arms{_closest(name, [arm.name for arm in arms])}")
    return found


def match_name(plan: EvidencePlanConfig) -> str:
    """The arm that ``lora_matched`` and ``lora_flops`` are matched to."""
    return plan.match or plan.primary[0]["arm"]


def matched_to(plan: EvidencePlanConfig, arms: Sequence[PlannedArm], arm: PlannedArm) -> PlannedArm:
    """The arm that a matched one is matched to, at the same budget."""
    if arm.role == LORA_PASSES:
        return next(one for one in arms if one.kind == ZEROTH)
    found = find_arms(arms, match_name(plan), "match")
    return next((one for one in found if one.budget == arm.budget), found[0])


def plain_of(arms: Sequence[PlannedArm], arm: PlannedArm) -> PlannedArm:
    """The LoRA of the same placement that an arm of matched steps starts from."""
    name = base_name(arm.name).replace(arm.role, LORA, 1)
    found = next((one for one in arms if one.name == name), None)
    if found is None:
        raise ConfigurationError(
            f"arms: {arm.role} needs {LORA}, whose FLOPs a step it starts from; name it too"
            if name == LORA
            else f"arms: {arm.name} needs {name}, whose FLOPs a step it starts from; name it too"
        )
    return found


def baseline_of(arms: Sequence[PlannedArm], arm: PlannedArm) -> PlannedArm | None:
    """The ``random`` arm of the same placement and budget; None if there is none at all.

    Where there is none of that placement it is one that may choose everywhere, and where there is none of that budget
    the first.
    """

    def nearness(one: PlannedArm) -> tuple[bool, ...]:
        return one.placement == arm.placement, not one.placement, one.budget == arm.budget

    return max((one for one in arms if one.role == RANDOM), key=nearness, default=None)


def asks_placement(plan: EvidencePlanConfig) -> bool:
    """Whether an arm of the plan may train in some components only, as far as the plan alone tells."""

    def asks(entry: Any) -> bool:
        if isinstance(entry, str):
            return bool(_placement_of_name(entry)[1])
        return "placement" in entry or bool(placement_in(entry.get("selection", {})))

    return bool(placement_in(plan.selection)) or any(asks(entry) for entry in plan.arms)


def _common_types(candidates: Iterable[Sequence[Candidate]]) -> list[str]:
    """Types that every base has."""
    kinds = [{candidate.type for candidate in of_base} for of_base in candidates]
    return [type_ for type_ in TYPE_ORDER if all(type_ in of_base for of_base in kinds)]


def _entry(entry: Any, plan: EvidencePlanConfig, types: Sequence[str]) -> list[PlannedArm]:
    if isinstance(entry, dict):
        kind = entry.get("kind", "hybrid")
        rank = 0 if kind == FULL else entry.get("rank", plan.rank)
        if kind == "hybrid":
            arm = _hybrid(entry["name"], {"criterion": None} | entry.get("selection", {}), plan, rank)
        else:
            arm = PlannedArm(entry["name"], kind, rank=rank)
        if "placement" in entry:
            arm = _placed(arm, arm.name, read_placement(entry["placement"], f"arms: {arm.name}: placement"))
        return [arm]
    names = all_names(types) if entry == "all" else [entry]
    return [_by_name(name, plan, types) for name in names]


def all_names(types: Sequence[str]) -> list[str]:
    """Every arm out of the box.

    Args:
        types: of modules that every base has.
    """
    return list(_all_names(types))


def _all_names(types: Sequence[str]) -> Iterator[str]:
    for criterion in CRITERIA:
        if criterion in _NO_ARM or criterion in (RANDOM, STRATIFIED):
            continue
        yield criterion
        if criterion not in NAMING:
            yield criterion + REVERSED
    yield from (ONLY + type_.removesuffix("_proj") for type_ in types)
    yield from (RANDOM, STRATIFIED, LORA, LORA_MATCHED, LORA_FLOPS, DORA, FULL)


def _placement_of_name(name: str) -> tuple[str, Placement]:
    """A name without the preset behind it, and the placement of that; the name itself where there is none."""
    plain, colon, preset = name.rpartition(":")
    if not colon or preset not in PLACEMENT_PRESETS:
        return name, ()
    return plain, read_placement(preset, f"arms: {name}")


def _by_name(name: str, plan: EvidencePlanConfig, types: Sequence[str]) -> PlannedArm:
    plain, placement = _placement_of_name(name)
    if plain != name:
        return _placed(_unplaced(plain, plan, types), name, placement)
    return _unplaced(name, plan, types)


def _placed(arm: PlannedArm, name: str, placement: Placement) -> PlannedArm:
    if arm.selects:
        options = {key: value for key, value in arm.selection if not key.startswith(OPTION)} | as_options(placement)
        return replace(arm, name=name, selection=_in_order(options), placement=placement)
    return replace(arm, name=name, placement=placement)


def _unplaced(name: str, plan: EvidencePlanConfig, types: Sequence[str]) -> PlannedArm:
    if name in (LORA, DORA, ZEROTH):
        return PlannedArm(name, name, rank=plan.rank)
    if name == FULL:
        return PlannedArm(name, FULL)
    if name in (LORA_MATCHED, LORA_FLOPS, LORA_PASSES):
        return PlannedArm(name, LORA, rank=plan.rank, role=name)
    if name in (RANDOM, STRATIFIED):
        arm = _hybrid(name, {"criterion": RANDOM}, plan, plan.rank)
        return replace(arm, draws=plan.draws, role=name)
    if name.startswith(ONLY):
        type_ = name.removeprefix(ONLY).removesuffix("_proj") + "_proj"
        if type_ in types:
            return _hybrid(name, {"criterion": "spread", "control.type": type_}, plan, plan.rank)
    criterion = name.removesuffix(REVERSED)
    if criterion in CRITERIA and criterion not in _NO_ARM and not (name.endswith(REVERSED) and criterion in NAMING):
        selection = {"criterion": criterion}
        if name.endswith(REVERSED):
            selection["direction"] = "highest" if get_criterion(criterion).direction == "lowest" else "lowest"
        return _hybrid(name, selection, plan, plan.rank)
    names = ["all", *all_names(types), ZEROTH, LORA_PASSES]
    raise ConfigurationError(
        f"arms: {name!r} is unknown{_closest(name, names)}; give some of {', '.join(names)}, or one of them with a "
        f"placement behind it, as in {LORA}:attention"
    )


def _hybrid(name: str, selection: dict[str, Any], plan: EvidencePlanConfig, rank: int) -> PlannedArm:
    options = {"budget.overflow": "skip"} | plan.selection | selection
    if options["criterion"] in NAMING:
        options = {key: value for key, value in options.items() if not key.startswith("budget.")}
    return PlannedArm(name, "hybrid", _in_order(options), rank, placement=placement_in(options))


def _in_order(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items(), key=lambda item: item[0]))


def _with_placement_checked(arm: PlannedArm, candidates: Sequence[Sequence[Candidate]]) -> PlannedArm:
    """The arm; with a criterion that measures nothing where its placement leaves nothing to one."""
    if arm.placement and (arm.kind == ZEROTH or arm.role == LORA_PASSES):
        raise ConfigurationError(
            f"arms: {arm.name}: zeroth order moves the weights under every adapter, and {LORA_PASSES} follows from it; "
            f"leave its placement out"
        )
    for of_base in candidates:
        refuse_placement(arm.name, arm.kind, arm.placement, dict(arm.selection), of_base)
    selection = dict(arm.selection)
    if arm.selects and selection["criterion"] is None:
        return replace(arm, selection=_in_order(selection | {"criterion": RANDOM}))
    return arm


def _takes_budget(
    arm: PlannedArm,
    plan: EvidencePlanConfig,
    named: dict[str, PlannedArm],
    candidates: Sequence[Sequence[Candidate]],
) -> bool:
    if arm.role in (LORA_MATCHED, LORA_FLOPS):
        other = named.get(base_name(match_name(plan)))
        return other is None or other.selects
    if not arm.selects or dict(arm.selection)["criterion"] in NAMING:
        return False
    return any(left_to_a_criterion(arm.placement, of_base) for of_base in candidates)


def _with_budget(arm: PlannedArm, budget: float | None, several: bool) -> PlannedArm:
    if budget is None:
        return arm
    selection = arm.selection
    if arm.selects:
        selection = _in_order(dict(selection) | {"budget.ratio": budget})
    return replace(arm, name=f"{arm.name}@{budget:g}" if several else arm.name, selection=selection, budget=budget)


def _check(plan: EvidencePlanConfig, arms: Sequence[PlannedArm]) -> None:
    for at, one in enumerate(plan.primary):
        find_arms(arms, one["arm"], f"primary[{at}].arm")
        for other in one["against"]:
            find_arms(arms, other, f"primary[{at}].against")
    matched = [arm for arm in arms if arm.role in (LORA_MATCHED, LORA_FLOPS)]
    for arm in find_arms(arms, match_name(plan), "match") if matched else ():
        # Of the same placement it would be matched to itself.
        other = not arm.role and arm.kind in (LORA, FULL) and all(one.placement != arm.placement for one in matched)
        if not arm.selects and not other:
            raise ConfigurationError(f"match: {arm.name} selects no modules; name an arm that does, e.g. {RANDOM}")
    for arm in arms:
        if arm.role in MATCHED_STEPS:
            plain_of(arms, arm)
    zeroth = sum(arm.kind == ZEROTH for arm in arms)
    if any(arm.role == LORA_PASSES for arm in arms) and zeroth != 1:
        raise ConfigurationError(
            f"arms: {LORA_PASSES} is matched to the one arm of kind {ZEROTH}, and there are {zeroth}; name one"
        )
    for name in plan.rates.of or ():
        find_arms(arms, name, "rates.of")
        if name != base_name(name):
            raise ConfigurationError(f"rates.of: {name!r} has a budget in it; give {base_name(name)}, for all of them")
    for which, needed in (("full", ("hybrid", FULL)), ("lora", ("hybrid", LORA, DORA, ZEROTH)), ("zeroth", (ZEROTH,))):
        lacking = [arm for arm in arms if not getattr(rates_of(plan.rates, base_name(arm.name)), which)]
        if any(arm.kind in needed for arm in lacking):
            raise ConfigurationError(f"rates.{which}: not given; give learning rates, e.g. [1e-3, 3e-3, 1e-2]")


def _closest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""
