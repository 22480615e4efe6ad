"""``key=value`` arguments into a configuration dataclass, with help generated from its fields.

A command is ``main(argv=None) -> int`` built of ``wants_help``, ``print_help``, ``parse`` and
``report_error``; see ``probe.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybrid_lora_plugin.errors import UsageError

Config = TypeVar("Config")


def options(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Every leaf option of a configuration dataclass: dotted name, type, field."""
    types = typing.get_type_hints(kind)
    for spec in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[spec.name]):
            yield from options(types[spec.name], f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", types[spec.name], spec


def parse(argv: Sequence[str], kind: type[Config], aliases: Mapping[str, str] | None = None) -> Config:
    """The configuration that the arguments describe.

    Args:
        argv: ``key=value`` each, dotted keys, lists as ``[a,b]``; a single value is accepted for a list.
        kind: the dataclass; what is not given keeps its default.
        aliases: other names of options.

    Raises:
        UsageError: an unknown option (with the closest known one) or a value of another type.
    """
    known = {name: type_ for name, type_, _ in options(kind)}
    config = OmegaConf.structured(kind)
    for argument in argv:
        name, equals, value = argument.partition("=")
        name = (aliases or {}).get(name, name)
        if name not in known:
            raise UsageError(f"unknown option {name!r}{_closest(name, known)} (--help lists all)")
        if not equals:
            raise UsageError(f"{name}: no value; write {name}=VALUE")
        try:
            if typing.get_origin(known[name]) is list and not value.startswith("["):
                # Not through YAML: a file name may hold anything.
                parsed = OmegaConf.create({"value": [value]})
            else:
                parsed = OmegaConf.from_dotlist([f"value={value}"])
            OmegaConf.update(config, name, parsed["value"])
            OmegaConf.select(config, name)
        except (OmegaConfBaseException, ValueError) as error:
            raise UsageError(f"{name}: {value!r} is not usable; give {_describe(known[name])}") from error
        except Exception as error:  # a YAML error of "[a,b"
            raise UsageError(f"{name}: {value!r} cannot be read; give {_describe(known[name])}") from error
    try:
        return typing.cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise UsageError(str(error).splitlines()[0]) from error


def _closest(name: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    match = difflib.get_close_matches(name.lstrip("-"), known, n=1, cutoff=0.6)
    # `warmup_steps` alone is far from `probe.warmup_steps` by letters, but clear in meaning.
    match = match or difflib.get_close_matches(name.lstrip("-"), [full.rpartition(".")[2] for full in known], n=1)
    if not match:
        return ""
    full = next(full for full in known if full == match[0] or full.rpartition(".")[2] == match[0])
    return f"; did you mean {full!r}?"


def _describe(type_: Any) -> str:
    if typing.get_origin(type_) is list:
        return "a list such as [a.jsonl,b.parquet]"
    inner = [argument for argument in typing.get_args(type_) if argument is not type(None)]
    plain = inner[0] if inner else type_
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(plain, str(plain))


def default_text(spec: dataclasses.Field) -> str:
    """The default of a field as a user would type it."""
    default = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the user asks for help."""
    return any(argument in ("-h", "--help", "help") for argument in argv)


def help_text(program: str, summary: str, example: str, kind: type) -> str:
    """Usage, then every option with default, meaning, unit, choices and where the default comes from."""
    lines = [
        f"usage: {program} key=value ...",
        "",
        *textwrap.wrap(summary, 100),
        "",
        f"example: {example}",
        "",
        "options:",
    ]
    for name, _, spec in options(kind):
        lines.append(f"  {name}={default_text(spec)}")
        details = [spec.metadata["help"]]
        if spec.metadata["choices"]:
            details.append(f"Choices: {', '.join(map(str, spec.metadata['choices']))}.")
        if spec.metadata["unit"]:
            details.append(f"Unit: {spec.metadata['unit']}.")
        details.append(f"Source of the default: {spec.metadata['source']}.")
        lines += textwrap.wrap(" ".join(details), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def print_help(program: str, summary: str, example: str, kind: type) -> int:
    """Print ``help_text``, quietly cut short by ``| head``; returns the exit status 0."""
    try:
        print(help_text(program, summary, example, kind), flush=True)
    except BrokenPipeError:
        # Nobody reads on; without this Python complains when it flushes once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def report_error(program: str, error: Exception) -> int:
    """Print a user's mistake as one line on standard error; returns the exit status 2."""
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
