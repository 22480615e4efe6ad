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
    options=("type", "depth"),
    source="a control; on a toy up+down of the middle beat random in 10 of 12, o_proj of every layer in 5 of 12",
)
def score_spread(measured: Measured) -> ModuleScores:
    """Place, from 1, of each module of ``control.type`` in the layers of ``control.depth``.

    The order takes layer by layer, so that every prefix is even over the depth, and in a layer the types as they are
    named. Other modules have score 0 and no signal.

    Raises:
        ScoringError: no candidate is of a type, or none in these layers.
    """
    wanted = list(dict.fromkeys(measured.control.type.split("+")))
    there = list(dict.fromkeys(candidate.type for candidate in measured.candidates))
    for type_ in wanted:
        if type_ not in there:
            raise ScoringError(f"control.type: no candidate is of type {type_!r}; choose one of {', '.join(there)}")
    layers = 1 + max(candidate.layer for candidate in measured.candidates)
    window = layers_of(measured.control.depth, layers)
    found: dict[int, list[int]] = {}
    for type_ in wanted:
        for index, candidate in enumerate(measured.candidates):
            if candidate.type == type_ and candidate.layer in window:
                found.setdefault(candidate.layer, []).append(index)
    if not found:
        raise ScoringError(
            f"control.depth: {measured.control.depth!r} has no {' or '.join(wanted)}; the model has the layers 0-"
            f"{layers - 1}"
        )
    places, place = torch.zeros(len(measured.candidates), dtype=torch.float64), 0
    for layer in even_order(len(found)):
        for index in found[sorted(found)[layer]]:
            place += 1
            places[index] = place
    return ModuleScores.of_values(places)


def layers_of(depth: str, layers: int) -> range:
    """Numbers of the layers that ``control.depth`` names: the middle third is rounded outwards."""
    if depth == "all":
        return range(layers)
    if depth == "middle":
        return range(layers // 3, -(-2 * layers // 3))
    first, last = map(int, depth.split("-"))
    return range(first, min(last + 1, layers))


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
