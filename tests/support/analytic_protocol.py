"""A protocol without a model: gradient descent on one quadratic a module, in closed form, in microseconds a run."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hybrid_lora_plugin.allocation.budget import allocate
from hybrid_lora_plugin.allocation.placement import places_of
from hybrid_lora_plugin.candidates import COMPONENT_OF_TYPE, Candidate
from hybrid_lora_plugin.config import BudgetConfig
from hybrid_lora_plugin.config_selection import NAMING
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.placed import placement_in, record_of
from hybrid_lora_plugin.evidence.protocol import Arm, Choice, Outcome, Protocol, Run, Start
from hybrid_lora_plugin.seeding import generator_for

#: type -> (d_in, d_out)
SHAPES = {"q_proj": (8, 8), "o_proj": (8, 8), "up_proj": (8, 24), "down_proj": (24, 8)}
LAYERS = 6
#: Runs after which ``train`` is interrupted, as by Ctrl-C.
STOP_AFTER = "ANALYTIC_STOP_AFTER"
#: seconds that a choice takes at the least
CHOOSE_SECONDS = "ANALYTIC_CHOOSE_SECONDS"


class AnalyticProtocol(Protocol):
    """What each module can still gain is known; full weights reach all of it, an adapter of rank r a share of it.

    The held-out value is ``Σ_m gain_m · (1 − reached_m · (1 − |1 − c · lr|^(2 · steps)))``: it falls with steps, grows
    without bound where a rate passes ``2 / c``, and has noise of the seed.
    """

    measure, lower_is_better = "loss", True

    def __init__(
        self, settings: Mapping[str, Any], folder: Path, device: str, bases: Sequence[str], tasks: Sequence[str]
    ) -> None:
        known = {"lora_reaches": 0.3, "version": 1} | ({"ignores_placement": False} if self.knows_placement else {})
        for name in settings:
            if name not in known:
                raise ConfigurationError(f"settings.{name}: unknown; give some of {', '.join(known)}")
        self.settings, self.folder, self.device = known | dict(settings), folder, device
        self.trained = 0

    def identity(self) -> dict[str, Any]:
        return {"device": "cpu" if self.device == "auto" else self.device, "version": self.settings["version"]}

    def prepare(self, say: Callable[[str], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "made").touch()

    def candidates(self, base: str) -> list[Candidate]:
        return [
            Candidate(
                f"model.layers.{layer}.{'self_attn' if COMPONENT_OF_TYPE[type_] == 'attention' else 'mlp'}.{type_}",
                layer, type_, COMPONENT_OF_TYPE[type_], d_in * d_out, d_in, d_out,
            )
            for layer in range(LAYERS)
            for type_, (d_in, d_out) in SHAPES.items()
        ]  # fmt: skip

    @functools.cache  # noqa: B019  an instance lives as long as its test
    def gains(self, start: Start) -> dict[str, float]:
        """What each module can gain: its own on a base and task, with noise of the seed."""
        found = {}
        for candidate in self.candidates(start.base):
            own = torch.rand((), generator=generator_for(f"{start.base}/{start.task}/{candidate.name}")).item() ** 3
            noise = torch.rand((), generator=generator_for(f"{start}/{candidate.name}")).item()
            found[candidate.name] = own * (0.8 + 0.4 * noise)
        return found

    def choose(self, start: Start, arms: Sequence[Arm]) -> dict[str, tuple[str, ...]]:
        assert (self.folder / "made").exists(), "chosen before it was prepared"
        time.sleep(float(os.environ.get(CHOOSE_SECONDS, 0)))
        return {arm.name: tuple(self._chosen(start, arm.selection)) for arm in arms}

    def _chosen(self, start: Start, selection: Mapping[str, Any]) -> list[str]:
        candidates, criterion = self.candidates(start.base), selection["criterion"]
        if criterion == "explicit":
            return list(selection["control.modules"])
        if criterion in NAMING:
            return [one.name for one in candidates if one.component == "attention"]
        if criterion == "spread":
            wanted = selection["control.type"]
            scores = [1.0 + one.layer if one.type == wanted else 0.0 for one in candidates]
        elif criterion == "random":
            stream = generator_for(f"random/{selection['control.seed']}")
            scores = torch.rand(len(candidates), generator=stream).tolist()
        elif criterion == "gradient_norm":
            scores = [-self.gains(start)[one.name] for one in candidates]
        else:
            stream = generator_for(f"{criterion}/{start.base}")
            scores = torch.rand(len(candidates), generator=stream).tolist()
        if selection.get("direction") in ("highest", "lowest") and criterion != "spread":
            scores = [-score for score in scores]
        budget = BudgetConfig(ratio=selection["budget.ratio"], overflow=selection["budget.overflow"])
        return allocate(candidates, scores, budget, "lowest").full_names

    # -- training

    def train(self, runs: Sequence[Run], keep: Callable[[Run, Outcome], None]) -> None:
        stop = int(os.environ.get(STOP_AFTER, "-1"))
        for run in runs:
            if self.trained == stop:
                raise KeyboardInterrupt
            self.trained += 1
            keep(run, self._trained(run))

    def _trained(self, run: Run) -> Outcome:
        choice, gains = run.choice, self.gains(run.start)
        curve = [(0, sum(gains.values()))]
        for step in range(run.steps // 4, run.steps + 1, run.steps // 4):
            value = sum(self._left(run, name, gain, step) for name, gain in gains.items())
            if value > 1e6:
                break
            curve.append((step, value))
        candidates = self.candidates(run.start.base)
        trainable = sum(
            one.parameters if one.name in choice.full else one.lora_parameters(choice.rank)
            for one in candidates
            if one.name not in choice.frozen
        )
        weights = sum(one.parameters for one in candidates)
        full = sum(one.parameters for one in candidates if one.name in choice.full)
        flops = float(run.steps * (4 * weights + 2 * full + 6 * (trainable - full)))
        return Outcome(tuple(curve), {"last": curve[-1][1]}, trainable, flops, curve[-1][0] < run.steps)

    def _left(self, run: Run, name: str, gain: float, step: int) -> float:
        choice: Choice = run.choice
        if name in choice.full:
            reached, rate = 1.0, 100 * run.full_lr
        elif choice.rank and name not in choice.frozen:
            reached = min(1.0, self.settings["lora_reaches"] * (1 + 0.1 * choice.rank) + 0.02 * choice.dora)
            rate = 10 * run.lora_lr
        else:
            return gain
        return gain * (1 - reached * (1 - abs(1 - rate) ** (2 * step)))


class PlacedProtocol(AnalyticProtocol):
    """The same, where arms may train in some components only: the module with the most to gain of those left open."""

    knows_placement = True

    def _chosen(self, start: Start, selection: Mapping[str, Any]) -> list[str]:
        placement = placement_in(selection)
        if not placement:
            return super()._chosen(start, selection)
        candidates = self.candidates(start.base)
        if selection["criterion"] == "explicit":
            return list(selection["control.modules"])
        places = places_of(record_of(placement, candidates), candidates)
        if self.settings["ignores_placement"]:
            return [candidates[0].name]
        chosen = [one.name for one, place in zip(candidates, places, strict=True) if place == "full"]
        open_ = [one.name for one, place in zip(candidates, places, strict=True) if place == "auto"]
        return chosen + sorted(open_, key=self.gains(start).__getitem__)[-1:]
