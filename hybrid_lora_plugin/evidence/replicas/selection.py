"""What each arm tunes fully at one start: the project's probe methods, criteria and budget, on a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.allocation.budget import FULL as FULL_ASSIGNMENT
from hybrid_lora_plugin.allocation.budget import assign
from hybrid_lora_plugin.candidates import Candidate, find_candidates
from hybrid_lora_plugin.config import ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.errors import AllocationError
from hybrid_lora_plugin.evidence.protocol import Arm
from hybrid_lora_plugin.evidence.selection_options import selection_config
from hybrid_lora_plugin.probing.forward import IGNORED, Batch
from hybrid_lora_plugin.probing.in_memory import measure_in_memory
from hybrid_lora_plugin.probing.method import warmup_steps
from hybrid_lora_plugin.probing.trial.in_memory import trial_in_memory
from hybrid_lora_plugin.scoring import Measured, get_criterion, score_modules

#: Methods that measure, bit for bit, all that another one does, and more.
_ALSO_MEASURED_BY = {"svd_lora": ("lookahead",)}
#: Number of the first batches of a trial, of both kinds.
TRIAL_FROM = 1_000_000


def batch_of(problems: Tensor, answer_tokens: int) -> Batch:
    """A batch of the probe from problems ``[B, tokens]``: the answers are the response."""
    ids = problems.long()
    labels = torch.full_like(ids, IGNORED)
    labels[:, -answer_tokens:] = ids[:, -answer_tokens:]
    return Batch(ids, torch.ones_like(ids), labels)


class Probes:
    """Probes of one model at one start, made as criteria ask for them and shared by those that can."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        warmup: Callable[[int, int], Batch],
        validation: Callable[[int, int], Batch],
    ) -> None:
        """For a plain model, which stays as it is.

        Args:
            model: the base, on any device.
            device: where to probe.
            warmup: number of a warm-up step, rows -> its batch.
            validation: number of a scoring batch, rows -> that batch; other draws.
        """
        self._model, self._device = model, device
        self._warmup, self._validation = warmup, validation
        self.candidates: list[Candidate] = find_candidates(model)
        # By method and the probe's settings, which an arm may say otherwise than the rest.
        self._measured: dict[tuple[str, str], dict[str, Tensor]] = {}
        #: methods in the order in which they probed
        self.runs: list[str] = []

    def measurements(self, config: ProbeCommandConfig) -> dict[str, Tensor]:
        """What the criterion of ``config`` reads; probes only if no earlier criterion of its method measured it."""
        criterion = get_criterion(config.criterion)
        if criterion.method is None:
            return {}
        settings = repr((warmup_steps(config), config.probe))
        for other in _ALSO_MEASURED_BY.get(criterion.method, ()):
            held = self._measured.get((other, settings), {})
            if all(need in held for need in criterion.needs):
                return held
        held = self._measured.setdefault((criterion.method, settings), {})
        if any(need not in held for need in criterion.needs):
            # A method may measure something for one criterion alone; what it measures besides is the same again.
            held |= self._probe(config, criterion.method)
        return held

    def _probe(self, config: ProbeCommandConfig, name: str) -> dict[str, Tensor]:
        self.runs.append(name)
        size = config.probe.batch_size
        return measure_in_memory(
            copy.deepcopy(self._model).requires_grad_(False).to(self._device),
            self.candidates,
            config,
            lambda step: self._warmup(step, size),
            lambda number: self._validation(number, size),
        )

    def choose_all(self, arms: Sequence[Arm], probe: ProbeConfig, rank: int, seed: int) -> dict[str, tuple[str, ...]]:
        """What ``choose`` says of each arm by name, asked in the order that takes the fewest probes."""
        more = {other for others in _ALSO_MEASURED_BY.values() for other in others}
        configs = {arm.name: selection_config(arm, probe, rank, seed) for arm in arms}
        first = sorted(arms, key=lambda arm: get_criterion(configs[arm.name].criterion).method not in more)
        return {arm.name: self.choose(arm, probe, rank, seed) for arm in first}

    def _by_trial(self, config: ProbeCommandConfig) -> tuple[str, ...]:
        modules, _ = trial_in_memory(
            copy.deepcopy(self._model).to(self._device),
            self.candidates,
            config,
            self.measurements,
            # Numbers that no probe asks for, so that the rows are others than those of its warm-up and its scores.
            lambda step, rows: self._warmup(TRIAL_FROM + step, rows),
            lambda number, rows: self._validation(TRIAL_FROM + number, rows),
        )
        return modules

    def choose(self, arm: Arm, probe: ProbeConfig, rank: int, seed: int) -> tuple[str, ...]:
        """The modules that an arm tunes fully, in the model's order.

        Raises:
            ConfigurationError: its selection cannot be used, or admits no module.
        """
        config = selection_config(arm, probe, rank, seed)
        criterion = get_criterion(config.criterion)
        if criterion.method == "trial":
            return self._by_trial(config)
        measured: Mapping[str, Tensor] = self.measurements(config)
        direction = criterion.direction if config.direction == "auto" else config.direction
        scored = score_modules(config.criterion, Measured(self.candidates, measured, config.control, config.normalise))
        if scored.fixed is not None and direction != criterion.direction:
            raise AllocationError(
                f"arm {arm.name}: direction has no effect on criterion {criterion.name}; leave it out"
            )
        assigned = assign(self.candidates, scored, config.budget, direction, rank).modules
        return tuple(c.name for c in self.candidates if assigned[c.name] == FULL_ASSIGNMENT)
