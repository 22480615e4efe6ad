"""Reading JSON into dataclasses with nothing guessed: every key known, every type as declared, no key missing but those
with a default.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.errors import AllocationError

_WAY_OUT = "give an unchanged file written by hybrid-lora-probe"


def read_json(file: Path, option: str) -> Any:
    """Parse a file as strict JSON: no duplicate keys, no NaN.

    Args:
        file: of an artifact.
        option: that named it, for messages.

    Raises:
        AllocationError: the file is missing or not such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            duplicate = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"duplicate key {duplicate!r}")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number")

    def finite(text: str) -> float:
        # 1e999 is JSON, and infinity to Python.
        return number if math.isfinite(number := float(text)) else refuse(text)

    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except OSError as error:
        raise AllocationError(
            f"{option}: {str(file)!r} cannot be read ({error.strerror}); give the folder that hybrid-lora-probe wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise AllocationError(f"{file}: not valid JSON ({error}); {_WAY_OUT}") from error


def build(kind: Any, payload: Any, *, file: str, field: str = "") -> Any:
    """Turn parsed JSON into ``kind``, a dataclass, ``list[dataclass]``, ``dict`` or a plain type.

    Args:
        kind: the type wanted; of ``X | None`` the X, for what may be None is left out instead.
        payload: the parsed value.
        file: file name for messages.
        field: dotted path of the value, for messages.

    Raises:
        AllocationError: an unknown key, a missing one without a default, or a value of another type.
    """
    where = f"{file}: {field}" if field else file
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (option for option in typing.get_args(kind) if option is not type(None))
    if dataclasses.is_dataclass(kind):
        if not isinstance(payload, dict):
            raise AllocationError(f"{where}: {payload!r}, an object is wanted; {_WAY_OUT}")
        fields = typing.get_type_hints(kind)
        for key in payload.keys() - fields.keys():
            raise AllocationError(f"{where}: unknown key {key!r}; {_WAY_OUT}")
        for spec in dataclasses.fields(kind):
            # A field with a default came later than the files that lack it.
            required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
            if required and spec.name not in payload:
                raise AllocationError(f"{where}: missing key {spec.name!r}; {_WAY_OUT}")
        prefix = f"{field}." if field else ""
        return kind(**{key: build(fields[key], payload[key], file=file, field=prefix + key) for key in payload})
    if typing.get_origin(kind) is list:
        if not isinstance(payload, list):
            raise AllocationError(f"{where}: {payload!r}, a list is wanted; {_WAY_OUT}")
        (item,) = typing.get_args(kind)
        return [build(item, value, file=file, field=f"{field}[{index}]") for index, value in enumerate(payload)]
    # bool is an int to Python, and an integer is a fine float in JSON.
    fits = isinstance(payload, (int, float) if kind is float else kind)
    if not fits or (isinstance(payload, bool) and kind is not bool):
        raise AllocationError(f"{where}: {payload!r}, a value of type {kind.__name__} is wanted; {_WAY_OUT}")
    return float(payload) if kind is float else payload
