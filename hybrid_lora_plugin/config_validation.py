"""Values of a configuration that cannot work, refused before anything is loaded or written."""

from __future__ import annotations

import dataclasses
from typing import Any

from hybrid_lora_plugin.config import ProbeConfig
from hybrid_lora_plugin.errors import ConfigurationError


def _check(config: Any, prefix: str) -> None:
    for spec in dataclasses.fields(config):
        value, name = getattr(config, spec.name), f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(value):
            _check(value, name + ".")
            continue
        choices = spec.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigurationError(f"{name}: {value!r} is not supported; choose one of {', '.join(choices)}")


def validate(config: Any, prefix: str = "") -> None:
    """Refuse values that cannot work, before anything is loaded or written.

    Args:
        config: one of the dataclasses of ``config``; the parts it has are checked.
        prefix: put before each field name in messages, e.g. ``"hybrid_lora."``.

    Raises:
        ConfigurationError: naming the field, the value and the way out.
    """
    _check(config, prefix)

    def require(ok: bool, name: str, wanted: str) -> None:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if not ok:
            raise ConfigurationError(f"{prefix}{name}: {value!r} is not usable; give {wanted}")

    if hasattr(config, "budget"):
        budget = config.budget
        require(0 < budget.ratio <= 1, "budget.ratio", "a fraction in (0, 1], e.g. 0.1")
        if budget.mode == "total_trainable":
            require(
                budget.total is not None and budget.total > 0,
                "budget.total",
                "the largest number of trainable parameters, e.g. 150000000",
            )
    if hasattr(config, "control") and config.criterion == "explicit":
        require(
            bool(config.control.modules),
            "control.modules",
            "the modules to tune fully, e.g. [model.layers.0.mlp.up_proj]",
        )
    if hasattr(config, "lora"):
        require(config.lora.rank > 0, "lora.rank", "a LoRA rank of at least 1, e.g. 16")
        require(config.lora.alpha > 0, "lora.alpha", "a LoRA alpha above 0, e.g. 32")
        require(0 <= config.lora.dropout < 1, "lora.dropout", "a dropout in [0, 1), e.g. 0.0")
    if hasattr(config, "probe"):
        _validate_probe(config.probe, require)
    if hasattr(config, "full_lr"):
        require(config.full_lr > 0, "full_lr", "a learning rate above 0, e.g. 1e-6")
    if hasattr(config, "sync_timeout"):
        require(config.sync_timeout > 0, "sync_timeout", "a number of seconds above 0, e.g. 600")
        limit = config.sync_logprob_limit
        require(limit is None or limit > 0, "sync_logprob_limit", "a difference above 0, e.g. 1e-4, or null")


def _validate_probe(probe: ProbeConfig, require: Any) -> None:
    require(probe.warmup_steps >= 0, "probe.warmup_steps", "0 or more steps")
    require(probe.partitions >= 2, "probe.partitions", "at least 2, or no spread can be measured")
    require(
        1 <= probe.partitions_per_batch <= probe.partitions // 2,
        "probe.partitions_per_batch",
        "1 to half of probe.partitions, so that there are two validation batches or more",
    )
    require(probe.batch_size >= 1, "probe.batch_size", "at least 1 row")
    require(
        probe.micro_batch_size is None or probe.micro_batch_size >= 1,
        "probe.micro_batch_size",
        "at least 1 row, or null",
    )
    require(probe.max_length >= 2, "probe.max_length", "at least 2 tokens")
    require(probe.lr > 0, "probe.lr", "a learning rate above 0, e.g. 2.5e-5")
    require(probe.full_lr > 0, "probe.full_lr", "a learning rate above 0, e.g. 1e-6")
    adalora, autolora = probe.adalora, probe.autolora
    require(adalora.lr > 0, "probe.adalora.lr", "a learning rate above 0, e.g. 5e-4")
    require(adalora.target_rank >= 1, "probe.adalora.target_rank", "at least 1, e.g. 16")
    require(
        adalora.initial_rank >= adalora.target_rank,
        "probe.adalora.initial_rank",
        "at least probe.adalora.target_rank, e.g. 24",
    )
    require(0 <= adalora.start < 1, "probe.adalora.start", "a fraction in [0, 1), e.g. 0.1")
    require(0 <= adalora.final < 1 - adalora.start, "probe.adalora.final", "a fraction below 1 - probe.adalora.start")
    require(adalora.interval >= 1, "probe.adalora.interval", "at least 1 step")
    require(0 <= adalora.beta < 1, "probe.adalora.beta", "a decay in [0, 1), e.g. 0.85")
    require(adalora.orthogonal >= 0, "probe.adalora.orthogonal", "0 or more, e.g. 0.1")
    require(autolora.alpha_lr > 0, "probe.autolora.alpha_lr", "a learning rate above 0, e.g. 1e-3")
