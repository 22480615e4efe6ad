"""Zeroth order in a verl engine: the frozen weights that move, their base values, and the log of their moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.config import ZerothOrderConfig
from hybrid_lora_plugin.errors import ConfigurationError, explained
from hybrid_lora_plugin.training.dtensor import local_tensor
from hybrid_lora_plugin.training.reference import BaseSnapshot
from hybrid_lora_plugin.training.zeroth_order.choice import moving_weights
from hybrid_lora_plugin.training.zeroth_order.move_log import MoveLog
from hybrid_lora_plugin.training.zeroth_order.two_point import two_point_step
from hybrid_lora_plugin.training.zeroth_order.weights import PerturbedWeights, require_epsilon

OPTION = "hybrid_lora.zeroth_order."


class ZerothOrder:
    """The weights of one rank. No weight may be gathered while a method of this class writes.

    Args:
        module: the hybrid model that FSDP2 has wrapped, with the base model's weights: before any step, and before a
            checkpoint is loaded.
        allocation: that it trains under.
        options: ``hybrid_lora.zeroth_order``.
        computes_in: type of the forward passes.

    Attributes:
        weights: what moves.
        log: every move so far.

    Raises:
        ConfigurationError: nothing can move, or ε is too small for these weights or passes.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        allocation: Allocation,
        options: ZerothOrderConfig,
        computes_in: torch.dtype,
    ) -> None:
        candidates = [one.name for one in allocation.modules]
        self._named = moving_weights(module, options.modules, candidates, allocation.full_names, OPTION + "modules")
        self._options = options
        with explained(otherwise="zeroth-order-not-possible"):
            require_epsilon(options.epsilon, computes_in)
            self.weights = PerturbedWeights(self._named, options.epsilon)
        self._base = BaseSnapshot(self._named)
        self.log = MoveLog.of(self.weights)

    @property
    def bytes(self) -> int:
        """What this rank keeps: masters and base values."""
        return self.weights.bytes + self._base.bytes

    def __str__(self) -> str:
        elements = sum(torch.Size(shape).numel() for shape in self.weights.shapes.values())
        return (
            f"zeroth order (experimental) moves {len(self._named)} frozen weights, {elements:,} parameters, and keeps "
            f"{self.weights.bytes / 1e6:,.1f} MB of masters and {self._base.bytes / 1e6:,.1f} MB of base values on "
            f"each rank; each step takes {2 * self._options.directions} forward passes more"
        )

    def to(self, device: torch.device | str) -> None:
        """Keep masters and base values there from now on."""
        self.weights.to(device)
        self._base.to(device)

    def step(self, measure: Callable[[], float], factor: float) -> dict[str, float]:
        """One two-point step; returns its metrics.

        Args:
            measure: as ``two_point_step`` takes it.
            factor: of verl's schedule, on the rate.
        """
        options = self._options
        done = two_point_step(
            self.weights,
            measure,
            seed=options.seed,
            step=self.log.steps,
            rate=options.lr * factor,
            directions=options.directions,
        )
        self.log.add(done.moves)
        return {
            "zeroth_order/slope": done.mean_slope,
            "zeroth_order/slope_spread": done.slope_rms,
            "zeroth_order/seconds": done.seconds,
            "zeroth_order/bytes": float(self.bytes),
            "zeroth_order/skipped": float(done.skipped),
        }

    @contextmanager
    def base_in_place(self) -> Iterator[None]:
        """The base model's values inside the ``with``, the moved ones again after it, also when the body raises."""
        self._write_base()
        try:
            yield
        finally:
            # What was held was the masters, rounded.
            self.weights.restore()

    def resume(self, log: MoveLog | None) -> None:
        """Begin at the base model again, and make the moves of an earlier run; without a log none.

        Raises:
            ConfigurationError: the log is of other modules, shapes or types.
        """
        self._write_base()
        self.weights = PerturbedWeights(self._named, self._options.epsilon)
        self.log = MoveLog.of(self.weights)
        if log is None:
            return
        if log.shapes == self.weights.shapes and log.dtypes != self.weights.dtypes:
            name = next(name for name, dtype in log.dtypes.items() if dtype != self.weights.dtypes[name])
            raise ConfigurationError(
                f"hybrid_lora.frozen_dtype: {name} is held in {self.weights.dtypes[name]} here and was in "
                f"{log.dtypes[name]} when it moved; resume with the frozen_dtype of the run".replace("torch.", ""),
                see="checkpoint-of-another-setting",
            )
        with explained(otherwise="checkpoint-of-another-setting"):
            log.replay(self.weights)
        self.log.moves, self.log.steps = list(log.moves), log.steps

    @torch.no_grad()
    def _write_base(self) -> None:
        for name, parameter in self._named:
            local_tensor(parameter).copy_(self._base.values[name])
