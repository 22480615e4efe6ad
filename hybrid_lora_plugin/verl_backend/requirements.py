"""What Hybrid-LoRA needs of a verl configuration, checked on the driver and again in every worker.

``check`` takes settings by their full names in a reinforcement learning run; ``run_kinds`` says where another kind of
run has them, so that a message names what its user can type.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.utils.device import get_device_name

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError, explained
from hybrid_lora_plugin.model_families import recurrent_layers
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.verl_backend.given_settings import verls_configuration
from hybrid_lora_plugin.verl_backend.optimizer_settings import check_optimizer
from hybrid_lora_plugin.verl_backend.requirement_rules import (
    ADAPTER_RULES,
    BUILDING_RULES,
    PARTIAL_RULES,
    RECEIVER_MERGE_RULES,
    RULES,
    SFT_RULES,
    Rule,
)
from hybrid_lora_plugin.verl_backend.run_kinds import (
    ACTOR,
    MODEL,
    REINFORCEMENT_LEARNING,
    ROLLOUT,
    RunKind,
    kind_of_model,
    kind_of_run,
)
from hybrid_lora_plugin.verl_backend.sender import waits
from hybrid_lora_plugin.verl_backend.vllm_arguments import check_vllm_arguments
from hybrid_lora_plugin.verl_backend.zeroth_order_requirements import (
    PARAM_DTYPE,
    ZEROTH_ORDER_SETTINGS,
    check_zeroth_order,
)

ENGINE_MODULE = "hybrid_lora_plugin.verl_backend.engine_registration"


def hybrid_config(node: Mapping[str, Any]) -> HybridLoraConfig:
    """The ``hybrid_lora`` node as a checked dataclass.

    Raises:
        ConfigurationError: an unknown option, a value of the wrong type, or one that ``validate`` refuses.
    """
    _require_texts(node, HybridLoraConfig, "hybrid_lora.")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HybridLoraConfig), dict(node)))
    except OmegaConfBaseException as error:
        field = f"hybrid_lora.{error.full_key}" if error.full_key else "hybrid_lora"
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"{field}: {reason}; see docs/configuration.md for the options", see="option-not-usable"
        ) from error
    with explained(otherwise="option-not-usable"):
        validate(config, "hybrid_lora.")
    for name in ("allocation", "output_dir"):
        if (path := getattr(config, name)) is not None:
            setattr(config, name, os.path.expanduser(path))
    if not config.enabled:
        raise ConfigurationError(
            "hybrid_lora.enabled: False cannot undo +hybrid_lora=enabled; leave that argument out",
            see="option-not-usable",
        )
    return config


def _require_texts(node: Mapping[str, Any], kind: type, prefix: str) -> None:
    """Refuse what Hydra has made of a text that looks like a truth value or a fraction: it cannot be undone."""
    types = get_type_hints(kind)
    for spec in dataclasses.fields(kind):
        value, name = node.get(spec.name), prefix + spec.name
        if dataclasses.is_dataclass(types[spec.name]):
            if isinstance(value, Mapping):
                _require_texts(value, types[spec.name], name + ".")
            continue
        # A number or a word is no text of a user's own.
        if str not in (types[spec.name], *get_args(types[spec.name])) or int in get_args(types[spec.name]):
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool | float):
                raise ConfigurationError(
                    f"{name}: {item!r} is what Hydra makes of a text that is not quoted; quote it for Hydra and for "
                    f"the shell, e.g. '{name}=\"{str(item).lower()}\"'",
                    see="option-not-usable",
                )


def require_rates(config: HybridLoraConfig) -> None:
    """Refuse a ``hybrid_lora`` node whose learning rates nobody settled.

    Raises:
        ConfigurationError: the run was composed without the check that Hydra makes when verl's own commands start.
    """
    if config.full_lr is None or config.lora.lr is None:
        name = "full_lr" if config.full_lr is None else "lora.lr"
        raise ConfigurationError(
            f"hybrid_lora.{name}: None in a worker, so this configuration was not checked on the driver; start the run "
            "by a command of verl's, or call hybrid_lora_plugin.verl_backend.preflight.check_configuration(config) "
            "first",
            see="configuration-not-checked",
        )


def check_sync(settings: Mapping[str, Any], sync: str) -> None:
    """Refuse a combination that the sync mode cannot carry, naming one that can.

    Args:
        settings: values by full verl name; those without a rule are ignored.
        sync: ``hybrid_lora.sync``.

    Raises:
        ConfigurationError: naming the setting and its value, the mode, and what works.
    """
    mode = sync_mode(sync)
    merge = settings.get(MODEL + "lora.merge")
    if merge is not None and merge is mode.engine_adapter:
        raise ConfigurationError(
            f"{MODEL}lora.merge: {merge!r} does not work with hybrid_lora.sync={sync}; leave it as "
            f"+hybrid_lora=enabled sets it",
            see="set-by-the-plugin",
        )
    rules = (PARTIAL_RULES if mode.partial else {}) | (ADAPTER_RULES if mode.engine_adapter else {})
    if mode.receiver_merges:
        rules = rules | RECEIVER_MERGE_RULES
    if mode.builds_on_last:
        rules = rules | BUILDING_RULES
    for name, rule in rules.items():
        if settings.get(name) is not None and not rule.usable(settings[name]):
            raise ConfigurationError(
                f"{name}: {settings[name]!r} does not work with hybrid_lora.sync={sync}; give {rule.wanted}",
                see=rule.see,
            )


def check(settings: Mapping[str, Any], kind: RunKind = REINFORCEMENT_LEARNING) -> None:
    """Refuse the first setting that Hybrid-LoRA cannot run with.

    Args:
        settings: values by full verl name; those without a rule, or that the kind of run does not have, are ignored.
        kind: of the run.

    Raises:
        ConfigurationError: naming the setting, its value and a usable one.
    """
    for name, rule in _rules(kind).items():
        if name in settings and kind.place(name) and not rule.usable(settings[name]):
            raise ConfigurationError(
                f"{kind.place(name)}: {settings[name]!r} does not work with hybrid_lora; give {kind.text(rule.wanted)}",
                see=rule.see,
            )


def _rules(kind: RunKind) -> dict[str, Rule]:
    return RULES if kind.samples else RULES | SFT_RULES


def check_sharding(strategy: str, fsdp_size: int, ranks: int, kind: RunKind = REINFORCEMENT_LEARNING) -> None:
    """Refuse FSDP1 in groups of one rank: torch 2.13 reduces no gradient there, and every rank trains a model of its
    own.

    Args:
        strategy: fsdp or fsdp2.
        fsdp_size: ranks that share one copy of the weights; below 1 all of them.
        ranks: of the trainer.
        kind: of the run.

    Raises:
        ConfigurationError: naming what works.
    """
    if strategy == "fsdp" and fsdp_size == 1 and ranks > 1:
        raise ConfigurationError(
            f"{kind.place(ACTOR + 'fsdp_config.fsdp_size')}: 1 with strategy=fsdp on {ranks} ranks never reduces "
            f"gradients; give {kind.place(ACTOR + 'strategy')}=fsdp2, or an fsdp_size of -1 or at least 2",
            see="strategy-not-supported",
        )


def check_sequence_parallel(model_config: Any, size: int, name: str) -> None:
    """Refuse to split rows over ranks where the model carries a state along them.

    Args:
        model_config: the Hugging Face config.
        size: ranks that a row is split over, verl's Ulysses.
        name: of the setting that says so.

    Raises:
        ConfigurationError: naming what works.
    """
    if size > 1 and recurrent_layers(model_config):
        raise ConfigurationError(
            f"{name}: {size}, but this model has recurrent layers, whose state does not go from one rank's part of a "
            "row to the next; give 1",
            see="recurrent-model-not-supported",
        )


def check_save(save: str, strategy: str, kind: RunKind = REINFORCEMENT_LEARNING) -> None:
    """Refuse to save whole tensors of what trains where FSDP1 keeps pieces of them.

    Args:
        save: ``hybrid_lora.save``.
        strategy: fsdp or fsdp2.
        kind: of the run.

    Raises:
        ConfigurationError: naming what works.
    """
    if save == "trainable" and strategy == "fsdp":
        raise ConfigurationError(
            f"hybrid_lora.save: 'trainable' does not work with {kind.place(ACTOR + 'strategy')}=fsdp; give fsdp2 "
            "there, or hybrid_lora.save=full",
            see="strategy-not-supported",
        )


def check_waits(sync_timeout: float, sync_check: str, nccl_timeout: float | None) -> None:
    """Refuse waits of a sync that NCCL's watchdog would end first: the run would die without saying what it waited for.

    Args:
        sync_timeout, sync_check: of the ``hybrid_lora`` node, seconds and mode.
        nccl_timeout: ``actor_rollout_ref.nccl_timeout``, seconds; None where the configuration has none.

    Raises:
        ConfigurationError: naming the largest limit that works, and the other way out.
    """
    fixed_prompt = sync_check == "logprobs"
    longest = waits.longest(sync_timeout, fixed_prompt)
    if nccl_timeout is not None and longest >= nccl_timeout:
        fitting = waits.largest_limit(nccl_timeout, fixed_prompt)
        smaller = f"hybrid_lora.sync_timeout={fitting} or less, or " if fitting else ""
        raise ConfigurationError(
            f"hybrid_lora.sync_timeout: {sync_timeout:g} makes the longest wait of a sync {longest:g} s, and "
            f"actor_rollout_ref.nccl_timeout={nccl_timeout:g} ends the run before it can say what it waited for; give "
            f"{smaller}actor_rollout_ref.nccl_timeout above {longest:g}",
            see="sync-timeout-above-the-watchdogs",
        )


def _check_other_lora(config, kind: RunKind) -> None:
    """Refuse settings of ``model.lora``, which are Megatron's: here they would have no effect."""
    place = kind.place(MODEL + "lora")
    for name, default in OmegaConf.select(verls_configuration(kind.primary), place).items():
        value = OmegaConf.select(config, f"{place}.{name}", default=default)
        if name != "merge" and value != default:
            raise ConfigurationError(
                f"{place}.{name}: {value!r} has no effect, because it is for verl's Megatron engine; leave it "
                "out, hybrid_lora.lora has rank, alpha and dropout",
                see="lora-setting-of-verl-not-usable",
            )


