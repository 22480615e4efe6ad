"""A configuration field that carries its own documentation and the bounds of its values."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bound:
    """Which values of a field can work.

    Attributes:
        holds: value -> whether it is usable; None is usable wherever the field's type allows it.
        wanted: such values in words, with an example.
    """

    holds: Callable[[Any], bool]
    wanted: str


def at_least(least: float, wanted: str) -> Bound:
    """A bound that includes ``least``."""
    return Bound(lambda value: value >= least, wanted)


def above(limit: float, wanted: str) -> Bound:
    """A bound that excludes ``limit``."""
    return Bound(lambda value: value > limit, wanted)


def documented(
    default: Any,
    help: str,
    *,
    source: str,
    unit: str | None = None,
    choices: tuple | None = None,
    bound: Bound | None = None,
):
    """A dataclass field that carries its own documentation.

    Args:
        default: the default; a list or a dataclass type is turned into a ``default_factory``.
        help: what the field does, one sentence.
        source: where the default comes from (paper section, verl default, own measurement).
        unit: unit of a number.
        choices: legal values, when they are a fixed set.
        bound: legal values otherwise; ``config_validation`` checks both.
    """
    metadata = {"help": help, "source": source, "unit": unit, "choices": choices, "bound": bound}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def leaf_fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Every leaf option of a configuration dataclass: dotted name, type, field."""
    types = typing.get_type_hints(kind)
    for spec in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[spec.name]):
            yield from leaf_fields(types[spec.name], f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", types[spec.name], spec
