"""A logger among verl's own, which learns what validations say and keeps the record of the best checkpoint.

verl has a hook for checkpoints, ``trainer.checkpoint_callback_class`` (0.9.1 ``trainer/ppo/checkpoint_callback.py``).
It is the v1 trainer's alone, is called before the step is validated, and is given no metrics; so it stays the user's.
Every trainer gives its metrics to ``verl.utils.tracking.Tracking``.
"""

from __future__ import annotations

import atexit
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.training.best_checkpoint import BestCheckpoint
from hybrid_lora_plugin.verl_backend.earlier_checkpoint import checkpoint_to_resume
from hybrid_lora_plugin.verl_backend.run_kinds import RunKind, kind_of_run


class ValidationLog:
    """What verl's ``Tracking`` calls with the metrics of each step.

    Args:
        best: record of the run.
    """

    def __init__(self, best: BestCheckpoint) -> None:
        self._best = best
        # A run that was killed between a save and the next line of the log has it to do.
        self._choose()
        # A trainer may save after the last line.
        atexit.register(self._choose)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Note a validation among the metrics, and choose."""
        for line in self._best.record(int(step), data):
            print(f"hybrid_lora: {line}", flush=True)
        self._choose()

    def _choose(self) -> None:
        line = self._best.choose()
        if line:
            print(f"hybrid_lora: {line}", flush=True)


def log_for_run(config: Mapping[str, Any] | None) -> ValidationLog | None:
    """The log of a run, from the whole configuration that verl gives to ``Tracking``; None where it keeps no best."""
    node = (config or {}).get("hybrid_lora")
    if not node or node.get("phase") == "probe" or not (node.get("best") or {}).get("keep"):
        return None
    composed = OmegaConf.create(dict(config))
    if not saves(composed, kind_of_run(composed)):
        return None
    resumed = checkpoint_to_resume(composed)
    step = int(resumed.name.rpartition("_")[2]) if resumed is not None else 0
    best = node["best"]
    folder = Path(str(OmegaConf.select(composed, "trainer.default_local_dir")))
    return ValidationLog(BestCheckpoint(folder, best["metric"], best["larger_is_better"], step))


def saves(config: DictConfig, kind: RunKind) -> bool:
    """Whether a run saves checkpoints."""
    # SFT's trainer saves its last step whatever the frequency, which may be a word.
    return not kind.samples or (OmegaConf.select(config, "trainer.save_freq") or -1) > 0


def said_of_best(config: DictConfig, hybrid: HybridLoraConfig) -> Iterator[str]:
    """Lines for the user on which steps can be the best checkpoint, where not every validated one can.

    Args:
        config: the composed configuration.
        hybrid: its ``hybrid_lora`` node.
    """
    kind = kind_of_run(config)
    if not hybrid.best.keep or not saves(config, kind):
        return
    test, save = (OmegaConf.select(config, f"trainer.{name}_freq") for name in ("test", "save"))
    if not isinstance(test, int) or not isinstance(save, int):
        return
    if test <= 0:
        # Somebody who validates nothing has no use for the line, unless a metric was given.
        if hybrid.best.metric:
            yield f"hybrid_lora.best.metric: no best checkpoint, as trainer.test_freq={test} validates no step"
    elif save > 0 and test % save:
        yield (
            f"best checkpoint: of the steps validated (trainer.test_freq={test}) and saved (trainer.save_freq={save}) "
            f"only every {math.lcm(test, save)}th is both; give a save_freq that divides test_freq to judge them all"
        )
