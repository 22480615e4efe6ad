"""Settings of a command that mean nothing in a hybrid run and do no harm there: they are told, not refused.

verl reads them only where the reference policy is a worker of its own; a model with LoRA is its own reference, in verl
as here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.verl_backend.given_settings import verls_configuration

REFERENCE = "actor_rollout_ref.ref"
LAYERED_SUMMON = "actor_rollout_ref.rollout.layered_summon"


def unused_settings(config: DictConfig) -> list[str]:
    """Lines on what ``config`` sets without effect, of a run of reinforcement learning."""
    lines = []
    if OmegaConf.select(config, "algorithm.use_kl_in_reward") or OmegaConf.select(
        config, "actor_rollout_ref.actor.use_kl_loss"
    ):
        verls = dict(_leaves(OmegaConf.select(verls_configuration("ppo_trainer"), REFERENCE)))
        changed = [f"{REFERENCE}.{name}" for name, value in _own(config) if value != verls.get(name)]
        if changed:
            lines.append(
                f"without effect, as the actor itself computes the reference policy: {', '.join(sorted(changed))}"
            )
    if OmegaConf.select(config, LAYERED_SUMMON):
        lines.append(f"without effect, as weights are gathered one at a time in any case: {LAYERED_SUMMON}")
    return lines


def _own(config: DictConfig) -> Iterator[tuple[str, Any]]:
    node = OmegaConf.select(config, REFERENCE)
    return _leaves(node) if node is not None else iter(())


def _leaves(node: DictConfig) -> Iterator[tuple[str, Any]]:
    """Dotted names and values as they are written, interpolations included."""

    def walk(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in content.items():
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return walk(OmegaConf.to_container(node), "")
