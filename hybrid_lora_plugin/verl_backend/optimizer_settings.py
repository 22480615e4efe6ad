"""Optimizers whose settings reach both parameter groups (verl 0.9.1 ``workers/config/optimizer.py``).

verl gives betas, weight decay and what ``override_optimizer_config`` holds to the optimizer as defaults, which every
group takes that does not say otherwise; the two groups differ in their learning rate alone, and verl's schedulers scale
each by the same factor.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from hybrid_lora_plugin.errors import ConfigurationError

#: of ``torch.optim``, each tried with two groups of other rates
OPTIMIZERS = ("Adam", "AdamW", "Adamax", "Adagrad", "NAdam", "RAdam", "RMSprop", "SGD")


def check_optimizer(prefix: str, implementation: str, optimizer: str, more: Mapping[str, Any] | None) -> None:
    """Refuse an optimizer, or a setting of it, that would not act on both groups.

    Args:
        prefix: put before names in messages, e.g. ``actor_rollout_ref.actor.optim.``.
        implementation, optimizer, more: ``optimizer_impl``, ``optimizer`` and ``override_optimizer_config``.

    Raises:
        ConfigurationError: naming the setting and what works.
    """
    if implementation != "torch.optim":
        raise ConfigurationError(
            f"{prefix}optimizer_impl: {implementation!r} does not work with hybrid_lora, which was tried with "
            f"torch.optim alone; give {prefix}optimizer_impl=torch.optim",
            see="optimizer-not-supported",
        )
    if optimizer not in OPTIMIZERS:
        raise ConfigurationError(
            f"{prefix}optimizer: {optimizer!r} does not work with hybrid_lora; give one of {', '.join(OPTIMIZERS)}, "
            "which train full modules and LoRA at rates of their own",
            see="optimizer-not-supported",
        )
    known = set(inspect.signature(getattr(torch.optim, optimizer)).parameters) - {"params", "lr"}
    for name, value in (more or {}).items():
        if name == "lr":
            raise ConfigurationError(
                f"{prefix}override_optimizer_config.lr: {value!r} would have no effect; give hybrid_lora.full_lr and "
                "hybrid_lora.lora.lr",
                see="optimizer-not-supported",
            )
        if name not in known:
            raise ConfigurationError(
                f"{prefix}override_optimizer_config.{name}: {value!r} is no setting of torch.optim.{optimizer}; give "
                f"one of {', '.join(sorted(known))}",
                see="optimizer-not-supported",
            )
