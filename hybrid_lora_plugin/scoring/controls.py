"""Controls: seeded draws, gradients of the frozen weights, and choices by rule or by name."""

from __future__ import annotations

import difflib

import torch

from hybrid_lora_plugin.errors import ScoringError
from hybrid_lora_plugin.scoring.measurements import GRADIENT_NORM, SNIP, Measured
from hybrid_lora_plugin.scoring.module_scores import ModuleScores
from hybrid_lora_plugin.scoring.registry import register_criterion
from hybrid_lora_plugin.seeding import generator_for


@register_criterion(
    "random",
    direction="lowest",
    needs=(),
    method=None,
    normalisable=False,
    options=("seed",),
    source="control: any score must beat several draws of this",
)
def score_random(measured: Measured) -> ModuleScores:
    """Uniform in [0, 1), from ``control.seed`` and nothing else; every module may be drawn."""
    stream = generator_for(f"random/{measured.control.seed}")
    drawn = torch.rand(len(measured.candidates), generator=stream, dtype=torch.float64)
    return ModuleScores.of_values(drawn, signal=torch.ones_like(drawn, dtype=torch.bool))


@register_criterion(
    "gradient_norm",
    direction="highest",
    needs=(GRADIENT_NORM,),
    source="control asked for by the paper's reviewers; highest is our choice",
)
def score_gradient_norm(measured: Measured) -> ModuleScores:
    """Mean over T of ``||∂L/∂W||_F``, highest first. No direction is established: ``direction`` turns it."""
    series = measured.series(GRADIENT_NORM)
    return ModuleScores.of_series(series.mean(dim=0), series)


@register_criterion(
    "snip", direction="highest", needs=(SNIP,), source="control; SNIP, arXiv 1810.02340; highest is our choice"
)
def score_snip(measured: Measured) -> ModuleScores:
    """Mean over T of ``Σ |W ⊙ ∂L/∂W|``, highest first. No direction is established: ``direction`` turns it."""
    series = measured.series(SNIP)
    return ModuleScores.of_series(series.mean(dim=0), series)


@register_criterion(
    "lora_ffn", direction="lowest", needs=(), method=None, normalisable=False, source="paper §4.4, LoRA-FFN"
)
def score_lora_ffn(measured: Measured) -> ModuleScores:
    """Names every module whose component is attention; the budget does not apply."""
    return ModuleScores.of_choice(torch.tensor([c.component == "attention" for c in measured.candidates]))


def even_order(count: int) -> list[int]:
    """``0 … count − 1`` in an order of which every prefix lies evenly: the middle, the quarters, the eighths …

    The points 1/2, 1/4, 3/4, 1/8, 5/8, … (van der Corput) fall on ``count`` equal cells; a cell hit before is
    passed over.
    """
    bits = count.bit_length()  # 2^bits > count, so the points lie closer than the cells are wide
    order: dict[int, None] = {}
    for point in range(1, 2**bits):
        mirrored = int(format(point, f"0{bits}b")[::-1], 2)
        order.setdefault(mirrored * count >> bits)
    return list(order)


@register_criterion(
    "spread",
    direction="lowest",
    needs=(),
    method=None,
    normalisable=False,
    options=("type",),
    source="a control; o_proj of every layer beat random in 6 of 6 seeds on a toy, in 5 of 12 on another",
)
def score_spread(measured: Measured) -> ModuleScores:
    """Place, from 1, of each module of ``control.type`` in an order whose every prefix is even over the depth.

    Modules of other types have score 0 and no signal.

    Raises:
        ScoringError: no candidate is of that type.
    """
    wanted = measured.control.type
    found = [index for index, candidate in enumerate(measured.candidates) if candidate.type == wanted]
    if not found:
        there = ", ".join(dict.fromkeys(candidate.type for candidate in measured.candidates))
        raise ScoringError(f"control.type: no candidate is of type {wanted!r}; choose one of {there}")
    found.sort(key=lambda index: measured.candidates[index].layer)
    places = torch.zeros(len(measured.candidates), dtype=torch.float64)
    for place, index in enumerate(even_order(len(found)), start=1):
        places[found[index]] = place
    return ModuleScores.of_values(places)


@register_criterion(
    "explicit",
    direction="lowest",
    needs=(),
    method=None,
    normalisable=False,
    options=("modules",),
    source="control: any set of modules can be tried",
)
def score_explicit(measured: Measured) -> ModuleScores:
    """Names exactly ``control.modules``; the budget does not apply.

    Raises:
        ScoringError: no name, an unknown one or one given twice.
    """
    wanted, known = list(measured.control.modules), [candidate.name for candidate in measured.candidates]
    if not wanted:
        raise ScoringError("control.modules: nothing given; name the modules to tune fully, e.g. " + known[0])
    for index, name in enumerate(wanted):
        if name not in known:
            (closest,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ScoringError(f"control.modules: {name!r} is no candidate module; the closest name is {closest!r}")
        if name in wanted[:index]:
            raise ScoringError(f"control.modules: {name!r} is given twice; name each module once")
    return ModuleScores.of_choice(torch.tensor([name in set(wanted) for name in known]))
