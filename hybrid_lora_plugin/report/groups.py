"""The groups that tables count modules by: component, type and third of the depth."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_lora_plugin.candidates import TYPE_ORDER, Candidate


def present_types(modules: Sequence[Candidate]) -> list[str]:
    """The types that occur, in ``TYPE_ORDER``."""
    found = {module.type for module in modules}
    return [type_ for type_ in TYPE_ORDER if type_ in found]


def short_type(type_: str) -> str:
    """A type as tables and pictures show it: ``q`` for ``q_proj``."""
    return type_.removesuffix("_proj")


def depth_thirds(num_layers: int) -> list[range]:
    """The layers in three runs as equal as can be; a model of one or two layers has fewer."""
    thirds = [range(k * num_layers // 3, (k + 1) * num_layers // 3) for k in range(3)]
    return [third for third in thirds if len(third)]


def module_groups(modules: Sequence[Candidate], num_layers: int) -> dict[str, frozenset[str]]:
    """Group title -> names of its modules: components, then types, then depth thirds (``L0-8``)."""
    groups: dict[str, frozenset[str]] = {}
    for component in dict.fromkeys(module.component for module in modules):
        groups[component] = frozenset(m.name for m in modules if m.component == component)
    for type_ in present_types(modules):
        groups[short_type(type_)] = frozenset(m.name for m in modules if m.type == type_)
    for third in depth_thirds(num_layers):
        groups[f"L{third[0]}-{third[-1]}"] = frozenset(m.name for m in modules if m.layer in third)
    return groups
