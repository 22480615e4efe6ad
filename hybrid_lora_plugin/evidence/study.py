"""One comparison in its folder: which runs it has, which of them are there, and what they need to begin."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config_evidence import EvidencePlanConfig, EvidenceRatesConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.arms import (
    LORA_MATCHED,
    MATCHED_STEPS,
    PlannedArm,
    base_name,
    matched_to,
    plain_of,
    planned_arms,
)
from hybrid_lora_plugin.evidence.matching import MatchedRank, matched_rank, matched_steps, trainable_parameters
from hybrid_lora_plugin.evidence.placed import left_frozen, trained_fully
from hybrid_lora_plugin.evidence.protocol import Arm, Choice, Run, Start
from hybrid_lora_plugin.evidence.results import Choices, RunResults, choice_of, run_key
from hybrid_lora_plugin.evidence.tuning import (
    Rates,
    Tuned,
    cell,
    choose_rates,
    grid,
    only_rates,
    rates_of,
    tuning_draws,
)
from hybrid_lora_plugin.files import complete_file

PREPARED = "prepared.json"


@dataclass(frozen=True)
class Prepared:
    """What is known of a protocol once its bases are there; ``prepared.json``.

    Attributes:
        measure: name of the held-out value. lower_is_better: whether a smaller one is better.
        candidates: of each base.
        identity: what results depend on besides the plan, of ``choose`` and of ``train``, which may be other machines.
        protocol: name, settings, bases, tasks: what runs depend on and no run says of itself.
    """

    measure: str
    lower_is_better: bool
    candidates: dict[str, list[Candidate]]
    identity: dict[str, Any]
    protocol: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Prepared | None:
        """Of a folder; None where nothing was prepared."""
        file = folder / PREPARED
        if not file.exists():
            return None
        content = json.loads(file.read_text())
        content["candidates"] = {
            base: [Candidate(**one) for one in found] for base, found in content["candidates"].items()
        }
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Into a folder."""
        with complete_file(folder / PREPARED) as file:
            file.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


