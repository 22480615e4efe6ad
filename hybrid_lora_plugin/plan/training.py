"""What each GPU holds of weights, gradients and optimizer, and what is whole on it for a while.

Between steps it is the floor of ``training.memory.least_bytes``, up to padding where a dimension does not divide by the
ranks; here counted parameter by parameter as the first rank holds it, which holds the most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hybrid_lora_plugin.plan.model import PlannedModel
from hybrid_lora_plugin.plan.run import FULL, HYBRID, Run
from hybrid_lora_plugin.training.memory import TrainingBytes


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return getattr(torch, dtype).itemsize


def own_share(shape: torch.Size, ranks: int, strategy: str) -> int:
    """Elements of a parameter on the first rank: rows with FSDP2, a piece of the flat parameter with FSDP1."""
    if strategy == "fsdp":
        return -(-math.prod(shape) // ranks)
    return -(-shape[0] // ranks) * math.prod(shape[1:])


def state_bytes(model: PlannedModel, run: Run) -> TrainingBytes:
    """What the first rank holds of the model, its gradients and Adam's two moments, wherever they lie."""
    frozen = trained = full = 0
    whole = set() if model.allocation is None else set(model.allocation.full_names)
    for name, shape, trains in model.parameters():
        share = own_share(shape, run.shard_ranks, run.strategy)
        if not trains:
            frozen += share
            continue
        trained += share
        if _module_of(name) in whole:
            full += share
    held = itemsize(run.held_dtype)
    # Under an allocation what trains is held in fp32, whatever the rest is held in.
    master = 4 if run.training == HYBRID else held
    sent = 0
    if run.training == HYBRID and run.hybrid.sync == "sparse_merge" and run.rollout:
        sent = 2 * sum(own_share(shape, run.shard_ranks, "fsdp2") for shape in _merged_shapes(model))
    # Of a bfloat16 checkpoint the originals fit into two bytes (training/reference.py).
    original = 2 if run.stored_dtype == "bfloat16" else 4
    reference = original * full if run.training == HYBRID else 0
    return TrainingBytes(held * frozen, master * trained, master * trained, 2 * master * trained, reference, sent)


def _module_of(name: str) -> str:
    from hybrid_lora_plugin.names import plain_name

    return plain_name(name).rpartition(".")[0]


def _merged_shapes(model: PlannedModel):
    from hybrid_lora_plugin.training.apply import parts_of

    return map(torch.Size, parts_of(model.trained).merged_shapes)


@dataclass(frozen=True)
class Gathered:
    """What FSDP makes whole on each GPU in a forward and in a backward pass, in bytes.

    Attributes:
        weights: the head, and two decoder layers: the one that computes and the next.
        gradients: of one layer, whole and as they are reduced; of the head and the embedding where they train.
    """

    weights: float
    gradients: float


def gathered_bytes(model: PlannedModel, run: Run) -> Gathered:
    """What is whole at the peak."""
    compute, reduced = itemsize(run.compute_dtype), itemsize(run.reduce_dtype)
    layer, trains = model.largest_layer()
    weights = model.head + 2 * layer
    if run.keeps_gathered:
        weights = sum(math.prod(shape) for _, shape, _ in model.parameters())
    gradients = trains * (compute + reduced)
    if run.training == FULL:
        gradients += model.embedding * (compute + reduced)
    if run.whole_gradients:
        gradients += 4 * (model.counts.full + model.counts.lora)
    return Gathered(compute * weights, gradients)


def step_bytes(state: TrainingBytes, run: Run) -> float:
    """What an optimizer step holds on top: Adam's root of the second moment, and in ``HYBRID`` the values before."""
    return state.trained * (2 if run.training == HYBRID else 1)
