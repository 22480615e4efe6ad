"""Settle what a user's command and the plugin both have a say in, before anything is checked.

A value that somebody gave wins, wherever it stands, or is refused by ``requirements``; a default of the plugin takes
the place of verl's defaults only. What is decided here is told, a line for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.training.learning_rates import Rate, learning_rates
from hybrid_lora_plugin.verl_backend.given_settings import Given, given_settings, verls_configuration
from hybrid_lora_plugin.verl_backend.requirements import ACTOR, ENGINE_MODULE, MODEL, ROLLOUT

GROUP = Path(__file__).parent.parent / "conf" / "hybrid_lora" / "enabled.yaml"
RATE, STRATEGY = ACTOR + "optim.lr", ACTOR + "strategy"
#: modules that verl imports, which both sides may add to
MODULES = (MODEL + "external_lib", ROLLOUT + "checkpoint_engine.custom_backend_module")
#: set by the group, where a value of the user's own comes first
OWN_FIRST = (ROLLOUT + "load_format", MODEL + "lora.merge")
#: verl's name of an adapter's setting, and the plugin's
ADAPTER = {MODEL + "lora_rank": "hybrid_lora.lora.rank", MODEL + "lora_alpha": "hybrid_lora.lora.alpha"}


def settle(config: DictConfig) -> list[str]:
    """Bring ``config`` to what its user gave, and both learning rates with it.

    Args:
        config: a composed run with ``+hybrid_lora=enabled``; changed in place.

    Returns:
        What was decided, in lines for the user.

    Raises:
        ConfigurationError: two settings contradict each other.
    """
    options = [f"hybrid_lora.{name}" for name in _leaves(HybridLoraConfig)]
    names = [*options, *MODULES, *OWN_FIRST, *ADAPTER, RATE, STRATEGY]
    given = given_settings(config, names, _plugin_defaults(config))
    for name, found in given.items():
        # The group was composed after a file that sets it.
        _put(config, name, found.value)
    # As they come out, where a file or an argument refers to another setting or to the environment.
    given = {name: Given(_selected(config, name), found.where) for name, found in given.items()}
    lines = [_settle_modules(config, name, given.get(name)) for name in MODULES]
    trained = "lora" if _positive(given.get(MODEL + "lora_rank")) else "full"
    lines += _settle_adapter(config, given, trained)
    if STRATEGY not in given and _selected(config, STRATEGY) == "fsdp":
        _put(config, STRATEGY, "fsdp2")
    lines.append(_settle_rates(config, given, trained))
    return [line for line in lines if line]


def _selected(config: DictConfig, name: str) -> Any:
    value = OmegaConf.select(config, name)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _settle_modules(config: DictConfig, name: str, given: Given | None) -> str:
    theirs = [] if given is None or not given.value else given.value
    modules = [theirs] if isinstance(theirs, str) else list(theirs)
    others = [module for module in modules if module != ENGINE_MODULE]
    if not others:
        _put(config, name, ENGINE_MODULE)
        return ""
    _put(config, name, [*others, ENGINE_MODULE])
    return f"{name}: {', '.join(others)} ({given.where}) and the plugin's {ENGINE_MODULE}"


def _settle_adapter(config: DictConfig, given: dict[str, Given], trained: str) -> Iterator[str]:
    for name, option in ADAPTER.items():
        theirs, ours = given.get(name), given.get(option)
        if theirs is not None and theirs.value and not _positive(theirs):
            # Refused by ``requirements``, under the name that it was given by.
            continue
        # 0 is how a command says that it trains no LoRA.
        if theirs is not None and not (name.endswith("lora_rank") and not theirs.value):
            if ours is not None and ours.value != theirs.value:
                raise ConfigurationError(
                    f"{option}: {ours.value!r} ({ours.where}) and {name}={theirs.value!r} ({theirs.where}) contradict "
                    f"each other; give one of them",
                    see="two-settings-contradict",
                )
            _put(config, option, theirs.value)
            yield f"{option}={theirs.value} ({name}, {theirs.where})"
        elif trained == "lora" and ours is None and name.endswith("lora_alpha"):
            # What the command trained with before: verl's default, whatever the rank is.
            verls = OmegaConf.select(verls_configuration("ppo_trainer"), name)
            _put(config, option, verls)
            yield f"{option}={verls} (verl's default of {name})"
        _put(config, name, OmegaConf.select(config, option))


def _settle_rates(config: DictConfig, given: dict[str, Given], trained: str) -> str:
    def rate(name: str) -> Rate | None:
        value = given[name].value if name in given else None
        if value is None:
            return None
        try:
            number = float("nan" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            number = float("nan")
        if not number > 0:
            raise ConfigurationError(
                f"{name}: {value!r} is no learning rate; give a number above 0, e.g. 1e-6", see="option-not-usable"
            )
        return Rate(number, f"{name}, {given[name].where}")

    rates = learning_rates(rate("hybrid_lora.full_lr"), rate("hybrid_lora.lora.lr"), rate(RATE), trained)
    _put(config, "hybrid_lora.full_lr", rates.full.value)
    _put(config, "hybrid_lora.lora.lr", rates.lora.value)
    return str(rates)


def _positive(given: Given | None) -> bool:
    return given is not None and isinstance(given.value, int | float) and given.value > 0


def _put(config: DictConfig, name: str, value: Any) -> None:
    with open_dict(config):
        OmegaConf.update(config, name, value, force_add=True)


def _leaves(kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options of a configuration dataclass."""
    for spec in dataclasses.fields(kind):
        part = spec.default_factory if spec.default_factory is not dataclasses.MISSING else None
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            yield from _leaves(part, f"{prefix}{spec.name}.")
        else:
            yield prefix + spec.name


def _plugin_defaults(config: DictConfig) -> Callable[[str], Any]:
    """Name -> the plugin's default: an option's own, or what the group makes of the options for a setting of verl's."""
    options = OmegaConf.create({"hybrid_lora": OmegaConf.structured(HybridLoraConfig)})
    group = OmegaConf.load(GROUP)
    del group["defaults"], group["hydra"]
    group = OmegaConf.merge({"hybrid_lora": OmegaConf.to_container(config.hybrid_lora)}, group)

    def default_of(name: str) -> Any:
        source = options if name.startswith("hybrid_lora.") else group
        return OmegaConf.select(source, name, throw_on_resolution_failure=False)

    return default_of
