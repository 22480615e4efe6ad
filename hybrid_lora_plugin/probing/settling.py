"""When a probe that finds its own length may stop: the warm-up once the choice of modules no longer moves, the scoring
once a bootstrap is sure of nearly all of it.

Both look at the modules that would be chosen now, by the criterion and the budget that were asked for. Every check is a
function of what was measured, so it is the same on all ranks and after a resume.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hybrid_lora_plugin.allocation.budget import FULL, assign
from hybrid_lora_plugin.allocation.consensus import overlap
from hybrid_lora_plugin.allocation.placement import placement_record, places_of
from hybrid_lora_plugin.allocation.schema import AutoStop
from hybrid_lora_plugin.allocation.stability import bootstrap, is_decided
from hybrid_lora_plugin.allocation.stopping import LIMIT, SETTLED
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import AUTO, ProbeCommandConfig
from hybrid_lora_plugin.errors import ConfigurationError, ProbeError
from hybrid_lora_plugin.probing.method import ProbeMethod
from hybrid_lora_plugin.scoring import Measured, get_criterion, score_modules
from hybrid_lora_plugin.scoring.measurements import (
    ADALORA_IMPORTANCE,
    ADALORA_RANK,
    ALPHA,
    AUTOLORA_ALPHA,
    DELTA_NORM,
    GRADIENT_NORM,
    LORA_OUTPUT,
    SNIP,
)

#: Partitions between two looks at the scores.
CHECK_PARTITIONS = 8
#: Looks in a row that must find enough: one alone may be chance, the more the fewer rows it is of. (On a tiny model all
#: modules were decided after 8 partitions, and 86 % after 16 and 24.)
IN_A_ROW = 2
_MEASURED_ONCE = {ALPHA, DELTA_NORM, ADALORA_RANK, ADALORA_IMPORTANCE, AUTOLORA_ALPHA}
_CONTROLS = {LORA_OUTPUT, GRADIENT_NORM, SNIP}


def check_auto(config: ProbeCommandConfig) -> None:
    """Refuse ``auto`` where the criterion cannot say when it is enough.

    Raises:
        ProbeError: naming the option and the way out.
    """
    criterion = get_criterion(config.criterion)
    if config.probe.partitions == AUTO and _MEASURED_ONCE.issuperset(criterion.needs):
        raise ProbeError(
            f"probe.partitions: 'auto' asks how sure the scores of the batches are, and criterion {criterion.name!r} "
            f"is measured once; give a number, e.g. 20"
        )
    if config.probe.warmup_steps == AUTO and criterion.method == "adalora":
        raise ProbeError(
            "probe.warmup_steps: 'auto' leaves AdaLoRA's pruning without a schedule, which is a share of the steps; "
            "give a number, e.g. 500"
        )
    if config.probe.warmup_steps == AUTO and criterion.method == "lookahead":
        raise ProbeError(
            "probe.warmup_steps: 'auto' is not possible with criterion 'lookahead', of which one look costs as much as "
            "all its scores; give a number, e.g. 500, or settle it with criterion=hybrid first"
        )


def chosen_modules(config: ProbeCommandConfig, candidates: Sequence[Candidate], measured: Mapping[str, Tensor]) -> list:
    """Numbers of the modules that would be fully fine-tuned by what was measured so far; none if nothing can be said.

    Args:
        config: criterion, direction, normalisation, budget and placement.
        candidates: the M candidates.
        measured: by name, ``[T, M]`` or ``[M]``.
    """
    criterion = get_criterion(config.criterion)
    direction = criterion.direction if config.direction == "auto" else config.direction
    try:
        scored = score_modules(config.criterion, Measured(candidates, measured, config.control, config.normalise))
        places = places_of(placement_record(config.placement, candidates), candidates)
        modules = assign(candidates, scored, config.budget, direction, config.lora.rank, places).modules
    except ConfigurationError:
        # Early in a warm-up there may be no order yet; if there is none at the end, the selection says so.
        return []
    return [index for index, candidate in enumerate(candidates) if modules[candidate.name] == FULL]


class WarmupChecks:
    """The choices that a warm-up went through, every so many steps.

    Each check scores the same few partitions of the first validation batches, so that what differs between two of them
    is the warm-up and not the draw.
    """

    def __init__(
        self,
        config: ProbeCommandConfig,
        measure: Callable[[], list[int]],
        kept: Sequence[tuple[int, list[int]]],
        keep: Callable[[list[tuple[int, list[int]]]], None],
    ) -> None:
        """Of a warm-up that may have begun earlier.

        Args:
            config: of the probe.
            measure: gives the choice of now; changes nothing that the warm-up depends on.
            kept: step and choice of each check up to the step the warm-up is at.
            keep: writes all of them down.
        """
        self._probe, self._measure, self._keep = config.probe, measure, keep
        self._checks = [(int(step), list(choice)) for step, choice in kept]

    @property
    def overlaps(self) -> list[float]:
        """Of each choice with the one before, from the second on."""
        choices = [choice for _, choice in self._checks]
        return [overlap(before, after) for before, after in zip(choices, choices[1:], strict=False)]

    @property
    def settled(self) -> bool:
        """Whether the last two comparisons agreed."""
        last = self.overlaps[-IN_A_ROW:]
        return len(last) == IN_A_ROW and all(value >= self._probe.warmup_agreement for value in last)

    def look(self, step: int) -> str | None:
        """Check after ``step`` steps, if that is due and was not done: what it found, in words."""
        if step == 0 or step % self._probe.warmup_check_steps or any(step == at for at, _ in self._checks):
            return None
        self._checks.append((step, self._measure()))
        self._keep(self._checks)
        if not self.overlaps:
            return None
        return (
            f"after {step} steps {100 * self.overlaps[-1]:.0f} % of the choice is that of {self._checks[-2][0]} steps "
            f"({100 * self._probe.warmup_agreement:.0f} % wanted, twice in a row)"
        )

    def record(self) -> AutoStop:
        """What the artifact says."""
        probe = self._probe
        return AutoStop(
            limit=probe.max_warmup_steps,
            every=probe.warmup_check_steps,
            threshold=probe.warmup_agreement,
            checks=self.overlaps,
            reason=SETTLED if self.settled else LIMIT,
            partitions=probe.warmup_check_partitions,
        )


@contextlib.contextmanager
def scoring_within_warmup(method: ProbeMethod, criterion: str) -> Iterator[None]:
    """Let ``method`` score between two steps of its warm-up, which goes on as if nothing had been."""
    trained = [parameter.requires_grad for parameter in method.replicated]
    method.measure_controls = not _CONTROLS.isdisjoint(get_criterion(criterion).needs)
    method.prepare_scoring()
    try:
        yield
    finally:
        method.measure_controls = True
        for parameter, requires_grad in zip(method.replicated, trained, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


class SettledScores:
    """How much of the choice is decided by the partitions scored so far, looked at every ``CHECK_PARTITIONS``."""

    def __init__(
        self,
        config: ProbeCommandConfig,
        candidates: Sequence[Candidate],
        rows: Mapping[str, list[Tensor]],
        measured: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    ) -> None:
        """Of a probe whose warm-up is over.

        Args:
            config: of the probe.
            candidates: the M candidates.
            rows: what was measured so far by name, a list of ``[M, ...]``; grows while the probe goes on.
            measured: makes all that is measured, ``[T, M]`` or ``[M]`` by name, of some of them, ``[T, M, ...]``.
        """
        self._config, self._candidates, self._rows, self._measured = config, candidates, rows, measured
        self._shares: list[float] = []

    def share(self, done: int) -> float | None:
        """Share of the modules that are decided at the last look, after ``done`` partitions; None before the first."""
        while (len(self._shares) + 1) * CHECK_PARTITIONS <= done:
            self._shares.append(self._decided((len(self._shares) + 1) * CHECK_PARTITIONS, done))
        return self._shares[-1] if self._shares else None

    def settled(self, done: int) -> bool:
        """Whether the last two looks found enough."""
        self.share(done)
        last = self._shares[-IN_A_ROW:]
        return len(last) == IN_A_ROW and all(share >= self._config.probe.settled_share for share in last)

    def record(self, done: int) -> AutoStop:
        """What the artifact says."""
        return AutoStop(
            limit=self._config.probe.max_partitions,
            every=CHECK_PARTITIONS,
            threshold=self._config.probe.settled_share,
            checks=list(self._shares),
            reason=SETTLED if self.settled(done) else LIMIT,
        )

    def _decided(self, partitions: int, done: int) -> float:
        config = self._config
        batches = math.ceil(partitions / config.probe.partitions_per_batch)
        # What is measured once a batch has fewer rows than there are partitions.
        stacked = {
            name: torch.stack(rows[: partitions if len(rows) == done else batches]) for name, rows in self._rows.items()
        }
        measured = self._measured(stacked)
        criterion = get_criterion(config.criterion)
        direction = criterion.direction if config.direction == "auto" else config.direction
        record = bootstrap(config, self._candidates, measured, direction, config.lora.rank)
        if record is None:
            raise ProbeError(
                f"probe.partitions: 'auto' asks how sure the scores of the batches are, and criterion "
                f"{criterion.name!r} has one batch or none; give a number, e.g. 20"
            )
        chosen = set(chosen_modules(config, self._candidates, measured))
        decided = [is_decided(share, index in chosen) for index, share in enumerate(record.shares)]
        return sum(decided) / len(decided)
