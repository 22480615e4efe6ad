"""An allocation must not contradict itself: modules, sums and budget are recomputed and compared."""

from __future__ import annotations

from hybrid_lora_plugin.allocation.budget import FULL, LORA
from hybrid_lora_plugin.allocation.budget_modes import CHOICES, FIXED, budget_mode
from hybrid_lora_plugin.allocation.consensus import overlaps_of
from hybrid_lora_plugin.allocation.schema import PROBE_AGAIN, Allocation
from hybrid_lora_plugin.allocation.stopping import LIMIT, SETTLED
from hybrid_lora_plugin.candidates import COMPONENT_OF_TYPE
from hybrid_lora_plugin.errors import AllocationError


def _require(ok: bool, where: str, field: str, message: str) -> None:
    if not ok:
        raise AllocationError(f"{where}: {field}: {message}; {PROBE_AGAIN}")


def validate_allocation(allocation: Allocation, where: str) -> None:
    """Refuse an allocation that contradicts itself.

    Args:
        allocation: what to check.
        where: file name for the messages.

    Raises:
        AllocationError: naming the field, the value and the way out.
    """
    model, modules = allocation.model, allocation.modules
    _require(bool(modules), where, "modules", "empty, at least one module is wanted")
    seen: set[str] = set()
    for index, module in enumerate(modules):
        field = f"modules[{index}]"
        _require(module.name not in seen, where, field, f"duplicate module {module.name!r}")
        seen.add(module.name)
        _require(
            module.assignment in (FULL, LORA),
            where,
            f"{field}.assignment",
            f"{module.assignment!r} for {module.name}, {FULL!r} or {LORA!r} is wanted",
        )
        _require(module.type in COMPONENT_OF_TYPE, where, f"{field}.type", f"{module.type!r} is unknown")
        _require(
            module.component == COMPONENT_OF_TYPE[module.type],
            where,
            f"{field}.component",
            f"{module.component!r} for a {module.type}, {COMPONENT_OF_TYPE[module.type]!r} is wanted",
        )
        _require(
            0 <= module.layer < model.num_layers,
            where,
            f"{field}.layer",
            f"{module.layer} for {module.name}, 0 to {model.num_layers - 1} is wanted",
        )
        _require(module.parameters > 0, where, f"{field}.parameters", f"{module.parameters}, more than 0 is wanted")
    total = sum(module.parameters for module in modules)
    _require(
        total == model.candidate_parameters,
        where,
        "model.candidate_parameters",
        f"{model.candidate_parameters:,} but the modules add up to {total:,}",
    )
    _check_budget(allocation, where)
    _check_stability(allocation, where)
    _check_held_out(allocation, where)
    _check_auto(allocation, where)
    _check_agreement(allocation, where)
    _check_trial(allocation, where)


def _check_budget(allocation: Allocation, where: str) -> None:
    """What was asked, allowed and spent agree with the modules, in the unit of the mode."""
    budget = allocation.budget
    try:
        mode = budget_mode(budget.mode)
    except AllocationError:
        modes = ", ".join((*CHOICES, FIXED))
        _require(False, where, "budget.mode", f"{budget.mode!r} is unknown, one of {modes} is wanted")
    _require(0 < budget.ratio <= 1, where, "budget.ratio", f"{budget.ratio}, a fraction in (0, 1] is wanted")
    _require(budget.limit > 0, where, "budget.limit", f"{budget.limit}, more than 0 is wanted")
    _require(budget.lora_rank > 0, where, "budget.lora_rank", f"{budget.lora_rank}, more than 0 is wanted")
    full = [module.assignment == FULL for module in allocation.modules]
    expected = mode.expected(budget, allocation.modules, full)
    _require(
        budget.ratio == expected.ratio,
        where,
        "budget.ratio",
        f"{budget.ratio} but the full modules are {expected.ratio}",
    )
    _require(
        budget.limit == expected.limit,
        where,
        "budget.limit",
        f"{budget.limit:,} but mode {budget.mode!r} with ratio {budget.ratio} allows {expected.limit:,}",
    )
    used = expected.used
    _require(budget.used == used, where, "budget.used", f"{budget.used:,} but the full modules add up to {used:,}")
    _require(used <= budget.limit, where, "budget.used", f"{used:,} exceeds the limit of {budget.limit:,}")


