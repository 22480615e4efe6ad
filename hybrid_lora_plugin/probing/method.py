"""What the runner drives: a warm-up of extra parameters on a frozen model, then measurements on validation batches.

A criterion names the method it needs (``Criterion.method``); one method may serve many criteria.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from hybrid_lora_plugin.allocation.learning import rate_option
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import WITHOUT_WARMUP, ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.forward import Batch, Passes
from hybrid_lora_plugin.probing.optimizer import NamedAdamW


class ProbeMethod(abc.ABC):
    """One way of probing a model. Every rank makes the same calls with the same batches.

    Attributes:
        warmup_steps: optimizer steps of the warm-up.
        rows: rows of per-batch measurements to take; 0 where the warm-up alone decides.
        step: optimizer steps taken.
        lr: learning rate of the warm-up, for the record.
        measure_controls: whether ``score`` also takes what only the controls need, where the probe measures that.
        replicated: parameters added to the model that every rank holds whole; a sharded model must leave them alone.
    """

    warmup_steps: int
    rows: int
    step: int = 0
    measure_controls: bool = True
    lr: float
    replicated: list[nn.Parameter]

    @classmethod  # noqa: B027
    def check_ranks(cls, size: int) -> None:
        """Refuse a number of processes that this run cannot use; most can use any.

        Raises:
            ProbeError: as said.
        """

    @abc.abstractmethod
    def __init__(self, model: nn.Module, candidates: Sequence[Candidate], config: ProbeCommandConfig) -> None:
        """Freeze ``model`` and put the probe's layers in the place of its M candidates."""

    @abc.abstractmethod
    def start(self, passes: Passes) -> None:
        """Get ready for the warm-up; the model is on its device now and sharded, if it is."""

    @abc.abstractmethod
    def warm_up(self, batch: Batch, validation: Batch) -> float:
        """One optimizer step on ``batch``; a bi-level run also uses ``validation``. Returns the loss before the step.

        Raises:
            ProbeError: the loss is NaN or infinite.
        """

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything a continuation of the warm-up needs."""

    @abc.abstractmethod
    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``tensors`` gave after ``step`` steps, bit for bit."""

    @abc.abstractmethod
    def finish_warmup(self) -> None:
        """Drop what only the warm-up needed and get ready to score.

        Raises:
            ProbeError: nothing was learned, or something is not finite.
        """

    def begin_scoring(self, validation_batch: Callable[[int], Batch]) -> None:  # noqa: B027
        """Called once before the first ``score`` of a process; ``validation_batch`` gives each batch by its number."""

    def prepare_scoring(self) -> None:  # noqa: B027
        """Get ready to score, between two steps of the warm-up or after it; what it asks no gradient of is restored."""

    def score(self, row: int, batch: Batch) -> tuple[dict[str, Tensor], float]:
        """Row ``row`` of each per-batch measurement: name -> ``[M]`` float64 on the CPU, and the loss to show.

        A measurement may be missing in some rows, e.g. one that is taken once a batch and not once a partition. A
        method that overrides ``measurements`` may give ``[M, ...]`` in any dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no per-batch measurements")

    def measurements(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """All rows of ``score``, ``[T, M, ...]`` by name, as measurements ``[T, M]`` float64."""
        return rows

    @abc.abstractmethod
    def results(self) -> dict[str, Tensor]:
        """Measurements with one value a module, known after the warm-up: name -> ``[M]`` float64 on the CPU."""


class OneOptimizerMethod(ProbeMethod):
    """A run whose warm-up is plain AdamW on all of ``replicated``; ``start`` sets ``_passes`` and ``_optimizer``.

    Attributes:
        rate_option: the option that ``lr`` comes from, for messages.
    """

    rate_option: str = "probe.lr"
    _passes: Passes
    _optimizer: NamedAdamW

    def warm_up(self, batch: Batch, validation: Batch) -> float:
        """One AdamW step on ``batch`` ``[B, S]``; ``validation`` is not used. Returns the loss before the step."""
        self._optimizer.zero_grad()
        loss = require_finite(self._passes.backward(batch, self.replicated), self.step, self.rate_option)
        self._optimizer.step()
        self.step += 1
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and both AdamW moments."""
        return self._optimizer.tensors()

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``tensors`` gave after ``step`` steps."""
        self.step = step
        self._optimizer.load(step, tensors)


def warmup_rate(probe: ProbeConfig, method: str) -> float:
    """Learning rate of the warm-up of a probe method, by its name (``Criterion.method``)."""
    # AdaLoRA's initialisation barely moves at the rate that suits the default one.
    rates = {"probe.full_lr": probe.full_lr, "probe.adalora.lr": probe.adalora.lr, "probe.lr": probe.lr}
    return rates[rate_option(method, probe.init)]


def warmup_steps(config: ProbeCommandConfig) -> int:
    """Optimizer steps before scoring: ``probe.warmup_steps``, or 0 where the criterion reads the model as it is."""
    return 0 if config.criterion in WITHOUT_WARMUP else config.probe.most_warmup_steps


def require_finite(loss: float, step: int, rate: str = "probe.lr") -> float:
    """The loss before warm-up step ``step + 1``, if it is a number; ``rate`` is the option to lower if not.

    Raises:
        ProbeError: it is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise ProbeError(
            f"{rate}: the loss is {loss} at warm-up step {step + 1}; lower {rate}, use model.dtype=float32 "
            f"or check that the checkpoint is sound"
        )
    return loss
