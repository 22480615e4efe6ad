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
ACTOR = "actor_rollout_ref.actor"
#: policy losses that clip a ratio to the policy at the beginning of a step
CLIPPED = ("vanilla", "gspo", "hybrid_gspo")


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
    if _updates_once(config):
        batch = OmegaConf.select(config, "data.train_batch_size")
        lines.append(
            f"without effect, as a step is one update (data.train_batch_size={batch}, {ACTOR}.ppo_mini_batch_size="
            f"{batch}, {ACTOR}.ppo_epochs=1) and the ratio is 1: the clip range; a smaller mini-batch lets it act"
        )
    return lines


def _updates_once(config: DictConfig) -> bool:
    """Whether the policy of every update is the one whose log-probabilities its ratio is taken to."""
    actor = OmegaConf.select(config, ACTOR)
    return actor is not None and (
        OmegaConf.select(config, "data.train_batch_size") == actor.get("ppo_mini_batch_size")
        and actor.get("ppo_epochs") == 1
        and OmegaConf.select(actor, "policy_loss.loss_mode") in CLIPPED
        # Elsewhere the ratio is to the rollout engine's policy, or may be to an older one.
        and not OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode")
        and OmegaConf.select(config, "trainer.v1.trainer_mode") == "sync"
    )


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