def check_run(config) -> None:
    """``check`` on a whole composed verl configuration (OmegaConf), and what else can be known of one.

    Raises:
        ConfigurationError: naming the setting, its value and a usable one.
    """
    kind = kind_of_run(config)

    def setting(name: str) -> Any:
        value = kind.select(config, name)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    optimizer = (
        setting(f"{ACTOR}optim.{name}") for name in ("optimizer_impl", "optimizer", "override_optimizer_config")
    )
    rules = RULES | PARTIAL_RULES | BUILDING_RULES | ADAPTER_RULES | RECEIVER_MERGE_RULES
    settings = {name: setting(name) for name in rules}
    check(settings, kind)
    # A run of another engine is told of that first.
    _check_other_lora(config, kind)
    check_optimizer(kind.place(ACTOR + "optim."), *optimizer)
    fsdp_size = int(kind.select(config, ACTOR + "fsdp_config.fsdp_size", default=-1))
    check_sharding(settings[ACTOR + "strategy"], fsdp_size, kind.ranks(config), kind)
    check_save(setting("hybrid_lora.save"), settings[ACTOR + "strategy"], kind)
    hybrid = hybrid_config(OmegaConf.to_container(config.hybrid_lora, resolve=True))
    check_zeroth_order({name: setting(name) for name in ZEROTH_ORDER_SETTINGS}, hybrid, kind)
    if not kind.samples:
        return
    check_sync(settings, setting("hybrid_lora.sync"))
    check_vllm_arguments(setting(ROLLOUT + "engine_kwargs.vllm"), setting(MODEL + "override_config"))
    timeouts = ("hybrid_lora.sync_timeout", "hybrid_lora.sync_check", "actor_rollout_ref.nccl_timeout")
    check_waits(*(setting(name) for name in timeouts))


