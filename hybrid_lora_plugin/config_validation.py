"""Values of a configuration that cannot work, refused before anything is loaded or written.

What one field can hold stands at that field, in ``config``. Here is how it is checked, and what fields ask of each
other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from hybrid_lora_plugin.config import AUTO, BUDGET_AMOUNTS, BudgetConfig, ProbeConfig
from hybrid_lora_plugin.errors import ConfigurationError

Require = Callable[[bool, str, str], None]


def validate(config: Any, prefix: str = "") -> None:
    """Refuse values that cannot work, before anything is loaded or written.

    Args:
        config: one of the dataclasses of ``config``; the parts it has are checked.
        prefix: put before each field name in messages, e.g. ``"hybrid_lora."``.

    Raises:
        ConfigurationError: naming the field, the value and the way out.
    """
    _check_fields(config, prefix)

    def require(ok: bool, name: str, wanted: str) -> None:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if not ok:
            raise ConfigurationError(f"{prefix}{name}: {value!r} is not usable; give {wanted}")

    if hasattr(config, "budget"):
        _check_budget(config.budget, require)
    if hasattr(config, "control") and config.criterion == "explicit":
        example = "the modules to tune fully, e.g. [model.layers.0.mlp.up_proj]"
        require(bool(config.control.modules), "control.modules", example)
    if hasattr(config, "probe"):
        _check_probe(config.probe, require)
    if hasattr(config, "zeroth_order") and config.zeroth_order.enabled:
        require(
            config.zeroth_order.lr is not None,
            "zeroth_order.lr",
            "a learning rate of the frozen weights, e.g. 1e-8; there is none that works for every model",
        )


def _check_fields(config: Any, prefix: str) -> None:
    """Every field by itself: its choices, its bound."""
    for spec in dataclasses.fields(config):
        value, name = getattr(config, spec.name), f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(value):
            _check_fields(value, name + ".")
            continue
        choices, bound = spec.metadata.get("choices"), spec.metadata.get("bound")
        if choices and value not in choices:
            raise ConfigurationError(f"{name}: {value!r} is not supported; choose one of {', '.join(choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            wanted = bound.wanted if bound else "a finite number"
            raise ConfigurationError(f"{name}: {value!r} is not usable; give {wanted}")
        if bound and value is not None and not bound.holds(value):
            raise ConfigurationError(f"{name}: {value!r} is not usable; give {bound.wanted}")


def _check_budget(budget: BudgetConfig, require: Require) -> None:
    amount = BUDGET_AMOUNTS[budget.mode]
    (wanted,) = (spec.metadata["bound"].wanted for spec in dataclasses.fields(budget) if spec.name == amount)
    require(budget.amount is not None, f"budget.{amount}", wanted)


def _check_probe(probe: ProbeConfig, require: Require) -> None:
    require(
        probe.partitions_per_batch <= probe.most_partitions // 2,
        "probe.partitions_per_batch",
        "1 to half of probe.partitions, so that there are two validation batches or more",
    )
    if probe.warmup_steps == AUTO:
        require(
            2 * probe.partitions_per_batch <= probe.warmup_check_partitions <= probe.most_partitions,
            "probe.warmup_check_partitions",
            "at least those of two validation batches (twice probe.partitions_per_batch), and no more than are scored",
        )
    adalora = probe.adalora
    require(
        adalora.initial_rank >= adalora.target_rank,
        "probe.adalora.initial_rank",
        "at least probe.adalora.target_rank, e.g. 24",
    )
    require(adalora.final < 1 - adalora.start, "probe.adalora.final", "a fraction below 1 - probe.adalora.start")
