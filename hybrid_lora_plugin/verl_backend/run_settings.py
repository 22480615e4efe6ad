"""Settle what a user's command and the plugin both have a say in, before anything is checked.

A value that somebody gave wins, wherever it stands, or is refused by ``requirements``; a default of the plugin takes
the place of verl's defaults only. What is decided here is told, a line for each.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hybrid_lora_plugin.config import HybridLoraConfig, SelectionConfig, SyncConfig
from hybrid_lora_plugin.config_effect import PROBE, SELECTION, TRAINING, without_effect
from hybrid_lora_plugin.config_probe import LOOKAHEAD_STEPS
from hybrid_lora_plugin.config_trial import criterion_of
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.sync.base_weights import stored_dtypes
from hybrid_lora_plugin.training.learning_rates import Rate, learning_rates
from hybrid_lora_plugin.verl_backend.given_settings import (
    COMMAND_LINE,
    Given,
    given_settings,
    verls_configuration,
)
from hybrid_lora_plugin.verl_backend.requirements import ENGINE_MODULE
from hybrid_lora_plugin.verl_backend.run_kinds import ACTOR, KIND, MODEL, ROLLOUT, RunKind, kind_of_run

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
    kind = kind_of_run(config)
    lines = [] if kind.samples else [_settle_place(config, kind)]
    options = [f"hybrid_lora.{name}" for name in _leaves(HybridLoraConfig)]
    # Where this kind of run has them.
    modules, own_first = ([kind.place(name) for name in names if kind.place(name)] for names in (MODULES, OWN_FIRST))
    adapter = {kind.place(name): option for name, option in ADAPTER.items()}
    rate, strategy = kind.place(RATE), kind.place(STRATEGY)
    names = [*options, *modules, *own_first, *adapter, rate, strategy]
    given = given_settings(config, names, _plugin_defaults(config, kind))
    copied = _drop_copied_defaults(config, given, kind)
    for name, found in given.items():
        # The group was composed after a file that sets it.
        _put(config, name, found.value)
    # As they come out, where a file or an argument refers to another setting or to the environment.
    given = {name: Given(_selected(config, name), found.where) for name, found in given.items()}
    lines += [_settle_modules(config, name, given.get(name)) for name in modules]
    trained = "lora" if _positive(given.get(kind.place(MODEL + "lora_rank"))) else "full"
    lines += _settle_adapter(config, given, trained, adapter, kind)
    if strategy not in given and _selected(config, strategy) == "fsdp":
        _put(config, strategy, "fsdp2")
    lines.append(_settle_rates(config, given, trained, rate))
    lines.append(_settle_lookahead(config))
    lines.append(_settle_trial(config, kind))
    if not kind.samples:
        lines.append(_without_effect(given))
    lines.append(_unread(config, given))
    return [line for line in [*lines, copied] if line]


def _drop_copied_defaults(config: DictConfig, given: dict[str, Given], kind: RunKind) -> str:
    """Drop from ``given`` what a file has from a copy of verl's defaults and nobody can have meant; returns a line.

    ``lora.merge: false`` is how verl has it. It says how a rollout engine runs an adapter, which here the sync mode
    decides; and of a run that trains no LoRA neither it nor alpha says anything.
    """
    lora, line = False, ""
    if rank := given.get(kind.place(MODEL + "lora_rank")):
        _put(config, kind.place(MODEL + "lora_rank"), rank.value)
        lora = _positive(Given(_selected(config, kind.place(MODEL + "lora_rank")), rank.where))
    for name in map(kind.place, (MODEL + "lora.merge", MODEL + "lora_alpha")):
        found = given.get(name)
        if found is None or found.where == COMMAND_LINE:
            continue
        if found.value != OmegaConf.select(verls_configuration(kind.primary), name):
            continue
        if name.endswith("lora.merge"):
            del given[name]
            line = f"{name} follows from hybrid_lora.sync; {found.value} ({found.where}) is verl's default"
        elif not lora:
            del given[name]
    return line if lora and kind.samples else ""


def _selected(config: DictConfig, name: str) -> Any:
    value = OmegaConf.select(config, name)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _no_default(name: str) -> None:
    """The plugin has no default of a setting."""


def _settle_place(config: DictConfig, kind: RunKind) -> str:
    """Move what the group sets for a model to where a run without rollouts has its model, and drop the rest of it."""
    # Without Hydra's node nobody can tell it from what the group sets.
    given = given_settings(config, ["actor_rollout_ref"], _no_default) if "hydra" in config else {}
    for found in given.values():
        name = _first_leaf(found.value, "actor_rollout_ref")
        instead = kind.place(name)
        raise ConfigurationError(
            f"{name}: it is set ({found.where}), and {kind.command} reads no such setting; "
            + (f"give {instead}" if instead else "leave it out"),
            see="option-not-usable",
        )
    group = OmegaConf.load(GROUP).actor_rollout_ref.model
    dtype, line = _exported_dtype(config, kind)
    group.lora.rollout_dtype = dtype
    with open_dict(config):
        config.model.lora = OmegaConf.merge(config.model.get("lora") or {}, group.lora)
        del config["actor_rollout_ref"]
    _put(config, kind.place(KIND), kind.name)
    return line


def _exported_dtype(config: DictConfig, kind: RunKind) -> tuple[str, str]:
    """Type of exported weights where no rollout engine has one, and a line that says so."""
    name = kind.place(ROLLOUT + "dtype")
    given = given_settings(config, [name], _no_default).get(name)
    if given is not None and given.value is not None:
        dtype, where = str(given.value), f"{name}, {given.where}"
    else:
        path = os.path.expanduser(str(OmegaConf.select(config, "model.path")))
        half = os.path.isdir(path) and stored_dtypes(path) == {"F16"}
        dtype = "float16" if half else "bfloat16"
        where = "the checkpoint's" if half else f"no rollout engine has one; or give +{name}=float32"
    return dtype, f"exported weights: {dtype} ({where}), unless hybrid-lora-export is given a dtype"


def _first_leaf(value: Any, name: str) -> str:
    while isinstance(value, dict) and value:
        part, value = next(iter(value.items()))
        name = f"{name}.{part}"
    return name


def _without_effect(given: dict[str, Given]) -> str:
    """A line on options for the rollout engine that a run without one was given."""
    # These two also say how exported weights are rounded.
    options = {f"hybrid_lora.{spec.name}" for spec in dataclasses.fields(SyncConfig)} - {
        "hybrid_lora.sync_rounding",
        "hybrid_lora.sync_seed",
    }
    named = sorted(options & given.keys())
    return f"without effect, as there is no rollout engine: {', '.join(named)}" if named else ""


def _unread(config: DictConfig, given: dict[str, Given]) -> str:
    """A line on options that nothing reads under the others; refused where the command itself gives one."""
    options, group = config.hybrid_lora, "hybrid_lora."
    names = [name.removeprefix(group) for name in given if name.startswith(group)]
    effects, lines = (*PROBE, *SELECTION, *TRAINING), []
    if options.get("allocation"):
        # Kept by a command that probed when it was first started.
        choosing = {spec.name for spec in dataclasses.fields(SelectionConfig)} | {"probe", "trial", "output_dir"}
        unread = sorted(group + name for name in names if name.partition(".")[0] in choosing)
        lines += [f"without effect, as hybrid_lora.allocation is given: {', '.join(unread)}"] if unread else []
        effects = TRAINING
    elif options.get("phase") == "probe":
        return ""
    try:
        unread = without_effect(options, names, effects)
    except OmegaConfBaseException:
        unread = []  # what is no such option is refused where all are read
    # An empty list gives nothing: it only says so.
    unread = [(name, when) for name, when in unread if given[group + name].value not in ([], "[]")]
    for name, when in unread:
        if given[group + name].where == COMMAND_LINE:
            raise ConfigurationError(
                f"{group}{name}: {given[group + name].value!r} has no effect here; leave it out, it is read {when}",
                see="option-not-usable",
            )
    if unread:
        lines.append(f"without effect under the other options: {', '.join(group + name for name, _ in unread)}")
    return "; ".join(lines)


def _settle_modules(config: DictConfig, name: str, given: Given | None) -> str:
    theirs = [] if given is None or not given.value else given.value
    modules = [theirs] if isinstance(theirs, str) else list(theirs)
    others = [module for module in modules if module != ENGINE_MODULE]
    if not others:
        _put(config, name, ENGINE_MODULE)
        return ""
    _put(config, name, [*others, ENGINE_MODULE])
    return f"{name}: {', '.join(others)} ({given.where}) and the plugin's {ENGINE_MODULE}"


def _settle_adapter(
    config: DictConfig, given: dict[str, Given], trained: str, adapter: dict[str, str], kind: RunKind
) -> Iterator[str]:
    for name, option in adapter.items():
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
            verls = OmegaConf.select(verls_configuration(kind.primary), name)
            _put(config, option, verls)
            yield f"{option}={verls} (verl's default of {name})"
        _put(config, name, OmegaConf.select(config, option))


def _settle_rates(config: DictConfig, given: dict[str, Given], trained: str, own: str) -> str:
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

    rates = learning_rates(rate("hybrid_lora.full_lr"), rate("hybrid_lora.lora.lr"), rate(own), trained)
    _put(config, "hybrid_lora.full_lr", rates.full.value)
    _put(config, "hybrid_lora.lora.lr", rates.lora.value)
    factors, steps = (
        OmegaConf.select(config, f"hybrid_lora.{name}") for name in ("full_lr_factors", "full_warmup_steps")
    )
    said = [f"of full modules {', '.join(map(str, factors))}"] if factors else []
    said += [f"full modules warmed up over {steps} steps"] if steps else []
    return "; ".join([str(rates), *said])


def _settle_lookahead(config: DictConfig) -> str:
    """How far ``lookahead`` looks: by this run's rate of full modules, and to the middle of it where it has an end."""
    asked = [config.hybrid_lora.criterion]
    if asked == ["trial"]:
        asked = [criterion_of(str(entry)) for entry in config.hybrid_lora.trial.portfolio]
    if "lookahead" not in asked or config.hybrid_lora.allocation:
        return ""
    probe = "hybrid_lora.probe.lookahead."
    if OmegaConf.select(config, probe + "lr") is None:
        _put(config, probe + "lr", float(config.hybrid_lora.full_lr))
    steps, total = OmegaConf.select(config, probe + "steps"), OmegaConf.select(config, "trainer.total_training_steps")
    if steps is None:
        steps = max(1, int(total) // 2) if total else LOOKAHEAD_STEPS
        _put(config, probe + "steps", steps)
        source = "half of trainer.total_training_steps" if total else "no trainer.total_training_steps to halve"
        return f"{probe}steps={steps} ({source})"
    return ""


def _settle_trial(config: DictConfig, kind: RunKind) -> str:
    """How ``trial`` trains its candidates: at the rates and with the optimizer of this run."""
    if config.hybrid_lora.criterion != "trial" or config.hybrid_lora.allocation:
        return ""
    trial, optim = "hybrid_lora.trial.", kind.place(ACTOR + "optim.")
    own = {
        "full_lr": "hybrid_lora.full_lr",
        "lora_lr": "hybrid_lora.lora.lr",
        "full_lr_factors": "hybrid_lora.full_lr_factors",
        "weight_decay": optim + "weight_decay",
        "betas": optim + "betas",
        "clip_grad": optim + "clip_grad",
        "run_steps": "trainer.total_training_steps",
    }
    if not kind.samples:
        own["batch_size"] = "data.train_batch_size"
    taken = []
    for name, source in own.items():
        value = _selected(config, source)
        if _selected(config, trial + name) in (None, []) and value not in (None, []):
            _put(config, trial + name, value)
            taken.append(f"{name}={value} ({source})")
    said = f"hybrid_lora.trial: {', '.join(taken)}" if taken else ""
    left = []
    if (optimizer := _selected(config, optim + "optimizer")) not in (None, "AdamW"):
        left.append(f"{optim}optimizer={optimizer}, in place of which it takes AdamW")
    if steps := _selected(config, "hybrid_lora.full_warmup_steps"):
        left.append(f"hybrid_lora.full_warmup_steps={steps}")
    for name, nothing in (("lr_warmup_steps_ratio", 0), ("lr_scheduler_type", "constant")):
        if (value := _selected(config, optim + name)) not in (None, nothing):
            left.append(f"{optim}{name}={value}")
    return "; ".join(part for part in (said, f"left out of the trial: {', '.join(left)}" if left else "") if part)


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


def _plugin_defaults(config: DictConfig, kind: RunKind) -> Callable[[str], Any]:
    """Name -> the plugin's default: an option's own, or what the group makes of the options for a setting of verl's."""
    options = OmegaConf.create({"hybrid_lora": OmegaConf.structured(HybridLoraConfig)})
    group = OmegaConf.load(GROUP)
    del group["defaults"], group["hydra"]
    group = OmegaConf.merge({"hybrid_lora": OmegaConf.to_container(config.hybrid_lora)}, group)
    if not kind.samples:
        group.model = group.pop("actor_rollout_ref").model

    def default_of(name: str) -> Any:
        source = options if name.startswith("hybrid_lora.") else group
        return OmegaConf.select(source, name, throw_on_resolution_failure=False)

    return default_of
