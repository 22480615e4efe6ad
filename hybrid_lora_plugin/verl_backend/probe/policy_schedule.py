"""What each step of a policy probe is for: warming up, looking at what would be chosen now, or scoring.

Both ends know it from the number of the step: the dataset, which deals out the prompts, and the engine. Where the
warm-up finds its own length the engine leaves a note in a file once it is over; the dataset then goes on with prompts
to score, and the steps that were planned for more warm-up are not taken.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from hybrid_lora_plugin.config import AUTO, ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.probing.method import warmup_steps

WARM_UP, CHECK, SCORE = "warm-up", "check", "scoring"
#: criterion -> whether it needs adapters, for those that read gradients of frozen weights
GRADIENT_CRITERIA = {
    "signal_to_noise": False,
    "sign_consistency": False,
    "residual_gradient": True,
    "gradient_norm": True,
}
ENDED_FILE = "warmup_ended"


@dataclass(frozen=True)
class PolicySchedule:
    """The steps of a policy probe.

    Attributes:
        warmup: most steps that train.
        every: such steps between two checks; 0 without checks.
        check: steps of a check.
        scoring: most steps that are scored.
    """

    warmup: int
    every: int
    check: int
    scoring: int

    @classmethod
    def of(cls, config: ProbeCommandConfig) -> PolicySchedule:
        """Of a probe."""
        probe, warmup = config.probe, warmup_steps(config)
        auto = probe.warmup_steps == AUTO and warmup > 0
        each = probe.partitions_per_batch
        return cls(
            warmup,
            probe.warmup_check_steps if auto else 0,
            -(-probe.warmup_check_partitions // each) if auto else 0,
            -(-probe.most_partitions // each),
        )

    @staticmethod
    def may_end_early(probe: ProbeConfig) -> bool:
        """Whether it may be over before the last of its steps."""
        return AUTO in (probe.warmup_steps, probe.partitions)

    @property
    def before_scoring(self) -> int:
        """Most steps before the first that is scored."""
        return self.warmup + (self.warmup // self.every * self.check if self.every else 0)

    @property
    def steps(self) -> int:
        """Of the whole probe, at most."""
        return self.before_scoring + self.scoring

    def stage(self, step: int, ended: int | None) -> tuple[str, int]:
        """What step number ``step`` is for, and the number of that step within its stage or its check, from 0.

        Args:
            step: from 0.
            ended: the first step after the warm-up, once that is known.
        """
        end = self.before_scoring if ended is None else ended
        if step >= end:
            return SCORE, step - end
        if not self.every:
            return WARM_UP, step
        cycle, place = divmod(step, self.every + self.check)
        return (WARM_UP, cycle * self.every + place) if place < self.every else (CHECK, place - self.every)

    def warm_up_steps(self, step: int) -> int:
        """How many of the first ``step`` steps train, all of them before the end of the warm-up."""
        if not self.every:
            return step
        cycle, place = divmod(step, self.every + self.check)
        return cycle * self.every + min(place, self.every)


def read_ended(folder: str | Path) -> int | None:
    """The first step after the warm-up, as the engine left it in the unfinished probe's folder; None before."""
    with contextlib.suppress(OSError, ValueError):
        return int((Path(folder) / ENDED_FILE).read_text(encoding="utf-8"))
    return None


def write_ended(folder: str | Path, step: int | None) -> None:
    """Leave that note, or take it away."""
    file = Path(folder) / ENDED_FILE
    if step is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".new")
    unfinished.write_text(str(step), encoding="utf-8")
    unfinished.replace(file)


def length_in_words(config: ProbeCommandConfig) -> str:
    """How long a policy probe will be, for people."""
    probe, most = config.probe, warmup_steps(config)
    warmup = f"at most {most}" if probe.warmup_steps == AUTO and most else most
    partitions = f"at most {probe.most_partitions}" if probe.partitions == AUTO else probe.partitions
    return f"{warmup} warm-up steps, then {partitions} partitions"
