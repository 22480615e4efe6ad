"""Protocol ``sft``: supervised fine-tuning of many replicas of toy bases at once, to tasks that shift from addition."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hybrid_lora_plugin.candidates import Candidate, find_candidates
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.protocol import Arm, Choice, Outcome, Protocol, Run, Start
from hybrid_lora_plugin.evidence.replicas.base import digest_of, load_base, save_base, train_base
from hybrid_lora_plugin.evidence.replicas.flops import step_flops, trainable_parameters
from hybrid_lora_plugin.evidence.replicas.forward import SharedParts, Weights, answer_log_probs
from hybrid_lora_plugin.evidence.replicas.selection import Probes, batch_of
from hybrid_lora_plugin.evidence.replicas.settings import BaseSettings, ReplicaSettings, read_settings
from hybrid_lora_plugin.evidence.replicas.tasks import Layout, Problems, task_of
from hybrid_lora_plugin.evidence.replicas.updates import Replicas, factor_width
from hybrid_lora_plugin.files import complete_folder
from hybrid_lora_plugin.probing.forward import Batch

GROUP_SIZES = {"cuda": 512, "cpu": 16}
#: how many times fewer runs a group has of a kind that a plan has few of
FEWER = 8
#: of the adapters of a probe where no arm says one
PROBE_RANK = 2


class SftProtocol(Protocol):
    """Small Qwen2 models, R at once.

    A run takes ``run.steps`` steps of AdamW (verl's betas, weight decay and clipping) at constant rates on the mean
    loss of the answer tokens, and is evaluated on the held-out problems of its task every ``eval_every`` steps and at
    the end. Its outcome depends on the number of replicas of a group, which is why groups that are not full are filled
    up, and not on what the others are.
    """

    name = "sft"
    settings_kind: type[ReplicaSettings] = ReplicaSettings
    #: Raised whenever the same settings would give other results.
    version = 1
    measure = "held_out_loss"
    lower_is_better = True
    knows_zeroth_order = True
    knows_placement = True

    def __init__(
        self,
        settings: Mapping[str, Any],
        folder: str | Path,
        device: str = "auto",
        bases: Sequence[str] = (),
        tasks: Sequence[str] = (),
    ) -> None:
        """From the settings block of a plan.

        Args:
            settings: see ``ReplicaSettings``.
            folder: where bases are kept, ``bases/<name>``.
            device: ``auto``, ``cpu`` or ``cuda``.
            bases: names of those that are used; by default all of the settings.
            tasks: names of those that are used.

        Raises:
            ConfigurationError: a setting, base or task cannot be used, or there is no such device.
        """
        self.settings = read_settings(self.settings_kind, settings, f"settings of protocol {self.name}")
        self.folder = Path(folder)
        self.tasks = [task_of(task).name for task in tasks]
        self.bases = [self._settings_of(name) for name in bases] or self.settings.bases
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if kind not in GROUP_SIZES or (kind == "cuda" and not torch.cuda.is_available()):
            raise ConfigurationError(f"device: {device!r} is not there; give cpu, or auto")
        self.device, self.dtype = torch.device(kind), getattr(torch, self.settings.dtype)
        self.group_size = self.settings.group_size or GROUP_SIZES[kind]
        self.layout = Layout(self.settings.digits, self.settings.least_first)
        self.problems = Problems(self.layout, self.settings.held_out)
        # For a life of the protocol: a base is a few megabytes.
        self.model, self._shared, self._candidates = cache(self._load), cache(self._share), cache(self._find)
        self._origin_model = cache(self._load_origin)
        #: one GPU holds one process's groups, and a process of one thread has the bits of one thread
        self.trains_in_processes = self.device.type == "cpu" and torch.get_num_threads() == 1

    def identity(self) -> dict[str, Any]:
        """Versions, device, dtype, group size, and a digest of each base."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return {
            "protocol": f"{self.name}/{self.version}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": device,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "dtype": self.settings.dtype,
            "tf32": self.settings.tf32,
            "group_size": self.group_size,
            "bases": {base.name: digest_of(self.model(base.name)) for base in self.bases},
        }

    def prepare(self, say: Callable[[str], None]) -> None:
        """Train the bases that are not there yet."""
        for base in self.bases:
            folder = self._folder(base.name)
            if (folder / "config.json").is_file():
                self.model(base.name)  # refused here if its shape is another one
                say(f"base {base.name}: kept from {folder}")
                continue
            model = train_base(base, self.problems, self.device, say)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with complete_folder(folder) as unfinished:
                save_base(model, unfinished)

    def _folder(self, base: str) -> Path:
        return self.folder / "bases" / base

    def _origin(self, start: Start) -> tuple[str, ...]:
        """What ``_load_origin`` knows the first weights by: here the base alone."""
        return (start.base,)

    def _load_origin(self, base: str) -> torch.nn.Module:
        """The model that runs begin at; kept as ``_origin_model``."""
        return self.model(base)

    def _settings_of(self, base: str) -> BaseSettings:
        for settings in self.settings.bases:
            if settings.name == base:
                return settings
        names = ", ".join(settings.name for settings in self.settings.bases)
        raise ConfigurationError(f"bases: {base!r} is unknown; choose among {names}")

    def _load(self, base: str) -> torch.nn.Module:
        return load_base(self._settings_of(base), self._folder(base))

    def _share(self, *origin: str) -> SharedParts:
        return SharedParts(self._origin_model(*origin), self.layout.tokens - 1, self.device, self.dtype)

    def candidates(self, base: str) -> list[Candidate]:
        """All linear modules of the base's layers."""
        return list(self._candidates(base))

    def _find(self, base: str) -> tuple[Candidate, ...]:
        return tuple(find_candidates(self.model(base)))

    def step_flops(self, base: str, choice: Choice) -> float:
        """Operations of one optimizer step, see ``flops``: what steps are matched by."""
        return self._step_flops(base, choice, self.settings.batch_size)

    def _step_flops(self, base: str, choice: Choice, rows: int) -> float:
        return step_flops(
            self.model(base).config,
            self._candidates(base),
            choice,
            rows=rows,
            positions=self.layout.tokens - 1,
            answer_tokens=self.layout.answer_tokens,
            zeroth_directions=self.settings.zeroth_directions,
        )

    def choose(self, start: Start, arms: Sequence[Arm]) -> dict[str, tuple[str, ...]]:
        """Probe the base on training problems of the start's task, on the CPU; no held-out problem is looked at."""

        def batch(purpose: str, index: int, rows: int) -> Batch:
            # Each has draws of its own, as arms may ask for more of them than others.
            problems = self.problems.drawn(start.task, start.seed, f"{purpose}/{index}", 1, rows)[0]
            return batch_of(problems, self.layout.answer_tokens)

        probes = Probes(
            self._origin_model(*self._origin(start)),
            torch.device("cpu"),
            partial(batch, "probe-warm-up"),
            partial(batch, "probe-score"),
        )
        rank = max((arm.rank for arm in arms), default=0) or PROBE_RANK
        return probes.choose_all(arms, self.settings.probe, rank, start.seed)

    def train(self, runs: Sequence[Run], keep: Callable[[Run, Outcome], None]) -> None:
        """Train in groups of one base and kind; the outcomes of a group are known together."""
        for run in runs:
            task_of(run.start.task)
            self._settings_of(run.start.base)
        with self._precision():
            for group, size in groups_of(runs, self.group_size, self._origin):
                filled = [*group, *[group[0]] * (size - len(group))]
                for run, outcome in zip(group, self._train_group(filled, len(group)), strict=True):
                    keep(run, outcome)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.settings.tf32
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def _train_group(self, runs: Sequence[Run], asked: int) -> list[Outcome]:
        """Outcomes of the first ``asked`` of the runs; the others only fill the group."""
        shared, settings = self._shared(*self._origin(runs[0].start)), self.settings
        ends = {run.steps for run in runs}
        steps = max(ends)
        replicas = Replicas(
            shared,
            runs,
            settings.lora_scale,
            settings.weight_decay,
            settings.clip_grad,
            settings.zeroth_epsilon,
            settings.zeroth_directions,
        )
        drawn, of_start = self._drawn_by_start(runs, steps)
        held_out, of_task = self._held_out_problems(runs)
        losses, curve = [], {}
        for step in range(steps + 1):
            if step % settings.eval_every == 0 or step in ends:
                curve[step] = self._evaluate(replicas, held_out, of_task)
            if step < steps:
                losses.append(self._train_step(replicas, *(values[of_start, step] for values in drawn)))
                self.stepped(sum(step < run.steps for run in runs[:asked]))
        return self._outcomes(runs, losses, curve)[:asked]

    def _drawn_by_start(self, runs: Sequence[Run], steps: int) -> tuple[list[Tensor], Tensor]:
        """What ``_drawn`` gives for each start, ``[starts, steps, ...]``, and the row of each run, ``[R]``."""
        keys = [(run.start.task, run.start.seed) for run in runs]
        order = list(dict.fromkeys(keys))
        drawn = zip(*(self._drawn(task, seed, steps) for task, seed in order), strict=True)
        rows = torch.tensor([order.index(key) for key in keys], device=self.device)
        return [torch.stack(values).to(self.device) for values in drawn], rows

    def _drawn(self, task: str, seed: int, steps: int) -> tuple[Tensor, ...]:
        """What the steps of a start are made of, ``[steps, ...]`` each: here the problems, uint8."""
        different, size = self.settings.train_problems, self.settings.batch_size
        if different is None:
            return (self.problems.drawn(task, seed, "train", steps, size),)
        return (self.problems.reshuffled(task, seed, "train", steps, size, different),)

    def _held_out_problems(self, runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
        """Problems ``[tasks, held_out, tokens]`` uint8, and the row of each run, ``[R]``."""
        tasks = list(dict.fromkeys(run.start.task for run in runs))
        problems = torch.stack([self.problems.held_out(task) for task in tasks]).to(self.device)
        return problems, torch.tensor([tasks.index(run.start.task) for run in runs], device=self.device)

    def _train_step(self, replicas: Replicas, problems: Tensor) -> Tensor:
        """One step on ``[R, B, tokens]`` uint8; returns the loss of each run before it, ``[R]``."""
        kept, problems = self.layout.answer_tokens, problems.long()

        def losses_of(weights: Weights) -> Tensor:
            logits = replicas.base.logits(weights, problems[..., :-1], kept)
            return -answer_log_probs(logits, problems[..., -kept:]).mean(dim=(1, 2))

        losses = losses_of(replicas.weights())
        replicas.step(losses)
        replicas.zeroth_step(losses_of)
        return losses.detach()

    @torch.no_grad()
    def _evaluate(self, replicas: Replicas, held_out: Tensor, of_task: Tensor) -> Tensor:
        """The measure on the held-out problems, and the share of answers right in every token: ``[2, R]`` float64.

        Every token is predicted after the right ones before it. An answer is right by that just when greedy decoding
        writes it.
        """
        kept, weights = self.layout.answer_tokens, replicas.weights()
        rows, totals = held_out.shape[1], []
        # As many rows at once as a training step has.
        for first in range(0, rows, self._rows):
            problems = held_out[:, first : first + self._rows][of_task].long()
            logits, answers = replicas.base.logits(weights, problems[..., :-1], kept), problems[..., -kept:]
            right = (logits.argmax(-1) == answers).all(-1)
            values = self._values(answer_log_probs(logits, answers))
            totals.append(torch.stack([values.double().sum(-1), right.double().sum(-1)]))
        return torch.stack(totals).sum(dim=0) / rows

    def _values(self, log_probs: Tensor) -> Tensor:
        """The measure of each problem, ``[R, B]``, from the log-probabilities of its answer, ``[R, B, P]``."""
        return -log_probs.mean(dim=-1)

    @property
    def _rows(self) -> int:
        """Problems in one pass of a replica."""
        return self.settings.batch_size

    def _outcomes(self, runs: Sequence[Run], losses: Sequence[Tensor], curve: Mapping[int, Tensor]) -> list[Outcome]:
        """What the harness is told; ``losses`` ``[R]`` of each step, ``curve`` by step as ``_evaluate`` gives it."""
        points = {step: values.tolist() for step, values in curve.items()}
        finite = torch.stack(list(losses)).isfinite().T.tolist()
        outcomes = []
        for index, run in enumerate(runs):
            # A run that is shorter than others of its group ends at its own last step.
            own = {step: v for step, v in points.items() if step % self.settings.eval_every == 0 or step == run.steps}
            own = {step: v for step, v in own.items() if step <= run.steps}
            bad = finite[index].index(False) if False in finite[index] else run.steps + 1
            kept = []
            for step, (values, accuracies) in own.items():
                if step > bad or not math.isfinite(values[index]):
                    break
                kept.append((step, values[index], accuracies[index]))
            outcomes.append(
                Outcome(
                    curve=tuple((step, value) for step, value, _ in kept),
                    measures={"exact_match": kept[-1][2] if kept else 0.0},
                    trainable_parameters=trainable_parameters(self._candidates(run.start.base), run.choice),
                    flops=run.steps * self.step_flops(run.start.base, run.choice),
                    diverged=len(kept) < len(own),
                )
            )
        return outcomes


def groups_of(
    runs: Sequence[Run], size: int, origin: Callable[[Start], tuple[str, ...]] = lambda start: (start.base,)
) -> Iterator[tuple[list[Run], int]]:
    """Runs that can train at once, with the size that their group is filled up to, which follows from each run alone.

    A group has one origin, one width of the factors and one kind of adapter, and zeroth order or none. Hybrid runs, of
    which a plan has most, come ``size`` at a time. Those that tune everything fully, or nothing, come ``size / 8`` at a
    time: they are few, and a group costs what a full one does.

    Raises:
        ConfigurationError: a run trains nothing, or takes no step.
    """
    alike: dict[tuple, list[Run]] = {}
    for run in runs:
        choice = run.choice
        if run.steps < 1 or (not choice.full and not choice.rank):
            raise ConfigurationError(
                f"arm {run.arm}: nothing would train; give it steps, and a rank or modules to tune fully"
            )
        place = origin(run.start), factor_width(choice.rank), choice.dora, bool(choice.full), choice.zeroth
        alike.setdefault(place, []).append(run)
    for (_, width, dora, full, _), members in alike.items():
        filled = size if full and width and not dora else max(1, size // FEWER)
        # A group goes on until its longest run ends.
        members.sort(key=lambda run: run.steps)
        for first in range(0, len(members), filled):
            yield members[first : first + filled], filled
