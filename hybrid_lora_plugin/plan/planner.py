"""All that a run holds on a GPU in each of its phases, in the host, and sends: one plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.plan.activations import layer_activations
from hybrid_lora_plugin.plan.compute import Compute, compute
from hybrid_lora_plugin.plan.logits import logits_bytes
from hybrid_lora_plugin.plan.model import PlannedModel
from hybrid_lora_plugin.plan.probe_memory import ProbeMemory, probe_memory, what_fits
from hybrid_lora_plugin.plan.rollout import (
    RolloutMemory,
    asleep_bytes,
    pinned_base_bytes,
    rollout_memory,
    sequences_at_once,
)
from hybrid_lora_plugin.plan.run import HYBRID, Pass, Run
from hybrid_lora_plugin.plan.sync_bytes import SyncBytes, all_modes
from hybrid_lora_plugin.plan.training import gathered_bytes, itemsize, state_bytes, step_bytes
from hybrid_lora_plugin.training.memory import TrainingBytes

GIB = 1 << 30
#: of the base of a probe on an accelerator
PROBE_DTYPE = "bfloat16"
#: parts of a GPU's memory in the order in which they are shown
PARTS = {
    "frozen": "frozen weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "moments": "optimizer",
    "reference": "reference",
    "gathered": "gathered by FSDP",
    "activations": "activations",
    "logits": "logits and loss",
    "step": "optimizer step",
    "engine": "rollout weights",
    "working": "rollout working memory (estimate)",
    "cache": "KV cache",
    "transfer": "weight transfer",
    "reserve": "contexts, NCCL, fragmentation (assumed)",
}


@dataclass(frozen=True)
class Machine:
    """What the plan takes for granted of the machines.

    Attributes:
        gpu_bytes: memory of a GPU as torch reports it.
        reserve_bytes: of it what no part of the plan accounts for.
        host_bytes: memory of one machine; None if nobody says.
        teraflops: peak of a GPU in the type that is computed in.
        share: of the peak that training computes at.
    """

    gpu_bytes: float
    reserve_bytes: float
    host_bytes: float | None
    teraflops: float
    share: float


@dataclass(frozen=True)
class Phase:
    """The fullest moment of a phase on one GPU.

    Attributes:
        name: of the phase. moment: when in it.
        parts: bytes by name of ``PARTS``.
    """

    name: str
    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        name: of the model.
        run, machine: what was planned.
        counts: parameters. drawn: whether the allocation was drawn.
        full_modules, modules: fully tuned modules, and candidates.
        state: of one rank, wherever it lies.
        phases: in the order of a step.
        host: bytes of one machine's memory by what they are.
        rollout: of one worker; None without.
        at_once: sequences of full length that one engine generates at once.
        syncs: of each mode.
        compute: operations.
        probe: memory of the probe that the run begins with; None where it begins with none, or with one of its own
            objective.
        problems: why it cannot run, each a line; empty where it fits.
    """

    name: str
    run: Run
    machine: Machine
    counts: ParameterCounts
    drawn: bool
    full_modules: int
    modules: int
    state: TrainingBytes
    phases: list[Phase]
    host: dict[str, float]
    rollout: RolloutMemory | None
    at_once: int
    syncs: list[SyncBytes]
    compute: Compute
    probe: ProbeMemory | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def fullest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether nothing is in the way."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Everything, in bytes, operations and parameters."""
        run = asdict(self.run)
        run.pop("settings")
        run["hybrid"] = None if self.run.hybrid is None else asdict(self.run.hybrid)
        return {
            "model": self.name,
            "run": run,
            "machine": asdict(self.machine),
            "parameters": {
                "total": self.counts.total,
                "frozen": self.counts.frozen,
                "full": self.counts.full,
                "lora": self.counts.lora,
                "full_modules": self.full_modules,
                "candidate_modules": self.modules,
                "allocation_drawn": self.drawn,
            },
            "state_bytes": asdict(self.state),
            "phases": [
                {"name": phase.name, "moment": phase.moment, "total": phase.total, "parts": phase.parts}
                for phase in self.phases
            ],
            "host_bytes": self.host,
            "rollout": None if self.rollout is None else asdict(self.rollout) | {"sequences_at_once": self.at_once},
            "syncs": [asdict(sync) for sync in self.syncs],
            "compute": asdict(self.compute)
            | {"probe_in_steps": self.compute.probe_in_steps, "probe_share": self.compute.probe_share},
            "probe": None
            if self.probe is None
            else {
                "moments": [
                    {"stage": moment.stage, "total": moment.total, "parts": moment.parts}
                    for moment in self.probe.moments
                ],
                "host_bytes": self.probe.host,
            },
            "problems": self.problems,
        }