def _check_held_out(allocation: Allocation, where: str) -> None:
    held_out = allocation.probe and allocation.probe.held_out
    if held_out is None:
        return
    for name in ("batches", "tokens"):
        value = getattr(held_out, name)
        _require(value > 0, where, f"probe.held_out.{name}", f"{value}, more than 0 is wanted")
    for name in ("before", "after"):
        value = getattr(held_out, name)
        _require(value >= 0, where, f"probe.held_out.{name}", f"{value}, a loss of 0 or more is wanted")


def _check_auto(allocation: Allocation, where: str) -> None:
    probe = allocation.probe
    for name, number in (("warmup_auto", "warmup_steps"), ("partitions_auto", "partitions")):
        found = probe and getattr(probe, name)
        if found is None:
            continue
        used = getattr(probe, number)
        _require(used <= found.limit, where, f"probe.{number}", f"{used}, at most {found.limit} is wanted")
        _require(
            found.reason in (SETTLED, LIMIT),
            where,
            f"probe.{name}.reason",
            f"{found.reason!r}, settled or limit is wanted",
        )


def _check_agreement(allocation: Allocation, where: str) -> None:
    found, names = allocation.agreement, {module.name for module in allocation.modules}
    if found is None:
        return
    _require(len(found.seeds) > 1, where, "agreement.seeds", f"{found.seeds}, two or more are wanted")
    count = len(found.chosen)
    _require(count == len(found.seeds), where, "agreement.chosen", f"{count} choices for {len(found.seeds)} seeds")
    for index, chosen in enumerate(found.chosen):
        unknown = next((name for name in chosen if name not in names), None)
        _require(unknown is None, where, f"agreement.chosen[{index}]", f"{unknown!r} is no module")
    wanted = overlaps_of(found.chosen)
    _require(found.overlaps == wanted, where, "agreement.overlaps", f"{found.overlaps} but the choices give {wanted}")


def _check_trial(allocation: Allocation, where: str) -> None:
    trial = allocation.trial
    if trial is None:
        return
    found = {one.name: one for one in trial.candidates}
    count = len(found)
    _require(count == len(trial.candidates), where, "trial.candidates", f"{len(trial.candidates)} of {count} names")
    _require(trial.chosen in found, where, "trial.chosen", f"{trial.chosen!r} is none of {', '.join(found)}")
    chosen = found[trial.chosen].modules
    full = allocation.full_names
    _require(chosen == full, where, "trial.chosen", f"{trial.chosen!r} has {len(chosen)} modules, not the {len(full)}")
    for index, one in enumerate(trial.candidates):
        places = len(trial.rounds)
        _require(
            len(one.losses) <= places, where, f"trial.candidates[{index}].losses", f"{len(one.losses)} of {places}"
        )


def _check_stability(allocation: Allocation, where: str) -> None:
    stability, count = allocation.stability, len(allocation.modules)
    if stability is None:
        return
    for name in ("draws", "batches"):
        value = getattr(stability, name)
        _require(value > 0, where, f"stability.{name}", f"{value}, more than 0 is wanted")
    for name in ("shares", "low", "high"):
        length = len(getattr(stability, name))
        _require(length == count, where, f"stability.{name}", f"{length} values for {count} modules")
    for index, (share, low, high) in enumerate(zip(stability.shares, stability.low, stability.high, strict=True)):
        _require(0 <= share <= 1, where, f"stability.shares[{index}]", f"{share}, a fraction in [0, 1] is wanted")
        _require(low <= high, where, f"stability.low[{index}]", f"{low}, no more than high, {high}, is wanted")
