"""Which checkpoint of a run did best in validation, remembered in one file beside the checkpoints.

    best_checkpoint.json   step, checkpoint   the best one, a folder name; both null while there is none
                           metric, value, larger_is_better
                           validations        [[step, value], …] of this line of the run, in order

A step is the best that was validated and has a checkpoint; of equal ones the first. Trainers validate a step before or
after they save it, and a run may be killed between the two: so every value is kept and the choice is made anew from
what is on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.files import complete_file
from hybrid_lora_plugin.training.checkpoint import has_trained

FILE = "best_checkpoint.json"
#: how verl's names of a validation's metrics begin
VALIDATION = ("val-", "val/")
_SMALLER = ("loss", "perplexity", "ppl", "error")


class Measured(NamedTuple):
    """What a validation says of a step."""

    #: its name, or those it is the mean of
    metric: str
    value: float


class BestCheckpoint:
    """The record of one run.

    Args:
        checkpoints: folder with the run's ``global_step_N``.
        metric: name of the metric that decides; None for the usual one.
        larger_is_better: None to go by the metric's name.
        resumed: step that the run goes on from, 0 for a fresh one. What was measured after it belongs to another line
            of the run and is forgotten.
    """

    def __init__(self, checkpoints: Path, metric: str | None, larger_is_better: bool | None, resumed: int) -> None:
        self._checkpoints, self._wanted, self._larger = checkpoints, metric, larger_is_better
        self._unusual_said = False
        before = _read(checkpoints / FILE)
        self._metric: str | None = before.get("metric")
        self._validations = [(step, value) for step, value in before.get("validations", []) if step <= resumed]
        self._written = before

    def record(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Note a validation, if there is one among the metrics of a step.

        Returns:
            Lines for the user: what cannot be compared.

        Raises:
            ConfigurationError: the metric that was asked for is not among those of a validation.
        """
        measured = measured_by(metrics, self._wanted)
        if measured is None:
            if self._unusual_said or not any(name.startswith(VALIDATION) for name in metrics):
                return []
            self._unusual_said = True
            return [
                "WARNING: no best checkpoint is chosen, as the validation has neither val-core/…/mean@N nor val/loss; "
                "give hybrid_lora.best.metric"
            ]
        if not math.isfinite(measured.value):
            return [f"WARNING: {measured.metric} of step {step} is {measured.value}: it cannot be the best checkpoint"]
        lines = []
        if self._metric not in (None, measured.metric) and self._validations:
            lines.append(
                f"WARNING: the best checkpoint is chosen by {measured.metric} from step {step} on; the "
                f"{len(self._validations)} validations before had {self._metric}, which says nothing about it"
            )
            self._validations = []
        self._metric = measured.metric
        self._validations = [pair for pair in self._validations if pair[0] != step] + [(step, measured.value)]
        return lines

    def choose(self) -> str | None:
        """Write the best of what is there now; returns a line for the user where it is another one than before."""
        larger = self._larger_is_better()
        best = _best(self._checkpoints, self._validations, larger)
        record = {
            "step": best and best[0],
            "checkpoint": best and _folder(self._checkpoints, best[0]).name,
            "metric": self._metric,
            "value": best and best[1],
            "larger_is_better": larger,
            "validations": [list(pair) for pair in self._validations],
        }
        if record == self._written or (not self._validations and not self._written):
            return None
        before, self._written = self._written.get("step"), record
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        with complete_file(self._checkpoints / FILE) as unfinished:
            unfinished.write_text(json.dumps(record, indent=1) + "\n")
        if best is None or record["step"] == before:
            return None
        return f"best checkpoint: {record['checkpoint']}, {self._metric} {best[1]:.6g}"

    def _larger_is_better(self) -> bool:
        if self._larger is not None:
            return self._larger
        return not any(word in (self._metric or "").lower() for word in _SMALLER)


def measured_by(metrics: Mapping[str, Any], wanted: str | None) -> Measured | None:
    """The value that decides, out of the metrics of a step; None if the step was not validated, or not as usual.

    Args:
        metrics: as verl logs them: ``val-core/SOURCE/VARIABLE/mean@N`` and others from rollouts, ``val/loss`` from
            labelled rows.
        wanted: name of one of them; None for the mean of those of the core, or the loss.

    Raises:
        ConfigurationError: the step was validated, and the metric that was asked for is not there.
    """
    validation = sorted(name for name in metrics if name.startswith(VALIDATION))
    if wanted is not None:
        if wanted in metrics:
            return Measured(wanted, float(metrics[wanted]))
        names = validation
    else:
        core = [n for n in validation if n.startswith("val-core/") and n.rpartition("/")[2].startswith("mean@")]
        names = core or [name for name in validation if name == "val/loss"]
        if names:
            label = names[0] if len(names) == 1 else f"mean of {', '.join(names)}"
            return Measured(label, sum(float(metrics[name]) for name in names) / len(names))
    if wanted is None or not validation:
        return None
    raise ConfigurationError(
        f"hybrid_lora.best.metric: {wanted!r} is not among the metrics of the validation, which are "
        f"{', '.join(validation)[:400]}; give one of them, or hybrid_lora.best.keep=false",
        see="no-metric-for-the-best-checkpoint",
    )


def best_step(checkpoints: Path) -> int | None:
    """Step of the best checkpoint that is there now; None if there is none, or nothing was validated.

    Args:
        checkpoints: folder with the run's ``global_step_N``.
    """
    record = _read(checkpoints / FILE)
    best = _best(checkpoints, record["validations"], record["larger_is_better"]) if record else None
    return best and best[0]


def _best(checkpoints: Path, validations: list, larger: bool) -> tuple[int, float] | None:
    best = None
    for step, value in validations:
        better = best is None or (value > best[1] if larger else value < best[1])
        if better and has_trained(_folder(checkpoints, step)):
            best = step, value
    return best


def _folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"global_step_{step}"


def _read(file: Path) -> dict[str, Any]:
    """The file's content; nothing where it is not there.

    Raises:
        ConfigurationError: it is there and not what this package writes.
    """
    try:
        record = json.loads(file.read_text())
        steps = [(int(step), float(value)) for step, value in record["validations"]]
        return {
            "step": record["step"],
            "checkpoint": record["checkpoint"],
            "metric": record["metric"],
            "value": record["value"],
            "larger_is_better": bool(record["larger_is_better"]),
            "validations": [list(pair) for pair in steps],
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"checkpoint: {str(file)!r} cannot be read ({error!r}); remove it to choose the best checkpoint anew",
            see="checkpoint-cannot-be-read",
        ) from error