def make_plan(model: PlannedModel, run: Run, machine: Machine, name: str) -> Plan:
    """Plan a run.

    Args:
        model: of the run, from ``planned_model``.
        run: its settings.
        machine: what it runs on.
        name: of the model, for people.
    """
    state = state_bytes(model, run)
    rollout = rollout_memory(model, run, machine.gpu_bytes) if run.rollout else None
    syncs = all_modes(model, run) if run.rollout else []
    phases = list(_phases(model, run, machine, state, rollout, syncs))
    at_once = sequences_at_once(rollout, run.prompt_tokens + run.response_tokens, run.rollout) if rollout else 0
    plan = Plan(
        name=name,
        run=run,
        machine=machine,
        counts=model.counts,
        drawn=model.drawn,
        full_modules=len(model.allocation.full_names) if model.allocation else 0,
        modules=len(model.candidates),
        state=state,
        phases=phases,
        host=_host(model, run, state),
        rollout=rollout,
        at_once=at_once,
        syncs=syncs,
        compute=compute(model, run),
        probe=_probe(model, run),
    )
    plan.problems.extend(_problems(plan))
    plan.problems.extend(_probe_problems(plan, model))
    return plan


def _probe_command(run: Run) -> ProbeCommandConfig:
    return ProbeCommandConfig(criterion=run.hybrid.criterion, probe=run.hybrid.probe, lora=run.hybrid.lora)


def _probe(model: PlannedModel, run: Run) -> ProbeMemory | None:
    if run.training != HYBRID or not model.drawn or run.hybrid.probe.objective != "sft":
        return None
    if run.hybrid.criterion == "trial":
        # It trains allocations, each for itself, as the run does.
        return None
    return probe_memory(model.config, _probe_command(run), PROBE_DTYPE, run.gpus)


def _probe_problems(plan: Plan, model: PlannedModel) -> list[str]:
    machine, run = plan.machine, plan.run
    room = machine.gpu_bytes - machine.reserve_bytes
    if plan.probe is None or plan.probe.needed <= room:
        return []
    fits = what_fits(model.config, _probe_command(run), PROBE_DTYPE, run.gpus, room)
    way_out = f"it fits with {fits}" if fits else "give a shorter probe.max_length or more GPUs"
    return [
        f"probe ({plan.probe.fullest.stage}): {plan.probe.needed / GIB:.1f} GiB on a GPU of "
        f"{machine.gpu_bytes / GIB:.1f} GiB, of which {machine.reserve_bytes / GIB:.1f} are kept; {way_out}"
    ]


def chosen_sync(syncs: list[SyncBytes], run: Run) -> SyncBytes:
    """The sync that the run does."""
    if run.training != HYBRID:
        return syncs[0]
    return next(sync for sync in syncs if sync.mode == run.hybrid.sync)


def _phases(model, run: Run, machine: Machine, state: TrainingBytes, rollout, syncs):
    awake = {}
    if rollout is not None:
        engine = {"engine": rollout.weights, "working": rollout.working, "cache": max(0.0, rollout.cache)}
        if not run.rollout.sleeps:
            awake = engine
        yield Phase("rollout", "generating", _held(run, state, idle=True) | engine | _reserve(machine))
        sync = chosen_sync(syncs, run)
        # Keys and values come back when the weights are in place.
        parts = {"engine": rollout.weights} | awake | {"transfer": sync.buffer + sync.trainer}
        idle = run.param_offload and run.strategy == "fsdp2" and run.training != "lora"
        yield Phase("weight sync", "largest tensor", _held(run, state, idle=idle) | parts | _reserve(machine))
    resident = awake | _reserve(machine)
    if run.log_probs:
        moment, parts = _inference(model, run, run.log_probs)
        yield Phase("log-probabilities", moment, _held(run, state) | parts | resident)
    if run.reference:
        moment, parts = _inference(model, run, run.reference)
        held = _held(run, state, idle=run.reference_model)
        if run.training == HYBRID:
            # The trained values step aside.
            held["reference"] += 4 * model.counts.full / run.shard_ranks if not run.offload_policy else 0
        yield Phase("reference", moment, held | parts | resident)
    yield _update(model, run, state, resident)


def _held(run: Run, state: TrainingBytes, *, idle: bool = False, training: bool = False) -> dict[str, float]:
    """What of the trainer's state is on the GPU.

    Args:
        run: its settings.
        state: of this rank.
        idle: while the trainer does nothing.
        training: in an update.
    """
    here = not run.offload_policy
    weights = here and not (run.param_offload and idle)
    moments = here and (training or not run.optimizer_offload)
    return {
        "frozen": state.frozen * weights,
        "trained": state.trained * weights,
        "gradients": state.gradients * (here and training),
        "moments": state.moments * moments,
        "reference": state.reference * weights,
    }


