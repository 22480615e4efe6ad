"""Random draws of modules that are spread evenly over types and depth: the second random control."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrid_lora_plugin.allocation.budget import allocate
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import BudgetConfig
from hybrid_lora_plugin.seeding import generator_for

#: Parts that the depth is cut into.
DEPTHS = 3


def stratified_draw(candidates: Sequence[Candidate], ratio: float, seed: int) -> list[str]:
    """Names of modules within a budget, drawn so that types and thirds of the depth come in turn.

    Modules of one type and one third of the depth are a stratum, and each is drawn from in a random order. In every
    round each type gives one module, the types in random order, from the third that it has given from least often. A
    module that no longer fits is passed over, as with ``budget.overflow=skip``.

    Args:
        candidates: the M candidates of a base.
        ratio: share of their parameters, ``budget.ratio``.
        seed: of the draw.

    Returns:
        Names in the candidates' order.
    """
    stream = generator_for(f"random_stratified/{seed}")
    layers = sorted({candidate.layer for candidate in candidates})
    part = {layer: place * DEPTHS // len(layers) for place, layer in enumerate(layers)}
    strata: dict[str, list[list[int]]] = {}
    for index, candidate in enumerate(candidates):
        strata.setdefault(candidate.type, [[] for _ in range(DEPTHS)])[part[candidate.layer]].append(index)
    # Of each type one order in which its depths come in turn.
    queues = {type_: _in_turn(cells, stream) for type_, cells in strata.items()}
    order: list[int] = []
    while any(queues.values()):
        there = [type_ for type_, queue in queues.items() if queue]
        order += [queues[there[place]].pop(0) for place in torch.randperm(len(there), generator=stream).tolist()]
    scores = [0.0] * len(candidates)
    for place, index in enumerate(order, start=1):
        scores[index] = float(place)
    return allocate(candidates, scores, BudgetConfig(ratio=ratio, overflow="skip"), "lowest").full_names


def _in_turn(cells: Sequence[Sequence[int]], stream: torch.Generator) -> list[int]:
    shuffled = [[cell[place] for place in torch.randperm(len(cell), generator=stream).tolist()] for cell in cells]
    order: list[int] = []
    while any(shuffled):
        there = [cell for cell in shuffled if cell]
        order += [there[place].pop(0) for place in torch.randperm(len(there), generator=stream).tolist()]
    return order
