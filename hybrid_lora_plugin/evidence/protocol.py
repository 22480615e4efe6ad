"""What the harness asks of a protocol: bases to start from, the modules an arm picks, and runs to their outcomes.

A plan names a protocol, arms, tasks and seeds. The harness decides which runs there are and what they mean; a protocol
knows how a model is made, probed and trained. ``protocols`` says how one is found by its name.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_lora_plugin.candidates import Candidate

ZEROTH = "zeroth_order"
KINDS = ("hybrid", "lora", "dora", "full", ZEROTH)


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        name: unique in the plan; a draw of an arm with several has its number in it (``random/3``).
        kind: one of ``KINDS``.
        selection: of a ``hybrid`` arm: options of ``hybrid-lora-allocate`` (``criterion``, ``direction``,
            ``budget.ratio``, ``spread.types`` ...), dotted.
        rank: LoRA rank of the modules that are not fully tuned.
        draw: number of the draw of an arm that draws.
    """

    name: str
    kind: str
    selection: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    draw: int = 0


@dataclass(frozen=True)
class Start:
    """What the arms of a pair have in common: base weights, task, and the seed of data order and adapter init."""

    base: str
    task: str
    seed: int


@dataclass(frozen=True)
class Choice:
    """What an arm trains at one start.

    Attributes:
        full: names of the fully tuned modules, in the model's order; all candidates for ``full``.
        rank: LoRA rank on every candidate that is neither fully tuned nor frozen; 0 where there is none.
        dora: whether the adapters have DoRA's magnitudes.
        zeroth: whether the weights under the adapters move too, by zeroth order after each step; only without ``full``.
        frozen: names of the modules that get neither a gradient nor an adapter, in the model's order: those that the
            placement leaves out, and those that take no adapter. What is in neither ``full`` nor here is adapted.
    """

    full: tuple[str, ...]
    rank: int
    dora: bool = False
    zeroth: bool = False
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        arm: name of the arm.
        start: see ``Start``.
        choice: see ``Choice``.
        full_lr: learning rate of the fully tuned modules.
        lora_lr: learning rate of the factors (and DoRA's magnitudes).
        steps: optimizer steps; arms that are matched by FLOPs differ in it.
        zeroth_lr: learning rate of the weights that move by zeroth order; 0 where none do.
    """

    arm: str
    start: Start
    choice: Choice
    full_lr: float
    lora_lr: float
    steps: int
    zeroth_lr: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        curve: (optimizer step, held-out value of the protocol's measure), step 0 first, the last step last.
        measures: further held-out values at the end, by name.
        trainable_parameters: weights that got a gradient.
        flops: floating point operations of the training steps, by the formula that the protocol documents.
        diverged: whether the loss was no number at some step; the curve then ends there.
    """

    curve: tuple[tuple[int, float], ...]
    measures: Mapping[str, float]
    trainable_parameters: int
    flops: float
    diverged: bool = False


class Protocol(abc.ABC):
    """How models of one kind of experiment are made, probed and trained.

    It is made as ``make(settings, folder, device, bases, tasks)``, also in processes of its own for ``choose``: of the
    plan's ``settings``, of a folder of its own for what ``prepare`` makes, and of ``auto``, ``cpu`` or ``cuda``. It
    raises ``ConfigurationError`` on a setting, a base or a task that it does not know, before anything is made.

    Attributes:
        measure: name of the held-out value in a curve.
        lower_is_better: whether a smaller one is the better one.
        trains_in_processes: whether ``train`` may be called in several processes at once, for different runs; where it
            may not, as a run takes the whole machine, ``workers`` choose alone.
        stepped: call it with a number of optimizer steps, over all runs, that ``train`` has taken since it was called
            last, so that the user sees how far it is; where it is not called, a run counts once it is kept.
        knows_zeroth_order: whether it trains choices with ``zeroth``.
        knows_placement: whether it chooses by ``placement.*`` of a selection, and leaves the modules of
            ``Choice.frozen`` as they are.
    """

    measure: str
    lower_is_better: bool
    trains_in_processes: bool = False
    stepped: Callable[[int], None] = staticmethod(lambda steps: None)
    knows_zeroth_order: bool = False
    knows_placement: bool = False

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the results depend on besides the plan: versions, digests of base weights, device, dtype."""

    @abc.abstractmethod
    def prepare(self, say: Callable[[str], None]) -> None:
        """Make or read the bases; what exists in the folder already is kept."""

    @abc.abstractmethod
    def candidates(self, base: str) -> list[Candidate]:
        """The modules of a base that an arm may tune fully."""

    @abc.abstractmethod
    def choose(self, start: Start, arms: Sequence[Arm]) -> dict[str, tuple[str, ...]]:
        """The modules that each ``hybrid`` arm tunes fully at one start, by the project's own probe and allocation.

        May be called in several processes at once, for different starts.
        """

    @abc.abstractmethod
    def train(self, runs: Sequence[Run], keep: Callable[[Run, Outcome], None]) -> None:
        """Train every run and give each outcome to ``keep`` as soon as it is known.

        The outcome of a run does not depend on which others are asked for beside it, nor on the name of its arm: arms
        that choose the same modules at one start share a run.
        """
