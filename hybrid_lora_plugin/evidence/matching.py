"""LoRA of the size, and LoRA of the floating point operations, of a hybrid."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hybrid_lora_plugin.candidates import Candidate


@dataclass(frozen=True)
class MatchedRank:
    """LoRA matched in trainable parameters on one base.

    Attributes:
        rank: the largest whose parameters do not pass ``wanted``; 1 where even those of rank 1 do.
        parameters: that LoRA of this rank trains.
        wanted: mean of the trainable parameters of the arm it is matched to.
    """

    rank: int
    parameters: int
    wanted: float


def trainable_parameters(
    candidates: Sequence[Candidate], full: Collection[str], rank: int, frozen: Collection[str] = ()
) -> int:
    """Weights and biases of the full modules, and LoRA factors of that rank on the others that are not frozen."""
    chosen, left = set(full), set(frozen)
    return sum(
        candidate.parameters if candidate.name in chosen else candidate.lora_parameters(rank)
        for candidate in candidates
        if candidate.name not in left
    )


def matched_rank(candidates: Sequence[Candidate], trained: Sequence[int], frozen: Collection[str] = ()) -> MatchedRank:
    """The rank at which LoRA alone trains about as many parameters as another arm.

    Args:
        candidates: of the base.
        trained: trainable parameters of the other arm, at each of several starts.
        frozen: modules that the LoRA leaves out.
    """
    wanted = sum(trained) / len(trained)
    one = trainable_parameters(candidates, (), 1, frozen)
    found = max(1, int(wanted // one))
    return MatchedRank(found, found * one, wanted)


def matched_steps(steps: int, flops: float, wanted: float) -> int:
    """Steps at which a run costs as many floating point operations as another one, to the nearest step.

    Args:
        steps: of a run that costs ``flops``.
        flops: of it.
        wanted: of the other one.
    """
    return max(1, round(steps * wanted / flops))
