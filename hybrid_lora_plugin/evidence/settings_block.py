"""Blocks of settings in a plan, read into dataclasses."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError


def fill(settings: Any, block: Any, where: str) -> None:
    """Set the fields of a dataclass from a mapping, strictly; what is not given keeps its value.

    Args:
        settings: names as the block's, nested dataclasses for nested mappings; a list whose metadata has an ``item`` is
            one of mappings for that dataclass.
        block: of a plan.
        where: its name in messages.

    Raises:
        ConfigurationError: an unknown name, or a value of another type.
    """
    if not isinstance(block, Mapping):
        raise ConfigurationError(f"{where}: {block!r} is no mapping; give names with their values")
    known = {spec.name: spec for spec in dataclasses.fields(settings)}
    types = typing.get_type_hints(type(settings))
    for name, value in block.items():
        place = f"{where}.{name}"
        if name not in known:
            raise ConfigurationError(f"{place}: unknown; give some of {', '.join(known)}")
        item = known[name].metadata.get("item")
        if item is not None:
            if not isinstance(value, list | tuple):
                raise ConfigurationError(f"{place}: {value!r} is no list; give a list of mappings")
            items = [item() for _ in value]
            for index, (one, given) in enumerate(zip(items, value, strict=True)):
                fill(one, given, f"{place}[{index}]")
            setattr(settings, name, items)
        elif dataclasses.is_dataclass(getattr(settings, name)):
            fill(getattr(settings, name), value, place)
        else:
            setattr(settings, name, _checked(value, types[name], place))


def _checked(value: Any, type_: Any, place: str) -> Any:
    if typing.get_origin(type_) is list:
        if not isinstance(value, list | tuple):
            raise ConfigurationError(f"{place}: {value!r} is no list; give a list")
        return list(value)
    kinds = typing.get_args(type_) or (type_,)
    # A bool is an int to Python, and a whole number is a fine float.
    if isinstance(value, bool) and bool not in kinds:
        kinds = ()
    elif isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    if not any(isinstance(value, kind) for kind in kinds):
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in typing.get_args(type_)) or (
            type_.__name__
        )
        raise ConfigurationError(f"{place}: {value!r} is not usable; give {wanted}")
    return value
