"""Every linear module of a model, accounted for: the candidates by type, those that stay frozen with the reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from hybrid_lora_plugin.candidates import COMPONENT_OF_TYPE, CONTAINERS, TYPE_ORDER, Candidate

_LAYER = re.compile(r"\.layers\.\d+\.")


@dataclass(frozen=True)
class FrozenLinear:
    """Linear modules that are no candidates, one or those that differ in the number of their layer alone.

    Attributes:
        name: of the module in the plain Hugging Face model, with ``*`` for the number of a layer.
        modules: how many.
        parameters: weights and biases of all of them; 0 where they share the embedding's.
        reason: why they stay as they are.
    """

    name: str
    modules: int
    parameters: int
    reason: str


class _Row(NamedTuple):
    what: str
    modules: str
    parameters: int
    why: str


def frozen_linear(model: nn.Module, candidates: Sequence[Candidate]) -> list[FrozenLinear]:
    """The linear modules of a model that are no candidates, in model order.

    Args:
        model: the plain Hugging Face model of these candidates, on any device, meta included.
        candidates: ``find_candidates(model)``.
    """
    chosen = {candidate.name for candidate in candidates}
    stack = candidates[0].name.partition(f".{candidates[0].layer}.")[0]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings |= _tied_by_config(model)
    found: dict[str, tuple[list[nn.Module], str]] = {}
    for name, module in model.named_modules():
        if name in chosen or not _is_linear(module):
            continue
        group = _LAYER.sub(".layers.*.", f"{name}.")[:-1] if name.startswith(f"{stack}.") else name
        found.setdefault(group, ([], _reason(name, module, stack, embeddings)))[0].append(module)
    return [
        FrozenLinear(group, len(modules), sum(_own(module, embeddings) for module in modules), reason)
        for group, (modules, reason) in found.items()
    ]


def _tied_by_config(model: nn.Module) -> set[int]:
    """The head's weight where the config ties it: on the meta device it may still be a tensor of its own."""
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    head = model.get_output_embeddings() if tied and hasattr(model, "get_output_embeddings") else None
    return set() if head is None else {id(head.weight)}


def _is_linear(module: nn.Module) -> bool:
    """A module that multiplies by a matrix, of whatever class: GPT-2's ``Conv1D`` is one too; or a convolution."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() >= 2 and not isinstance(module, nn.Embedding)


def _own(module: nn.Module, embeddings: set[int]) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False) if id(p) not in embeddings)


def _reason(name: str, module: nn.Module, stack: str, embeddings: set[int]) -> str:
    if id(module.weight) in embeddings:
        return "its weight is the embedding's"
    if not name.startswith(f"{stack}."):
        return "outside the decoder layers: the method takes their projections only"
    container, _, type_ = name.rpartition(".")
    if type_ in TYPE_ORDER:
        wanted = " or ".join(CONTAINERS[COMPONENT_OF_TYPE[type_]])
        return f"of a known type, but in {container.rpartition('.')[2]} and not in {wanted}, or no nn.Linear"
    if module.weight.dim() > 2:
        return "a convolution over the sequence, whose weight a kernel reads"
    return f"of a type that is no candidate: those are {', '.join(TYPE_ORDER)}"


def account_markdown(candidates: Sequence[Candidate], frozen: Sequence[FrozenLinear], parameters: int) -> list[str]:
    """The account as lines of Markdown.

    Args:
        candidates: of a model.
        frozen: ``frozen_linear`` of the same model.
        parameters: all of its parameters, tied ones once.
    """
    lines = ["| linear modules | number | parameters | of the model | |", "| --- | ---: | ---: | ---: | --- |"]
    for row in _rows(candidates, frozen, parameters):
        what = f"`{row.what}`" if "." in row.what or "_" in row.what else row.what
        lines.append(f"| {what} | {row.modules} | {row.parameters:,} | {row.parameters / parameters:.2%} | {row.why} |")
    return lines


def account_text(candidates: Sequence[Candidate], frozen: Sequence[FrozenLinear], parameters: int) -> list[str]:
    """The account as lines for a terminal; arguments as ``account_markdown``."""
    rows = _rows(candidates, frozen, parameters)
    wide, count, size = (
        max(len(text) for text in column)
        for column in zip(*((row.what, row.modules, f"{row.parameters:,}") for row in rows), strict=True)
    )
    return [
        f"{row.what:<{wide}}  {row.modules:>{count}}  {row.parameters:>{size},}  {row.parameters / parameters:>7.2%}  "
        f"{row.why}"
        for row in rows
    ]


def _rows(candidates: Sequence[Candidate], frozen: Sequence[FrozenLinear], parameters: int) -> list[_Row]:
    rows = []
    for type_ in TYPE_ORDER:
        here = [candidate.parameters for candidate in candidates if candidate.type == type_]
        if here:
            rows.append(_Row(type_, str(len(here)), sum(here), f"candidate, {COMPONENT_OF_TYPE[type_]}"))
    total = sum(candidate.parameters for candidate in candidates)
    rows.append(_Row("all candidates", str(len(candidates)), total, "fully fine-tuned or LoRA"))
    rows += [_Row(one.name, str(one.modules), one.parameters, f"frozen: {one.reason}") for one in frozen]
    rest = parameters - total - sum(one.parameters for one in frozen)
    return [*rows, _Row("everything else", "", rest, "frozen: embeddings, norms and what else is not linear")]
