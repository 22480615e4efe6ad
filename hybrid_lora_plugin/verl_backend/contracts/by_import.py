"""Looks a symbol of the table up in what is installed, by importing it."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from dataclasses import replace
from typing import Any

from hybrid_lora_plugin.verl_backend.contracts.record import Contract
from hybrid_lora_plugin.verl_backend.contracts.versions import installed_version, is_relied_on

_ABSENT = object()


def check(contract: Contract) -> str | None:
    """Look a symbol up in what is installed.

    Returns:
        None if it is there with its arguments, or if nothing relies on it in the installed version, else one line that
        names the first thing missing.
    """
    if not is_relied_on(contract, installed_version(contract.library)):
        return None
    said = [_check(replace(contract, name=name)) for name in (contract.name, *contract.also)]
    if None in said:
        return None
    return said[0] + "".join(f", nor {name}" for name in contract.also)


def _check(contract: Contract) -> str | None:
    try:
        found = importlib.import_module(contract.module)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"{contract.symbol}: module {contract.module} cannot be imported ({type(error).__name__}: {reason})"
    if contract.constant:
        tree = ast.parse(inspect.getsource(found))
        there = any(isinstance(node, ast.Constant) and node.value == contract.constant for node in ast.walk(tree))
        return None if there else f"{contract.symbol}: {contract.module} says {contract.constant!r} nowhere"
    where = contract.module
    parts = contract.name.split(".") if contract.name else []
    for position, part in enumerate(parts):
        # Attributes of instances: nothing to go on with, so only as the last part.
        inner = getattr(found, part, _ABSENT)
        if inner is _ABSENT:
            last = position == len(parts) - 1
            if not (last and inspect.isclass(found) and part in _instance_attributes(found)):
                return f"{contract.symbol}: {where} has no {part!r}; read in {contract.read_in}"
        found, where = inner, f"{where}.{part}"
    return _check_arguments(contract, found) if contract.arguments else None


def _check_arguments(contract: Contract, found: Any) -> str | None:
    try:
        names = list(inspect.signature(found).parameters)
    except (TypeError, ValueError) as error:
        return f"{contract.symbol}: its signature cannot be read ({error})"
    at = -1
    for argument in contract.arguments:
        if argument not in names:
            listed = ", ".join(names)
            return f"{contract.symbol}: no argument {argument!r} among ({listed}); read in {contract.read_in}"
        if names.index(argument) < at:
            return f"{contract.symbol}: argument {argument!r} has another place in ({', '.join(names)})"
        at = names.index(argument)
    return None


@functools.cache
def _instance_attributes(cls: type) -> frozenset[str]:
    """Names that a class and its bases declare or assign as ``self.NAME``, found in their source."""
    found: set[str] = set()
    for base in cls.__mro__:
        found.update(vars(base).get("__annotations__", ()))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue  # written in C
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    found.add(node.attr)
    return frozenset(found)