def _reserve(machine: Machine) -> dict[str, float]:
    return {"reserve": machine.reserve_bytes}


def _inference(model: PlannedModel, run: Run, of: Pass) -> tuple[str, dict[str, float]]:
    """The fullest moment of a pass without a gradient."""
    layers = layer_activations(model.config, run, of.tokens, gradient=False)
    logits = logits_bytes(run, of, model.vocabulary, itemsize(run.compute_dtype), gradient=False)
    gathered = gathered_bytes(model, run).weights
    if layers.kept + logits > layers.peak:
        return "loss", {"gathered": gathered, "activations": layers.kept, "logits": logits}
    return "a layer", {"gathered": gathered, "activations": layers.peak}


def _update(model: PlannedModel, run: Run, state: TrainingBytes, resident: dict[str, float]) -> Phase:
    """The fullest of three moments: the loss, a layer's backward pass, the optimizer's step."""
    layers = layer_activations(model.config, run, run.update.tokens, gradient=True)
    kept, peak = layers.kept, layers.peak
    if run.activation_offload:
        # Those of the layer that computes and of the next stay.
        away = kept * max(0.0, 1 - 2 / model.layers)
        kept, peak = kept - away, peak - away
    logits = logits_bytes(run, run.update, model.vocabulary, itemsize(run.compute_dtype), gradient=True)
    gathered = gathered_bytes(model, run)
    held = _held(run, state, training=True)
    whole = gathered.weights + gathered.gradients
    moments = (
        ("loss", {"gathered": whole, "activations": kept, "logits": logits}),
        ("backward pass of a layer", {"gathered": whole, "activations": peak}),
        ("optimizer step", {"step": step_bytes(state, run) * (not run.offload_policy)}),
    )
    return max(
        (Phase("update", moment, held | parts | resident) for moment, parts in moments), key=lambda phase: phase.total
    )


def _host(model: PlannedModel, run: Run, state: TrainingBytes) -> dict[str, float]:
    """The memory of one machine that the run takes besides what every process does."""
    ranks = run.gpus_per_node
    parts: dict[str, float] = {}
    if run.rollout:
        parts["weights of sleeping rollout workers"] = ranks * asleep_bytes(model, run.rollout)
        parts["originals that rollout workers merge into"] = ranks * pinned_base_bytes(model, run)
        parts["what sparse_merge sent last"] = ranks * state.sent
    offloaded = run.param_offload or run.offload_policy
    parts["offloaded weights"] = ranks * (state.frozen + state.trained + state.reference) * offloaded
    parts["offloaded gradients"] = ranks * state.gradients * run.offload_policy
    parts["offloaded optimizer"] = ranks * state.moments * (run.optimizer_offload or run.offload_policy)
    if run.reference_model:
        share = sum(-(-p.shape[0] // run.shard_ranks) * p[0].numel() for p in model.plain.parameters())
        parts["reference model"] = ranks * share * itemsize(run.reference_dtype)
    if run.activation_offload:
        kept = layer_activations(model.config, run, run.update.tokens, gradient=True).kept
        parts["offloaded activations"] = ranks * kept * max(0.0, 1 - 2 / model.layers)
    return {name: size for name, size in parts.items() if size}


def _problems(plan: Plan) -> list[str]:
    """Why the run cannot work, each in a line."""
    run, machine, found = plan.run, plan.machine, []
    for phase in plan.phases:
        over = phase.total - machine.gpu_bytes
        if over > 0:
            found.append(
                f"{phase.name} ({phase.moment}): {phase.total / GIB:.1f} GiB on a GPU of {machine.gpu_bytes / GIB:.1f} "
                f"GiB, {over / GIB:.1f} too many"
            )
    if plan.rollout is not None and plan.rollout.cached_tokens < run.rollout.max_model_len:
        found.append(
            f"rollout: room for keys and values of {plan.rollout.cached_tokens:,} tokens, and one sequence may have "
            f"{run.rollout.max_model_len:,}; vLLM does not start"
        )
    if machine.host_bytes is not None and sum(plan.host.values()) > machine.host_bytes:
        found.append(
            f"host: {sum(plan.host.values()) / GIB:.0f} GiB of a machine's {machine.host_bytes / GIB:.0f} GiB, beside "
            "what every process takes"
        )
    longest = run.prompt_tokens + run.response_tokens
    for name, of in (("update", run.update), ("log-probabilities", run.log_probs), ("reference", run.reference)):
        if of is not None and of.tokens * run.sequence_parallel < longest and not run.padded_by_rows:
            found.append(f"{name}: micro-batches of {of.tokens:,} tokens cannot hold one sequence of {longest:,}")
    return found
