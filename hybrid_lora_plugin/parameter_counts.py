"""How many parameters of a model are frozen, fully fine-tuned and in adapters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the whole model, each counted once.

    Attributes:
        frozen: in no group: embeddings, norms, head and the base weights of the LoRA modules.
        full: fully fine-tuned.
        lora: adapter parameters ``r (d_in + d_out)`` summed over the LoRA modules.
    """

    frozen: int
    full: int
    lora: int

    @property
    def trainable(self) -> int:
        """What the optimizer sees."""
        return self.full + self.lora

    @property
    def total(self) -> int:
        """All parameters, adapters included."""
        return self.frozen + self.trainable

    def __str__(self) -> str:
        return (
            f"{self.frozen:,} frozen, {self.full:,} full, {self.lora:,} LoRA "
            f"({self.trainable / self.total:.2%} of {self.total:,} trainable)"
        )
