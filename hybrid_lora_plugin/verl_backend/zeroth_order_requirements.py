"""What zeroth order in a verl run needs, checked on the driver and again in every worker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from verl.utils.torch_dtypes import PrecisionType

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.sync.base_weights import stored_dtypes
from hybrid_lora_plugin.training.precision import frozen_dtype
from hybrid_lora_plugin.training.zeroth_order.choice import moving_weights
from hybrid_lora_plugin.training.zeroth_order.weights import LEAST_EPSILON
from hybrid_lora_plugin.verl_backend.requirement_rules import ZEROTH_ORDER_RULES
from hybrid_lora_plugin.verl_backend.run_kinds import (
    ACTOR,
    MODEL,
    REINFORCEMENT_LEARNING,
    ROLLOUT,
    RunKind,
)

PARAM_DTYPE = ACTOR + "fsdp_config.mixed_precision.param_dtype"
#: that ``check_zeroth_order`` looks at
ZEROTH_ORDER_SETTINGS = (*ZEROTH_ORDER_RULES, PARAM_DTYPE, MODEL + "path", MODEL + "lora.rollout_dtype")


def check_zeroth_order(
    settings: Mapping[str, Any], hybrid: HybridLoraConfig, kind: RunKind = REINFORCEMENT_LEARNING
) -> None:
    """Refuse a run in which frozen weights cannot move without a gradient.

    Args:
        settings: values by full verl name; those without a rule are ignored.
        hybrid: the ``hybrid_lora`` node.
        kind: of the run.

    Raises:
        ConfigurationError: naming the setting, its value and a usable one.
    """
    if not hybrid.zeroth_order.enabled:
        return
    if not kind.samples:
        raise ConfigurationError(
            "hybrid_lora.zeroth_order.enabled: True needs the rollouts whose surrogate it measures, and this run has "
            "none; leave it out",
            see="zeroth-order-not-possible",
        )
    for name, rule in ZEROTH_ORDER_RULES.items():
        if name in settings and not rule.usable(settings[name]):
            raise ConfigurationError(
                f"{name}: {settings[name]!r} does not work with hybrid_lora.zeroth_order.enabled=true; give "
                f"{rule.wanted}",
                see=rule.see,
            )
    # verl computes in bf16 unless told otherwise.
    epsilon, computes_in = hybrid.zeroth_order.epsilon, settings.get(PARAM_DTYPE) or "bf16"
    if PARAM_DTYPE in settings and computes_in not in ("fp32", "float32") and epsilon < LEAST_EPSILON:
        raise ConfigurationError(
            f"hybrid_lora.zeroth_order.epsilon: {epsilon!r} is lost in the rounding of "
            f"{PARAM_DTYPE}={computes_in}; give {LEAST_EPSILON:g} or more, e.g. 1e-3, or compute in fp32",
            see="zeroth-order-not-possible",
        )
    path = os.path.expanduser(str(settings.get(MODEL + "path")))
    if os.path.isdir(path):
        held = frozen_dtype(hybrid.frozen_dtype, stored_dtypes(path))
        check_moved_dtype(hybrid, held, PrecisionType.to_dtype(settings[MODEL + "lora.rollout_dtype"]))


def check_moved_dtype(hybrid: HybridLoraConfig, held: torch.dtype, rollout: torch.dtype) -> None:
    """Refuse to move frozen weights that rollouts hold in fewer bits: to nearest, most of a move would not arrive.

    Args:
        hybrid: the ``hybrid_lora`` node.
        held: type in which the trainer holds frozen weights.
        rollout: what the rollout engine computes in.

    Raises:
        ConfigurationError: naming what works.
    """
    if hybrid.zeroth_order.enabled and rollout.itemsize < held.itemsize:
        raise ConfigurationError(
            f"{ROLLOUT}dtype: {rollout} rounds frozen weights that the trainer holds in {held}, and small moves by "
            "hybrid_lora.zeroth_order would not arrive; give float32, or a checkpoint in bfloat16 with "
            "hybrid_lora.frozen_dtype=auto".replace("torch.", ""),
            see="zeroth-order-not-possible",
        )


def check_model_dropout(hybrid: HybridLoraConfig, model_config: Any) -> None:
    """Refuse a model with dropout of its own where slopes are measured, which they are without.

    Args:
        hybrid: the ``hybrid_lora`` node.
        model_config: the Hugging Face config.

    Raises:
        ConfigurationError: naming the field and what works.
    """
    if not hybrid.zeroth_order.enabled:
        return
    for name, value in vars(model_config).items():
        # That of a classifier's head is in no language model.
        if name.endswith(("dropout", "pdrop")) and not name.startswith("classifier") and value:
            raise ConfigurationError(
                f"{MODEL}override_config.{name}: {value!r} of the model's config does not work with "
                "hybrid_lora.zeroth_order.enabled=true; give 0.0 there",
                see="zeroth-order-not-possible",
            )


def check_moving_modules(
    hybrid: HybridLoraConfig, model_config: Any, model: torch.nn.Module, candidates: list[Candidate]
) -> None:
    """Refuse a model in which nothing could move, or whose slopes could not be measured; the workers look again.

    Args:
        hybrid: the ``hybrid_lora`` node.
        model_config: the Hugging Face config.
        model: of it, on the meta device.
        candidates: of the model.

    Raises:
        ConfigurationError: naming the option or the field of the config, and what works.
    """
    if hybrid.zeroth_order.enabled:
        check_model_dropout(hybrid, model_config)
        names = [candidate.name for candidate in candidates]
        moving_weights(model, hybrid.zeroth_order.modules, names, (), "hybrid_lora.zeroth_order.modules")


def said_of_order(config: DictConfig, hybrid: HybridLoraConfig) -> list[str]:
    """A line where rows come in the same order in every epoch, which the algorithm does not have (arXiv 2604.09940)."""
    if not hybrid.zeroth_order.enabled or OmegaConf.select(config, "data.shuffle", default=True):
        return []
    return [
        "WARNING: data.shuffle: False takes the rows in the same order in every epoch, and the algorithm behind "
        "hybrid_lora.zeroth_order shuffles them anew; give data.shuffle=true [docs/zeroth-order.md]"
    ]
