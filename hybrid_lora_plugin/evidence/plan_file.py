"""A plan from its YAML file: strict, so that what is misspelt is no default in silence."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.config_evidence import EvidencePlanConfig
from hybrid_lora_plugin.config_field import leaf_fields
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError, reason_of
from hybrid_lora_plugin.evidence.placed import placement_in, read_placement
from hybrid_lora_plugin.evidence.protocol import KINDS

#: ``@`` and ``/`` are for the budget and the draw that the harness puts behind a name.
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+\-]*")
_ARM_KEYS = ("name", "kind", "rank", "placement", "selection")
_RATES = ("full", "lora", "zeroth")
_WANTED = {int: "a whole number", float: "a number", str: "a text", dict: "a block of settings", list: "a list"}
#: Options of the probe's command that are the protocol's or the harness's to say.
_NOT_AN_ARMS = ("model.", "lora.", "output_dir", "budget.ratio", "control.seed", "probe.files")


def read_plan(file: Path) -> EvidencePlanConfig:
    """The plan of a YAML file.

    Raises:
        ConfigurationError: it cannot be read, or a field of it cannot be used.
    """
    from omegaconf import OmegaConf

    try:
        # Its loader takes 1e-3 for a number and refuses a key that is there twice.
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except OSError as error:
        raise ConfigurationError(f"plan: {file} cannot be read ({reason_of(error)}); give a YAML file") from error
    except Exception as error:
        raise ConfigurationError(f"plan: {file} is no YAML ({reason_of(error)}); correct it there") from error
    return plan_of(content)


def plan_of(content: Any) -> EvidencePlanConfig:
    """The plan that plain lists, mappings, texts and numbers describe; raises as ``read_plan``."""
    if not isinstance(content, dict):
        raise ConfigurationError(f"plan: holds {_said(content)}; give fields such as name: and protocol:")
    plan = _build(EvidencePlanConfig, content, "")
    for name in ("name", "protocol"):
        if not getattr(plan, name):
            raise ConfigurationError(f"{name}: not given; write {name}: TEXT")
    validate(plan)
    _check(plan)
    return plan


def _build(kind: type, content: dict, prefix: str) -> Any:
    types = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in types:
            close = difflib.get_close_matches(str(key), types, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"give one of {', '.join(types)}"
            raise ConfigurationError(f"{name}: is no field of a plan; {hint}")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                fields = ", ".join(f"{spec.name}:" for spec in dataclasses.fields(types[key]))
                raise ConfigurationError(f"{name}: {_said(value)} is not usable; give a block with {fields}")
            values[key] = _build(types[key], value, f"{name}.")
        else:
            values[key] = _typed(value, types[key], name)
    return kind(**values)


def _typed(value: Any, wanted: Any, name: str) -> Any:
    choices = typing.get_args(wanted) if typing.get_origin(wanted) not in (list, dict) else ()
    if type(None) in choices:
        if value is None:
            return None
        (wanted,) = (choice for choice in choices if choice is not type(None))
    plain = typing.get_origin(wanted) or wanted
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, plain) or isinstance(value, bool) or (plain is float and not math.isfinite(value)):
        raise ConfigurationError(f"{name}: {_said(value)} is not usable; give {_WANTED[plain]}")
    if plain is list:
        (item,) = typing.get_args(wanted)
        return value if item is Any else [_typed(entry, item, f"{name}[{at}]") for at, entry in enumerate(value)]
    if plain is dict:
        for key in value:
            if not isinstance(key, str):
                raise ConfigurationError(f"{name}: the key {_said(key)} is not usable; give texts as keys")
    return value


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _check(plan: EvidencePlanConfig) -> None:
    """What fields ask of each other, and the mappings in lists."""
    if both := sorted(set(plan.seeds.tune) & set(plan.seeds.compare)):
        raise ConfigurationError(
            f"seeds.compare: {both} are in seeds.tune too, so rates would be tuned on what they are compared by; "
            "give others"
        )
    _check_rates(plan)
    _check_selection(plan.selection, "selection")
    if "criterion" in plan.selection:
        raise ConfigurationError("selection.criterion: is each arm's to say; leave it out")
    for at, arm in enumerate(plan.arms):
        _check_arm(arm, f"arms[{at}]")
    for at, one in enumerate(plan.primary):
        _check_primary(one, f"primary[{at}]")


def _check_rates(plan: EvidencePlanConfig) -> None:
    given = {"rates": {which: getattr(plan.rates, which) or [] for which in _RATES}}
    for name, rates in (plan.rates.of or {}).items():
        place = given[f"rates.of.{name}"] = {}
        if not isinstance(rates, dict) or not rates or set(rates) - set(_RATES):
            example = "{lora: [2e-3]}"
            raise ConfigurationError(
                f"rates.of.{name}: {_said(rates)} is not usable; give some of {', '.join(_RATES)}, e.g. {example}"
            )
        for which, values in rates.items():
            place[which] = rates[which] = _typed(values, list[float], f"rates.of.{name}.{which}")
            if not values or min(values) <= 0 or len(set(values)) < len(values):
                raise ConfigurationError(
                    f"rates.of.{name}.{which}: {_said(values)} is not usable; give different rates above 0"
                )
    for place, rates in given.items():
        for which, values in rates.items():
            if values != sorted(values):
                raise ConfigurationError(f"{place}.{which}: {values} are in no order; give them from the lowest")


def _check_arm(arm: Any, name: str) -> None:
    if isinstance(arm, str):
        return
    if not isinstance(arm, dict):
        raise ConfigurationError(
            f"{name}: {_said(arm)} is not usable; give the name of an arm or {{name:, selection:}}"
        )
    for key in arm:
        if key not in _ARM_KEYS:
            raise ConfigurationError(f"{name}.{key}: is no field of an arm; give one of {', '.join(_ARM_KEYS)}")
    if not isinstance(arm.get("name"), str) or not _ARM_NAME.fullmatch(arm["name"]):
        raise ConfigurationError(
            f"{name}.name: {_said(arm.get('name'))} is not usable; give a name of letters, digits, _ . : + and -"
        )
    kind = arm.get("kind", "hybrid")
    if kind not in KINDS:
        raise ConfigurationError(f"{name}.kind: {_said(kind)} is not supported; choose one of {', '.join(KINDS)}")
    rank = arm.get("rank", 1)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigurationError(f"{name}.rank: {_said(rank)} is not usable; give a rank, e.g. 2")
    if kind == "full" and "rank" in arm:
        raise ConfigurationError(f"{name}.rank: {rank} has no effect with kind: full; leave it out")
    if "placement" in arm:
        read_placement(arm["placement"], f"{name}.placement")
    if kind == "hybrid":
        selection = arm.get("selection")
        # With a place for every component nothing is left to a criterion.
        if selection is None and isinstance(arm.get("placement"), dict):
            return
        if not isinstance(selection, dict) or "criterion" not in selection:
            kinds = ", or kind: lora for adapters alone" if "placement" in arm else ""
            raise ConfigurationError(
                f"{name}.selection: {_said(selection)} is not usable; give options such as {{criterion: lookahead}}"
                f"{kinds}"
            )
        _check_selection(selection, f"{name}.selection")
        if "placement" in arm and placement_in(selection):
            raise ConfigurationError(
                f"{name}.placement: selection has placement options, too; say where the arm trains in one of the two"
            )
    elif "selection" in arm:
        raise ConfigurationError(f"{name}.selection: has no effect with kind: {kind}; leave it out")


def _check_selection(selection: dict[str, Any], name: str) -> None:
    known = [option for option, _, _ in leaf_fields(ProbeCommandConfig) if not option.startswith(_NOT_AN_ARMS)]
    for option in selection:
        if option not in known:
            if str(option).startswith(_NOT_AN_ARMS):
                raise ConfigurationError(f"{name}.{option}: is not an arm's to say; leave it out")
            close = difflib.get_close_matches(str(option), known, n=1)
            hint = f"did you mean {close[0]}?" if close else "docs/configuration.md lists hybrid-lora-probe's"
            raise ConfigurationError(f"{name}.{option}: is no option that selects modules; {hint}")


def _check_primary(one: Any, name: str) -> None:
    example = "{arm: lookahead, against: [random]}"
    if not isinstance(one, dict) or set(one) != {"arm", "against"}:
        raise ConfigurationError(f"{name}: {_said(one)} is not usable; give {example}")
    if not isinstance(one["arm"], str):
        raise ConfigurationError(f"{name}.arm: {_said(one['arm'])} is not usable; give the name of an arm")
    against = one["against"]
    if not isinstance(against, list) or not against or not all(isinstance(other, str) for other in against):
        raise ConfigurationError(f"{name}.against: {_said(against)} is not usable; give names of arms, e.g. [random]")
    if one["arm"] in against or len(set(against)) < len(against):
        raise ConfigurationError(f"{name}.against: {_said(against)} is not usable; give other arms, each once")
