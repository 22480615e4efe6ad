"""Did the warm-up learn? The loss on rows that it never trains on, before its first step and after its last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from hybrid_lora_plugin.allocation.schema import HeldOutLoss
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.batches import ProbeData
from hybrid_lora_plugin.probing.forward import Passes

#: Most validation batches that are looked at: with the default sizes 64 rows, the same ones before and after.
HELD_OUT_BATCHES = 8


class HeldOutLosses:
    """Both losses of one probe, each measured once and kept with its unfinished state.

    A loss is one forward pass of each batch, without masks, on all ranks.
    """

    def __init__(
        self, passes: Passes, data: ProbeData, kept: Mapping[str, float], keep: Callable[[dict[str, float]], None]
    ) -> None:
        """For a probe whose layers are attached.

        Args:
            passes: how to run a batch.
            data: the rows.
            kept: what an earlier start measured, by ``before`` and ``after``; equal on all ranks.
            keep: writes these down; every rank calls it.
        """
        self._passes, self._data, self._losses, self._keep = passes, data, dict(kept), keep
        self._batches = min(HELD_OUT_BATCHES, data.validation_batches)

    def measure(self, when: str) -> float:
        """The loss now, ``when`` being ``before`` or ``after``: nats per response token, or as measured earlier."""
        if when not in self._losses:
            total = 0.0
            for batch in self._each():
                total += self._passes.loss(batch) * batch.response_tokens
            self._losses[when] = total / self._tokens()
            self._keep(self._losses)
        return self._losses[when]

    def record(self, rate: str) -> HeldOutLoss:
        """What the artifact says, once both are measured; ``rate`` is the option of the warm-up's learning rate.

        Raises:
            ProbeError: a loss is NaN or infinite.
        """
        for when, loss in self._losses.items():
            if not math.isfinite(loss):
                raise ProbeError(
                    f"{rate}: the loss on the held-out rows is {loss} {when} the warm-up; lower {rate}, use "
                    f"model.dtype=float32 or check that the checkpoint is sound"
                )
        return HeldOutLoss(self._losses["before"], self._losses["after"], self._batches, self._tokens())

    def _each(self):
        return (self._data.validation_batch(index) for index in range(self._batches))

    def _tokens(self) -> int:
        return sum(batch.response_tokens for batch in self._each())
