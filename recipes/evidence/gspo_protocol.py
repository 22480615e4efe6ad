"""GSPO in plain torch as a protocol of hybrid-lora-evidence: the runs of ``gap_search``, chosen for as those of verl.

    protocol: recipes.evidence.gspo_protocol:GspoProtocol

Its settings are those of ``rl``, of which bases, tasks, measure, probe and eval_every are read; the tasks are those of
noisy_adder. A run takes twenty seconds of a core where one under verl takes minutes, so seeds are many. What it leaves
out is vLLM, verl and Ray: nothing is said of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.protocol import Outcome, Run
from hybrid_lora_plugin.evidence.verl_runs import VerlProtocol
from recipes.demo import noisy_adder
from recipes.evidence import gap_search

PROBLEMS, ANSWERS, UPDATES = 16, 8, 2
#: tokens of a problem and its answer, with the template's
TOKENS = 11


class GspoProtocol(VerlProtocol):
    """Arms choose by the same probes as under ``rl``; ``gap_search`` trains them.

    ``Outcome.flops`` counts the updates alone, as that of ``rl`` does.

    Args:
        settings, folder, device, bases, tasks: as those of ``VerlProtocol``.

    Raises:
        ConfigurationError: as there, and for a task that noisy_adder does not have.
    """

    trains_in_processes = True

    def __init__(
        self, settings: Mapping[str, Any], folder: Path, device: str, bases: Sequence[str], tasks: Sequence[str]
    ) -> None:
        super().__init__(settings, folder, device, bases, tasks)
        for name in tasks:
            if name not in noisy_adder.TASKS:
                raise ConfigurationError(f"tasks: {name!r} is unknown; give some of {', '.join(noisy_adder.TASKS)}")

    def train(self, runs: Sequence[Run], keep: Callable[[Run, Outcome], None]) -> None:
        """One after the other."""
        for run in runs:
            keep(run, self._trained(run))

    def _trained(self, run: Run) -> Outcome:
        choice, candidates = run.choice, self.candidates(run.start.base)
        if choice.dora:
            raise ConfigurationError(f"arms: {run.arm}: there is no DoRA here; leave it out")
        whole = len(choice.full) == len(candidates)
        model = Path(self._bases[run.start.base].path)
        found = gap_search.run(
            model.parent,
            run.start.task,
            arm="full" if whole else "hybrid" if choice.full else "lora",
            rank=choice.rank,
            full=() if whole else choice.full,
            full_lr=run.full_lr,
            lora_lr=run.lora_lr,
            steps=run.steps,
            seed=run.start.seed,
            eval_every=self.settings.eval_every,
            problems=PROBLEMS,
            answers=ANSWERS,
            updates=UPDATES,
        )
        tokens = run.steps * PROBLEMS * ANSWERS * TOKENS
        return Outcome(
            curve=tuple((step, value) for step, value in found["accuracy"]),
            measures={"reward": found["reward"]},
            trainable_parameters=found["trainable"],
            flops=tokens * (4.0 * self._weights(run.start.base) + 2.0 * found["trainable"]),
        )