class Study:
    """The runs of a plan and their results.

    Attributes:
        plan: see ``EvidencePlanConfig``. folder: of its results. prepared: see ``Prepared``.
        arms: in the order of the tables.
        choices, results: what is there.
    """

    def __init__(self, plan: EvidencePlanConfig, folder: Path, prepared: Prepared) -> None:
        self.plan, self.folder, self.prepared = plan, folder, prepared
        self.arms = planned_arms(plan, prepared.candidates.values())
        self.choices, self.results = Choices(folder), RunResults(folder)
        self._tuned: dict[tuple, Tuned] = {}
        self._ranks: dict[tuple, MatchedRank] = {}
        self._steps: dict[tuple, int] = {}
        self._names: dict[tuple, tuple[str, ...]] = {}
        self._frozen: dict[tuple, tuple[str, ...]] = {}

    def close(self) -> None:
        """No more results are coming."""
        self.choices.close()
        self.results.close()

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(base, task) of each kind of start."""
        return list(itertools.product(self.plan.bases, self.plan.tasks))

    def starts(self, seeds: Sequence[int]) -> list[Start]:
        """Starts of these seeds, seed by seed."""
        return [Start(base, task, seed) for seed in seeds for base, task in self.cells]

    # -- choices

    def asked(self, start: Start, draws: str = "all") -> list[Arm]:
        """The selecting arms at a start, with their draws; with ``draws="tuning"`` those that rates are chosen by."""
        candidates = self.prepared.candidates[start.base]
        return [
            arm.at(start, draw, candidates)
            for arm in self.arms
            if arm.selects and (draws == "all" or self.tunes(arm))
            for draw in (tuning_draws(self.plan, arm.draws) if draws == "tuning" else range(arm.draws))
        ]

    def unchosen(self) -> list[tuple[Start, list[Arm]]]:
        """Starts with the arms that have not chosen there."""
        found = []
        for seeds, draws in ((self.plan.seeds.tune, "tuning"), (self.plan.seeds.compare, "all")):
            for start in self.starts(seeds):
                missing = [arm for arm in self.asked(start, draws) if self.choices.get(start, arm.selection) is None]
                if missing:
                    found.append((start, missing))
        return found

    def full_names(self, arm: PlannedArm, start: Start, draw: int) -> tuple[str, ...]:
        """What an arm tunes fully at a start.

        Raises:
            ConfigurationError: it has not chosen there yet.
        """
        place = (arm.name, start, draw)
        if place not in self._names:
            candidates = self.prepared.candidates[start.base]
            order = {candidate.name: at for at, candidate in enumerate(candidates)}
            if not arm.selects:
                names = trained_fully(arm.kind, arm.placement, candidates)
            else:
                asked = arm.at(start, draw, candidates)
                names = self.choices.get(start, asked.selection)
                if names is None:
                    where = f"{start.base}, {start.task}, seed {start.seed}"
                    raise ConfigurationError(
                        f"stage: {asked.name} has not chosen its modules on {where} yet; run stage=choose first"
                    )
            self._names[place] = tuple(sorted(names, key=order.__getitem__))
        return self._names[place]

    def frozen_names(self, arm: PlannedArm, start: Start, draw: int) -> tuple[str, ...]:
        """What gets neither a gradient nor an adapter from an arm at a start; raises as ``full_names``."""
        full = self.full_names(arm, start, draw)
        # It follows from the modules that are chosen, which many starts may have in common.
        place = (arm.name, start.base, full)
        if place not in self._frozen:
            candidates = self.prepared.candidates[start.base]
            try:
                self._frozen[place] = left_frozen(arm.kind, arm.placement, candidates, full)
            except ConfigurationError as error:
                raise ConfigurationError(f"arm {arm.draw_name(draw)}: {error}") from error
        return self._frozen[place]

    def choice(self, arm: PlannedArm, start: Start, draw: int) -> Choice:
        """What an arm trains at a start."""
        full, frozen = self.full_names(arm, start, draw), self.frozen_names(arm, start, draw)
        return choice_of(arm.kind, full, self.rank(arm, start.base), frozen)

    # -- what is matched

    def rank(self, arm: PlannedArm, base: str) -> int:
        """LoRA rank of an arm on a base."""
        return self.matched_rank(arm, base).rank if arm.role == LORA_MATCHED else arm.rank

    def matched_rank(self, arm: PlannedArm, base: str) -> MatchedRank:
        """The rank of ``lora_matched``, by the choices of the arm it is matched to at the starts that are compared."""
        if (arm.name, base) not in self._ranks:
            other, candidates = matched_to(self.plan, self.arms, arm), self.prepared.candidates[base]
            starts = [start for start in self.starts(self.plan.seeds.compare) if start.base == base]
            choices = [self.choice(other, start, draw) for start in starts for draw in range(other.draws)]
            trained = [trainable_parameters(candidates, one.full, one.rank, one.frozen) for one in choices]
            frozen = left_frozen(arm.kind, arm.placement, candidates, ())
            self._ranks[arm.name, base] = matched_rank(candidates, trained, frozen)
        return self._ranks[arm.name, base]

    def steps(self, arm: PlannedArm, base: str, task: str) -> int:
        """Optimizer steps of an arm.

        Those of ``lora_flops`` and ``lora_passes`` follow from the FLOPs of their two models in tuning.
        """
        if arm.role not in MATCHED_STEPS:
            return self.plan.steps
        if (arm.name, base, task) not in self._steps:
            lora = plain_of(self.arms, arm)
            own, wanted = (self._flops(one, base, task) for one in (lora, matched_to(self.plan, self.arms, arm)))
            self._steps[arm.name, base, task] = matched_steps(self.plan.steps, own, wanted)
        return self._steps[arm.name, base, task]

    def _flops(self, arm: PlannedArm, base: str, task: str) -> float:
        """Of a whole run, mean over the tuning starts."""
        found = []
        for seed in self.plan.seeds.tune:
            for draw in tuning_draws(self.plan, arm.draws):
                for rates in self.grid(arm):
                    outcome = self.results.get(self.run(arm, Start(base, task, seed), draw, rates))
                    if outcome is not None and not outcome.diverged:
                        found.append(outcome.flops)
                        break
        if not found:
            raise ConfigurationError(
                f"arms: steps are matched by the FLOPs of the runs of {arm.name} on {base}, {task}, and all diverged; "
                "give lower rates"
            )
        return sum(found) / len(found)

    # -- runs

    def run(self, arm: PlannedArm, start: Start, draw: int, rates: Rates) -> Run:
        """One training run of an arm."""
        choice = self.choice(arm, start, draw)
        steps = self.steps(arm, start.base, start.task)
        return Run(arm.draw_name(draw), start, choice, rates.full, rates.lora, steps, rates.zeroth)

    def rates(self, arm: PlannedArm) -> EvidenceRatesConfig:
        """What an arm's rates are chosen from."""
        return rates_of(self.plan.rates, base_name(arm.name))

    def grid(self, arm: PlannedArm) -> list[Rates]:
        """The pairs that an arm tries."""
        return grid(arm.kind, self.rates(arm))

    def tunes(self, arm: PlannedArm) -> bool:
        """Whether an arm has tuning runs: not where it has one pair of rates and no steps follow from its FLOPs."""
        matching = [one for one in self.arms if one.role in MATCHED_STEPS]
        measured = {plain_of(self.arms, one).name for one in matching}
        measured |= {matched_to(self.plan, self.arms, one).name for one in matching}
        return len(self.grid(arm)) > 1 or arm.name in measured

    def tuning_runs(self, arm: PlannedArm) -> Iterator[tuple[tuple[str, ...], Rates, Run]]:
        """(cell, rates, run) of every run that an arm's rates are chosen by."""
        for start in self.starts(self.plan.seeds.tune):
            place = cell(self.plan.tuning.per, start.base, start.task)
            for draw in tuning_draws(self.plan, arm.draws):
                for rates in self.grid(arm):
                    yield place, rates, self.run(arm, start, draw, rates)

    def untuned(self, roles: str) -> list[Run]:
        """Tuning runs that are not there.

        Args:
            roles: ``first`` for all arms but those whose steps follow from the runs of others, which are ``second``.
        """
        arms = [arm for arm in self.arms if (arm.role in MATCHED_STEPS) == (roles == "second")]
        return self._missing(run for arm in arms if self.tunes(arm) for _, _, run in self.tuning_runs(arm))

    def tuned(self, arm: PlannedArm, base: str, task: str) -> Tuned:
        """The rates of an arm, from the tuning runs; where it has none, the only ones that there are.

        Raises:
            ConfigurationError: some are missing.
        """
        place = cell(self.plan.tuning.per, base, task)
        if not self.tunes(arm) and (arm.name, place) not in self._tuned and not self._was_tuned(arm):
            self._tuned[arm.name, place] = only_rates(self.grid(arm))
        if (arm.name, place) not in self._tuned:
            tried: dict[tuple, dict[Rates, list]] = {}
            for where, rates, run in self.tuning_runs(arm):
                outcome = self.results.get(run)
                if outcome is None:
                    raise ConfigurationError(
                        f"stage: the rates of {arm.name} need a run that is not there yet; run stage=tune first"
                    )
                tried.setdefault(where, {}).setdefault(rates, []).append(outcome)
            for where, found in tried.items():
                self._tuned[arm.name, where] = choose_rates(
                    list(found.items()), self.prepared.lower_is_better, self.rates(arm)
                )
        return self._tuned[arm.name, place]

    def _was_tuned(self, arm: PlannedArm) -> bool:
        """Whether an arm without a choice of rates has tuning runs all the same: an earlier version made them."""
        try:
            return all(self.results.get(run) is not None for _, _, run in self.tuning_runs(arm))
        except ConfigurationError:  # it has not chosen its modules at those starts
            return False

    def compared(self, arm: PlannedArm, start: Start) -> list[Run]:
        """The runs of an arm at a start that is compared, one for each draw."""
        rates = self.tuned(arm, start.base, start.task).rates
        return [self.run(arm, start, draw, rates) for draw in range(arm.draws)]

    def uncompared(self) -> list[Run]:
        """Compared runs that are not there, seed by seed, so that what was ended early has whole seeds."""
        starts = self.starts(self.plan.seeds.compare)
        return self._missing(run for start in starts for arm in self.arms for run in self.compared(arm, start))

    def complete_seeds(self) -> list[int]:
        """Seeds of which every compared run is there."""
        missing = {run.start.seed for run in self.uncompared()}
        return [seed for seed in self.plan.seeds.compare if seed not in missing]

    def _missing(self, runs: Iterator[Run]) -> list[Run]:
        # Arms that choose the same modules share a run.
        found = {}
        for run in runs:
            if self.results.get(run) is None:
                found.setdefault(run_key(run), run)
        return list(found.values())
