"""What to change where a run does not fit: overrides in the order of what they cost, each planned anew with the others.

A change is kept where the plan with it needs less in the phase that is worst; what it saves is the difference of two
plans and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.plan.planner import GIB, Phase, Plan

#: overrides -> the plan of the run with them at its end; ConfigurationError where the run would be refused
Again = Callable[[Sequence[str]], Plan]
MOST = 12
#: a change that saves less of what a phase needs is left out
_LEAST = 0.01


@dataclass(frozen=True)
class Change:
    """A change that was planned.

    Attributes:
        overrides: for the command.
        phase: whose need it lowers.
        saves: bytes on a GPU in that phase, or in a machine's host memory with ``phase`` "host".
        total: of that phase with this change and those before it.
        costs: what one pays for it.
    """

    overrides: tuple[str, ...]
    phase: str
    saves: float
    total: float
    costs: str


def suggest(plan: Plan, again: Again) -> tuple[list[Change], Plan]:
    """Changes one on top of the other until the run fits, or nothing helps any more.

    Args:
        plan: of the run as it was given.
        again: plans it with more overrides.

    Returns:
        The changes, and the plan with all of them.
    """
    changes: list[Change] = []
    given: list[str] = []
    for _ in range(MOST):
        if plan.fits:
            break
        found = _first_that_helps(plan, given, again)
        if found is None:
            break
        change, plan = found
        given += change.overrides
        changes.append(change)
    return changes, plan


def _first_that_helps(plan: Plan, given: Sequence[str], again: Again) -> tuple[Change, Plan] | None:
    where, need = _worst(plan)
    for overrides, costs in _candidates(plan, where):
        try:
            new = again([*given, *overrides])
        except ConfigurationError:
            # The run would be refused with it.
            continue
        saves = need(plan) - need(new)
        if saves > _LEAST * abs(need(plan)):
            return Change(tuple(overrides), where, saves, need(new), costs), new
    return None


def _worst(plan: Plan) -> tuple[str, Callable[[Plan], float]]:
    """What is in the way most, and how much a plan needs of it."""
    if plan.fullest.total > plan.machine.gpu_bytes:
        name = plan.fullest.name
        return name, lambda plan: _phase(plan, name).total
    if plan.machine.host_bytes is not None and sum(plan.host.values()) > plan.machine.host_bytes:
        return "host", lambda plan: sum(plan.host.values())
    if plan.rollout is not None and plan.rollout.cached_tokens < plan.run.rollout.max_model_len:
        # Room that is missing in the cache.
        return "KV cache", lambda plan: -plan.rollout.cache
    return "micro-batches", lambda plan: len(plan.problems)


def _phase(plan: Plan, name: str) -> Phase:
    return next(phase for phase in plan.phases if phase.name == name)


def _candidates(plan: Plan, where: str) -> Iterator[tuple[list[str], str]]:
    """Overrides that may help there, the cheapest first, with what they cost."""
    run = plan.run

    def given(what: str, value: object, costs: str) -> Iterator[tuple[list[str], str]]:
        if what in run.settings and run.settings[what][1] != value:
            yield [f"{run.settings[what][0]}={_text(value)}"], costs

    if where == "micro-batches":
        longest = -(-(run.prompt_tokens + run.response_tokens) // run.sequence_parallel)
        for what, of in _passes(plan).items():
            if of.tokens < longest:
                yield from given(what, longest, "nothing: one sequence has to fit")
        return
    if where == "host":
        if run.training == "hybrid" and run.hybrid.sync != "merge":
            yield ["hybrid_lora.sync=merge"], "a sync of every weight"
        yield from given("activation offload", False, "more memory of the GPU")
        yield from given("optimizer offload", False, "more memory of the GPU")
        yield from given("param offload", False, "more memory of the GPU")
        return
    if where == "KV cache":
        yield from given("memory share", _share(plan, up=True), "memory of the trainer")
        yield from given("tensor parallel", 2 * run.rollout.tensor_parallel, "traffic between GPUs in a rollout")
        return
    if run.rollout is not None:
        if not run.rollout.sleeps and where != "rollout":
            names = [run.settings[what][0] for what in ("free cache", "sleep mode")]
            yield [f"{name}=true" for name in names], "the engine wakes up in every step"
        if where == "rollout":
            yield from given("memory share", _share(plan, up=False), "keys and values: fewer sequences at once")
        if where == "weight sync":
            yield from given("bucket", 512, "more and smaller transfers")
    what = {"update": "update tokens", "log-probabilities": "log-prob tokens", "reference": "reference tokens"}
    if where in what:
        if run.rollout is not None and where == "log-probabilities":
            yield from given("chunked entropy", True, "a loop over chunks of the entropy")
        if where == "update" and not run.checkpointing:
            yield from given("checkpointing", True, "a second forward pass of the layers")
        yield from _half(plan, what[where])
    yield from given("optimizer offload", True, "the optimizer crosses the bus twice in a step")
    yield from given("param offload", True, "weights cross the bus in a step")
    if where == "update":
        yield from given("activation offload", True, "activations cross the bus twice in a micro-batch")
    if where in ("rollout", "weight sync"):
        yield from given("tensor parallel", 2 * run.rollout.tensor_parallel, "traffic between GPUs in a rollout")
    yield from given("nodes", 2 * run.nodes, "twice the machines")


def _passes(plan: Plan) -> dict:
    run = plan.run
    passes = {"update tokens": run.update, "log-prob tokens": run.log_probs, "reference tokens": run.reference}
    return {what: of for what, of in passes.items() if of is not None}


def _half(plan: Plan, what: str) -> Iterator[tuple[list[str], str]]:
    """Half of a micro-batch, as long as one sequence fits."""
    if what not in plan.run.settings:
        return
    name, value = plan.run.settings[what]
    if not isinstance(value, int) or value < 2:
        return
    run = plan.run
    least = (
        1
        if name.endswith("micro_batch_size_per_gpu")
        else -(-(run.prompt_tokens + run.response_tokens) // run.sequence_parallel)
    )
    if max(least, value // 2) < value:
        yield [f"{name}={max(least, value // 2)}"], "more and smaller micro-batches"


def _share(plan: Plan, up: bool) -> float:
    """The engine's share of a GPU with which the rollout just fits, in steps of 0.05."""
    phase = _phase(plan, "rollout")
    others = phase.total - sum(phase.parts[name] for name in ("engine", "working", "cache"))
    room = (plan.machine.gpu_bytes - others) / plan.machine.gpu_bytes
    least = 0.1
    share = max(least, int(room * 20) / 20)
    return share if up == (share > plan.run.rollout.memory_share) else plan.run.rollout.memory_share


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def change_lines(changes: Sequence[Change], after: Plan) -> list[str]:
    """The changes for people."""
    lines = []
    for number, change in enumerate(changes, start=1):
        lines.append(f"  {number}. {' '.join(change.overrides)}")
        lines.append(
            f"     saves {change.saves / GIB:.1f} GiB ({change.phase}: {change.total / GIB:.1f} GiB then); costs "
            f"{change.costs}"
        )
    if after.fits:
        lines.append(f"  With all of them it fits: at most {after.fullest.total / GIB:.1f} GiB ({after.fullest.name}).")
    else:
        lines.append("  That is not enough; what remains: " + "; ".join(after.problems))
    return lines