def check_engine(model_config, engine_config, checkpoint_config) -> HybridLoraConfig:
    """``check`` on the dataclasses a verl worker builds its engine from; returns their ``hybrid_lora`` node."""
    node = model_config.lora["hybrid"]
    hybrid = hybrid_config(OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node))
    precision = engine_config.mixed_precision or {}
    kind = kind_of_model(model_config)
    settings = {
        # As it is here, also where the driver has no device and nobody gave one.
        "trainer.device": get_device_name(),
        ACTOR + "strategy": engine_config.strategy,
        ACTOR + "fsdp_config.model_dtype": engine_config.model_dtype,
        ACTOR + "fsdp_config.mixed_precision.param_dtype": precision.get("param_dtype", "bf16"),
        ACTOR + "checkpoint.save_lora_only": getattr(checkpoint_config, "save_lora_only", False),
        MODEL + "lora_rank": model_config.lora_rank,
        MODEL + "lora_alpha": model_config.lora_alpha,
        MODEL + "lora.merge": model_config.lora.get("merge"),
        MODEL + "lora.rollout_dtype": model_config.lora.get("rollout_dtype"),
        MODEL + "lora_adapter_path": model_config.lora_adapter_path,
        MODEL + "target_modules": model_config.target_modules,
    }
    check(settings, kind)
    check_save(hybrid.save, engine_config.strategy, kind)
    moved = {
        ACTOR + "strategy": engine_config.strategy,
        "hybrid_lora.sync": hybrid.sync,
        "hybrid_lora.lora.dropout": hybrid.lora.dropout,
        PARAM_DTYPE: precision.get("param_dtype"),
    }
    check_zeroth_order(moved, hybrid, kind)
    if kind.samples:
        check_sync(settings, hybrid.sync)
    return hybrid
