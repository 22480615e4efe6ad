"""Protocols by name: those of this package, and anybody's own as ``module:callable``."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.config_evidence import EvidencePlanConfig
from hybrid_lora_plugin.errors import ConfigurationError, reason_of
from hybrid_lora_plugin.evidence.arms import asks_placement
from hybrid_lora_plugin.evidence.protocol import ZEROTH, Protocol

#: name in a plan -> ``module:callable`` that makes it
PROTOCOLS = {
    "sft": "hybrid_lora_plugin.evidence.replicas:SftProtocol",
    "policy": "hybrid_lora_plugin.evidence.replicas:PolicyProtocol",
    "rl": "hybrid_lora_plugin.evidence.verl_runs:VerlProtocol",
}


def open_protocol(
    name: str, settings: Mapping[str, Any], folder: Path, device: str, bases: Sequence[str], tasks: Sequence[str]
) -> Protocol:
    """Make the protocol of a plan.

    Args:
        name: one of ``PROTOCOLS``, or ``module:callable``, whose callable takes the other arguments.
        settings: the plan's block of that name.
        folder: for what the protocol makes and keeps.
        device: ``auto``, ``cpu`` or ``cuda``.
        bases, tasks: the plan's.

    Raises:
        ConfigurationError: there is no such protocol, or it does not take these settings.
    """
    place = PROTOCOLS.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"give {', '.join(PROTOCOLS)} or your own as module:callable"
        raise ConfigurationError(f"protocol: {name!r} is unknown; {hint}")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"protocol: {name!r} cannot be imported ({reason_of(error)}); give {', '.join(PROTOCOLS)} or a "
            "module:callable on PYTHONPATH"
        ) from error
    return make(settings, Path(folder), device, list(bases), list(tasks))


def refuse_unknown_kinds(protocol: Protocol, plan: EvidencePlanConfig) -> None:
    """Refuse arms that a protocol does not train.

    Raises:
        ConfigurationError: zeroth order, or a placement.
    """
    arms = [arm if isinstance(arm, str) else arm.get("kind") for arm in plan.arms]
    if ZEROTH in arms and not protocol.knows_zeroth_order:
        raise ConfigurationError(
            f"arms: protocol {plan.protocol} does not train {ZEROTH}; leave that arm out, or use protocol sft or policy"
        )
    if asks_placement(plan) and not protocol.knows_placement:
        raise ConfigurationError(
            f"arms: protocol {plan.protocol} leaves no module frozen, and an arm has a placement; leave it out, or use "
            f"a protocol that does, as sft, policy and rl do"
        )
