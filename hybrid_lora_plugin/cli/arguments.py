"""``key=value`` arguments into a configuration dataclass, with help generated from its fields.

A command is ``main(argv=None) -> int`` under ``command.command``, built of ``wants_help``, ``print_help``, ``parse``,
``require_given`` and ``report_error``; see ``probe.py``.

Text stays as it was typed: a number, ``true`` or ``a: b # c`` is a fine name of a folder. ``null`` leaves an option
that may be left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.config_field import leaf_fields as options
from hybrid_lora_plugin.errors import UsageError

Config = TypeVar("Config")


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
    config = kind()
    for argument in argv:
        name, equals, value = argument.partition("=")
        name = (aliases or {}).get(name, name)
        if name not in known:
            raise UsageError(f"unknown option {name!r}{_closest(name, known)} (--help lists all)")
        if not equals:
            raise UsageError(f"{name}: no value; write {name}=VALUE")
        place, _, leaf = name.rpartition(".")
        try:
            setattr(_part(config, place), leaf, _read(value, known[name]))
        except _Unreadable as error:
            raise UsageError(f"{name}: {value!r} cannot be read; give {_describe(known[name])}") from error
        except ValueError as error:
            raise UsageError(f"{name}: {value!r} is not usable; give {_describe(known[name])}") from error
    return config


def given_options(argv: Sequence[str], aliases: Mapping[str, str] | None = None) -> list[str]:
    """Names of the options in arguments that ``parse`` accepts."""
    names = [argument.partition("=")[0] for argument in argv]
    return [(aliases or {}).get(name, name) for name in names]


def require_given(config: Any, examples: Mapping[str, str]) -> None:
    """Refuse a command without the options that have no default.

    Args:
        config: of the command.
        examples: option -> a value as a user would type it.

    Raises:
        UsageError: naming all that are missing.
    """
    missing = []
    for name in examples:
        place, _, leaf = name.rpartition(".")
        if not getattr(_part(config, place), leaf):
            missing.append(name)
    if missing:
        wanted = " ".join(f"{name}={examples[name]}" for name in missing)
        raise UsageError(f"{', '.join(missing)}: not given; write {wanted} (--help explains each)")


def expand_home(config: Config) -> Config:
    """``config`` with ``~`` and ``~/…`` in texts as the home folder, which shells leave alone behind ``=``; changed in
    place."""
    for name, _, _ in options(type(config)):
        place, _, leaf = name.rpartition(".")
        part = _part(config, place)
        value = getattr(part, leaf)
        if isinstance(value, str):
            setattr(part, leaf, _expanded(value))
        elif isinstance(value, list):
            setattr(part, leaf, [_expanded(item) if isinstance(item, str) else item for item in value])
    return config


def _expanded(text: str) -> str:
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def _part(config: Any, place: str) -> Any:
    for name in place.split(".") if place else ():
        config = getattr(config, name)
    return config


class _Unreadable(ValueError):
    """A list that does not end."""


_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def _read(text: str, type_: Any) -> Any:
    """A value as its option holds it; ValueError where it is none."""
    if typing.get_origin(type_) is list:
        (kind,) = typing.get_args(type_)
        return [kind(item) for item in (_items(text) if text.startswith("[") else [text])]
    choices = typing.get_args(type_) or (type_,)
    if text == "null" and type(None) in choices:
        return None
    if {int, str} <= set(choices):
        # A number or a word, such as `auto`.
        return int(text) if text.lstrip("+-").isdecimal() else text
    (plain,) = (choice for choice in choices if choice is not type(None))
    if plain is not bool:
        return plain(text)
    if text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    raise ValueError(text)


def _items(text: str) -> list[str]:
    """The items of ``[a, b]``; in quotes or brackets of its own an item may hold a comma."""
    items, item, quote, quoted, depth = [], "", "", False, 0

    def keep() -> None:
        items.append(item if quoted else item.strip())

    for position, letter in enumerate(text[1:], start=1):
        if quote:
            item, quote = (item, "") if letter == quote else (item + letter, quote)
        elif letter in "\"'" and not item.strip():
            item, quote, quoted = "", letter, True
        elif letter == "]" and depth == 0:
            if position != len(text) - 1:
                raise _Unreadable(text)
            if items or quoted or item.strip():
                keep()
            return items
        elif letter == "," and depth == 0:
            keep()
            item, quoted = "", False
        elif not (quoted and letter.isspace()):
            depth += (letter == "[") - (letter == "]")
            item += letter
    raise _Unreadable(text)


def _closest(name: str, known: typing.Iterable[str]) -> str:
    known, group = list(known), "hybrid_lora."
    if (inner := name.removeprefix(group)) != name and inner in known:
        return f"; a command takes it as {inner!r}"
    # One letter away is a slip; further away an option of a run is meant as it stands.
    slip = difflib.get_close_matches(name.lstrip("-"), known, n=1, cutoff=0.95)
    if not slip and inner in (of_run for of_run, _, _ in options(HybridLoraConfig)):
        return f"; a run reads it, as {group + inner!r}"
    match = difflib.get_close_matches(name.lstrip("-"), known, n=1, cutoff=0.6)
    # `warmup_steps` alone is far from `probe.warmup_steps` by letters, but clear in meaning.
    match = match or difflib.get_close_matches(name.lstrip("-"), [full.rpartition(".")[2] for full in known], n=1)
    if not match:
        return ""
    full = next(full for full in known if full == match[0] or full.rpartition(".")[2] == match[0])
    return f"; did you mean {full!r}?"


def _describe(type_: Any) -> str:
    if typing.get_origin(type_) is list:
        return "a list such as [0,1,2]" if int in typing.get_args(type_) else "a list such as [a.jsonl,b.parquet]"
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
        "Texts are taken as typed, with ~/ as the home folder; null leaves an option out; a list is [a,b] or one item.",
        "--version prints the version.",
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
        indent = " " * 6
        # A name with a hyphen is copied from here.
        lines += textwrap.wrap(
            " ".join(details), 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
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
