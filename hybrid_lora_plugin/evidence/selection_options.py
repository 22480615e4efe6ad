"""What an arm says of its selection, as the settings of a probe and of the choice after it."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from hybrid_lora_plugin.config import ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.protocol import Arm
from hybrid_lora_plugin.probing.trial.options import check_trial
from hybrid_lora_plugin.scoring import get_criterion


def selection_config(arm: Arm, probe: ProbeConfig, rank: int, seed: int) -> ProbeCommandConfig:
    """The settings of an arm's probe and selection.

    An arm that draws, and says no ``control.seed``, gets one from its draw and the start: other modules at each.

    Raises:
        ConfigurationError: an option of ``arm.selection`` that there is not, or a value that cannot work.
    """
    config = ProbeCommandConfig(probe=dataclasses.replace(probe, seed=seed))
    config.lora.rank = rank
    for name, value in arm.selection.items():
        _set(config, arm.name, name, value)
    if "seed" in get_criterion(config.criterion).options and "control.seed" not in arm.selection:
        config.control.seed = 1000 * seed + arm.draw
    try:
        validate(config)
        if config.criterion == "trial":
            check_trial(config)
    except ConfigurationError as error:
        raise ConfigurationError(f"arm {arm.name}: {error}") from error
    return config


def _set(config: ProbeCommandConfig, arm: str, name: str, value: Any) -> None:
    place, _, leaf = name.rpartition(".")
    part: Any = config
    for step in place.split(".") if place else ():
        part = getattr(part, step, None)
    known = {spec.name for spec in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else set()
    if leaf not in known or name == "probe.seed" or name.split(".")[0] in ("model", "output_dir", "lora"):
        raise ConfigurationError(
            f"arm {arm}: selection.{name} is no option that selects modules; see docs/configuration.md"
        )
    type_ = typing.get_type_hints(type(part))[leaf]
    if typing.get_origin(type_) is list and not isinstance(value, list | tuple):
        value = [value]
    setattr(part, leaf, list(value) if isinstance(value, tuple) else value)
