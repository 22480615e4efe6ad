"""Options that change nothing under the other options: refused where somebody gives one, and not dropped in silence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from hybrid_lora_plugin.config_probe import AUTO, AdaLoraConfig
from hybrid_lora_plugin.config_selection import NAMING, WITHOUT_PROBE, WITHOUT_WARMUP
from hybrid_lora_plugin.config_trial import criterion_of
from hybrid_lora_plugin.config_zeroth_order import ZerothOrderConfig
from hybrid_lora_plugin.errors import ConfigurationError

TRIAL = "trial"


class Effect(NamedTuple):
    """When an option is read.

    Attributes:
        option: its dotted name, or the part of several names up to a dot.
        is_read: configuration -> whether anything reads it.
        when: under which options it is, in words.
    """

    option: str
    is_read: Callable[[Any], bool]
    when: str


def _criterion(*names: str) -> Callable[[Any], bool]:
    return lambda config: config.criterion in names


def _asked(config: Any) -> tuple[str, ...]:
    """The criteria that a probe measures for: of a trial, those of its portfolio."""
    if config.criterion == TRIAL:
        return tuple(criterion_of(str(entry)) for entry in config.trial.portfolio)
    return (config.criterion,)


def _asks_for(*names: str) -> Callable[[Any], bool]:
    return lambda config: any(name in names for name in _asked(config))


def _asks_beside(*names: str) -> Callable[[Any], bool]:
    return lambda config: any(name not in names for name in _asked(config))


_probed_by_svd_lora = _asks_beside(*WITHOUT_PROBE, *WITHOUT_WARMUP, "adalora", "autolora", "full_pruning")
_measures_controls = _asks_beside(
    *WITHOUT_PROBE, *WITHOUT_WARMUP, "adalora", "autolora", "full_pruning", "residual_gradient"
)
_warms_up = _asks_beside(*WITHOUT_PROBE, *WITHOUT_WARMUP)


def _initialised_by_adalora(config: Any) -> bool:
    return "adalora" in _asked(config) or (_probed_by_svd_lora(config) and config.probe.init == "adalora")


def _reads_the_plain_rate(config: Any) -> bool:
    if config.probe.init == "adalora":
        return "autolora" in _asked(config)
    return _asks_beside(*WITHOUT_PROBE, *WITHOUT_WARMUP, "full_pruning", "adalora")(config)


#: of whoever selects modules
SELECTION = (
    Effect("control.seed", _criterion("random"), "with criterion=random"),
    Effect("control.type", _criterion("spread"), "with criterion=spread"),
    Effect("control.depth", _criterion("spread"), "with criterion=spread"),
    Effect("control.modules", _criterion("explicit"), "with criterion=explicit"),
    Effect(
        "direction", lambda config: config.criterion not in (*NAMING, TRIAL), "with a criterion that orders the modules"
    ),
    Effect("budget.", lambda config: config.criterion not in NAMING, "with a criterion that orders the modules"),
    Effect("budget.total", lambda config: config.budget.mode == "total_trainable", "with budget.mode=total_trainable"),
    Effect(
        "budget.ratio", lambda config: config.budget.mode != "total_trainable", "with budget.mode=parameters or modules"
    ),
)
#: of whoever probes
PROBE = (
    Effect("probe.", lambda config: config.criterion not in WITHOUT_PROBE, "with a criterion that needs a probe"),
    Effect("trial.", _criterion(TRIAL), "with criterion=trial"),
    *(
        Effect(f"probe.{name}", lambda config: config.probe.warmup_steps == AUTO, "with probe.warmup_steps=auto")
        for name in ("max_warmup_steps", "warmup_check_steps", "warmup_check_partitions", "warmup_agreement")
    ),
    *(
        Effect(f"probe.{name}", lambda config: config.probe.partitions == AUTO, "with probe.partitions=auto")
        for name in ("max_partitions", "settled_share")
    ),
    Effect("probe.seed", lambda config: not config.probe.seeds, "without probe.seeds"),
    Effect("probe.adalora.lr", _initialised_by_adalora, "with criterion=adalora or probe.init=adalora"),
    *(
        Effect(f"probe.adalora.{spec.name}", _asks_for("adalora"), "with criterion=adalora")
        for spec in dataclasses.fields(AdaLoraConfig)
        if spec.name != "lr"
    ),
    Effect("probe.warmup_steps", _warms_up, "with another criterion, as this one reads the model as it is"),
    Effect("probe.autolora.", _asks_for("autolora"), "with criterion=autolora"),
    Effect("probe.lookahead.", _asks_for("lookahead"), "with criterion=lookahead"),
    Effect(
        "probe.micro_batch_size",
        lambda config: config.probe.micro_batch_tokens is None,
        "without probe.micro_batch_tokens, which takes its place",
    ),
    Effect("probe.full_lr", _asks_for("full_pruning"), "with criterion=full_pruning"),
    Effect(
        "probe.lr",
        _reads_the_plain_rate,
        "with another criterion and probe.init=default; give probe.full_lr or probe.adalora.lr",
    ),
    Effect("probe.init", _probed_by_svd_lora, "with another criterion, as this one has its own"),
    Effect("probe.controls", _measures_controls, "with another criterion, as this one measures no controls"),
)
#: of a run
TRAINING = tuple(
    Effect(f"zeroth_order.{spec.name}", lambda config: config.zeroth_order.enabled, "with zeroth_order.enabled=true")
    for spec in dataclasses.fields(ZerothOrderConfig)
    if spec.name != "enabled"
)
#: of the command that probes and trains nothing else
COMMAND = (
    Effect(
        "lora.alpha",
        lambda config: config.criterion == TRIAL or "adalora" in _asked(config),
        "with criterion=adalora or trial; else the probe has a scale of its own (Eq. 7), and a run takes "
        "hybrid_lora.lora.alpha",
    ),
    Effect("model.dtype", lambda config: config.criterion not in WITHOUT_PROBE, "with a criterion that needs a probe"),
)


def without_effect(config: Any, given: Iterable[str], effects: Iterable[Effect]) -> list[tuple[str, str]]:
    """(option, when it is read) for each option that was given and that nothing reads.

    Args:
        config: with all options, given or not.
        given: names of the options that somebody gave.
        effects: that apply.
    """
    effects = list(effects)
    found = []
    for name in dict.fromkeys(given):
        for effect in effects:
            concerned = name.startswith(effect.option) if effect.option.endswith(".") else name == effect.option
            if concerned and not effect.is_read(config):
                found.append((name, effect.when))
                break
    return found


def refuse_without_effect(config: Any, given: Iterable[str], effects: Iterable[Effect]) -> None:
    """Raise ``ConfigurationError`` on the first option that was given and that nothing reads; as ``without_effect``."""
    for name, when in without_effect(config, given, effects):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        raise ConfigurationError(f"{name}: {value!r} has no effect here; leave it out, it is read {when}")
