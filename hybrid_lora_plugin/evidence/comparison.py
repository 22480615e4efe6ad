"""What the compared runs say: the value of every arm at every start, differences, and whether there is a gap."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.arms import FULL, LORA, PlannedArm, baseline_of, find_arms
from hybrid_lora_plugin.evidence.intervals import SUPPORTED, Difference, difference
from hybrid_lora_plugin.evidence.protocol import Start
from hybrid_lora_plugin.evidence.study import Study
from hybrid_lora_plugin.evidence.tuning import held_out

Cell = tuple[str, str]


@dataclass(frozen=True)
class Row:
    """An arm in a table.

    Attributes:
        arm: which.
        mean, median: of its values over starts; the value of a random arm at a start is the mean over its draws.
        sd: over seeds within a base and task; over several of these the root of the mean square; None of one seed.
        against_random: its difference to ``random``; None for that arm and where there is none.
        trainable: mean number of weights that got a gradient.
        flops: mean number of floating point operations of a run.
        diverged, runs: how many.
    """

    arm: PlannedArm
    mean: float
    median: float
    sd: float | None
    against_random: Difference | None
    trainable: float
    flops: float
    diverged: int
    runs: int


@dataclass(frozen=True)
class Primary:
    """A primary comparison.

    Attributes:
        arm, other: which.
        pooled: over all starts, at the level that the primary comparisons share.
        by_cell: for each base and task at the plan's level.
    """

    arm: PlannedArm
    other: PlannedArm
    pooled: Difference
    by_cell: dict[Cell, Difference]


class Comparison:
    """The compared runs of a study, at the seeds of which all are there.

    Attributes:
        study: see ``Study``. seeds: these. missing: seeds of the plan of which runs are missing.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.seeds = study, study.complete_seeds()
        self.missing = [seed for seed in study.plan.seeds.compare if seed not in self.seeds]
        if not self.seeds:
            raise ConfigurationError(
                "stage: of no seed in seeds.compare all runs are there, so there is nothing to report; run "
                "stage=compare"
            )
        self._lower = study.prepared.lower_is_better
        self._outcomes = {
            (arm.name, start): [study.results.get(run) for run in study.compared(arm, start)]
            for arm in study.arms
            for start in study.starts(self.seeds)
        }

    def outcomes(self, arm: PlannedArm, start: Start) -> list:
        """What came of the runs of an arm at a start, one for each draw."""
        return self._outcomes[arm.name, start]

    def value(self, arm: PlannedArm, start: Start) -> float:
        """Held-out value of an arm at a start, mean over its draws."""
        return statistics.fmean(held_out(outcome) for outcome in self.outcomes(arm, start))

    def difference(
        self, arm: PlannedArm, other: PlannedArm, cells: Sequence[Cell], level: float | None = None
    ) -> Difference:
        """Of two arms over some bases and tasks."""
        plan = self.study.plan
        by_seed = [
            [self.value(arm, start) - self.value(other, start) for start in self._starts(seed, cells)]
            for seed in self.seeds
        ]
        return difference(by_seed, self._lower, level or plan.level, plan.resamples)

    def _starts(self, seed: int, cells: Sequence[Cell]) -> list[Start]:
        return [Start(base, task, seed) for base, task in cells]

    def rows(self, cells: Sequence[Cell]) -> list[Row]:
        """Every arm over some bases and tasks, the best against ``random`` first."""
        rows = [self._row(arm, cells) for arm in self.study.arms]
        sign = 1 if self._lower else -1

        def place(row: Row) -> tuple:
            # The baseline differs from itself by nothing.
            return sign * (row.against_random.mean if row.against_random else 0.0), row.arm.name

        by_mean = not any(row.against_random for row in rows)
        return sorted(rows, key=(lambda row: (sign * row.mean, row.arm.name)) if by_mean else place)

    def _row(self, arm: PlannedArm, cells: Sequence[Cell]) -> Row:
        starts = [start for seed in self.seeds for start in self._starts(seed, cells)]
        values = {start: self.value(arm, start) for start in starts}
        outcomes = [outcome for start in starts for outcome in self.outcomes(arm, start)]
        within = [
            statistics.variance([values[Start(base, task, seed)] for seed in self.seeds])
            for base, task in cells
            if len(self.seeds) > 1
        ]
        baseline = baseline_of(self.study.arms, arm)
        return Row(
            arm=arm,
            mean=statistics.fmean(values.values()),
            median=statistics.median(values.values()),
            sd=statistics.fmean(within) ** 0.5 if within else None,
            against_random=self.difference(arm, baseline, cells) if baseline not in (None, arm) else None,
            trainable=statistics.fmean(outcome.trainable_parameters for outcome in outcomes),
            flops=statistics.fmean(outcome.flops for outcome in outcomes),
            diverged=sum(outcome.diverged for outcome in outcomes),
            runs=len(outcomes),
        )

    # -- is there a gap

    @cached_property
    def gaps(self) -> dict[Cell, Difference]:
        """Full fine-tuning against LoRA for each base and task; empty where the plan lacks one of them."""
        both = self._full_and_lora()
        return {place: self.difference(*both, [place]) for place in self.study.cells} if both else {}

    @cached_property
    def pooled_gap(self) -> Difference | None:
        """The same over all starts."""
        both = self._full_and_lora()
        return self.difference(*both, self.study.cells) if both else None

    def _full_and_lora(self) -> tuple[PlannedArm, PlannedArm] | None:
        found = {arm.name: arm for arm in self.study.arms if arm.name in (FULL, LORA)}
        return (found[FULL], found[LORA]) if len(found) == 2 else None

    def has_gap(self, place: Cell) -> bool:
        """Whether full fine-tuning is better than LoRA there, as far as the interval tells; True if nobody looked."""
        return place not in self.gaps or self.gaps[place].verdict == SUPPORTED

    # -- what the study is for

    @cached_property
    def primaries(self) -> list[Primary]:
        """The primary comparisons in the plan's order, each budget by itself."""
        plan, arms = self.study.plan, self.study.arms
        pairs = []
        for at, one in enumerate(plan.primary):
            for arm in find_arms(arms, one["arm"], f"primary[{at}].arm"):
                for name in one["against"]:
                    others = find_arms(arms, name, f"primary[{at}].against")
                    # At the same budget, where the other arm has one.
                    pairs += [(arm, other) for other in others if len(others) == 1 or other.budget == arm.budget]
        level = 1 - (1 - plan.level) / len(pairs)
        cells = self.study.cells
        return [
            Primary(
                arm,
                other,
                self.difference(arm, other, cells, level),
                {place: self.difference(arm, other, [place]) for place in cells},
            )
            for arm, other in pairs
        ]
