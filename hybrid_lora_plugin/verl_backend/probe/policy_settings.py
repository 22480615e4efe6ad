"""What a policy probe depends on, as flat JSON: nearly all of the run's configuration, and the prompts themselves.

Kept in ``<output_dir>.partial/settings.json`` while the probe runs, so that another start cannot continue it under
other settings, and then in the artifact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.probing.data.rows import file_digests
from hybrid_lora_plugin.probing.loading import checkpoint_fingerprint

# Nodes that decide what is sampled, rewarded and optimised. Machine, logging and paths of outputs are left out.
_NODES = (
    "algorithm",
    "reward",
    "data",
    "actor_rollout_ref.actor.policy_loss",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.top_p",
    "actor_rollout_ref.rollout.top_k",
    "actor_rollout_ref.model.path",
)
_ACTOR = "actor_rollout_ref.actor"
_ACTOR_SETTINGS = (
    "ppo_mini_batch_size",
    "ppo_epochs",
    "clip_ratio",
    "clip_ratio_low",
    "clip_ratio_high",
    "loss_agg_mode",
    "use_kl_loss",
    "kl_loss_coef",
    "kl_loss_type",
    "entropy_coeff",
    "grad_clip",
)
# The first are of a probe on rows.
_PROBE_WITHOUT_EFFECT = ("files", "messages_key", "prompt_key", "response_key", "train_on", "date", "dry_run")
_PROBE_WITHOUT_EFFECT += ("micro_batch_size", "micro_batch_tokens", "gradient_checkpointing", "controls")
_DATA_WITHOUT_EFFECT = ("val_", "validation_", "dataloader_", "hybrid_lora")


def policy_settings(config: DictConfig, hybrid: HybridLoraConfig) -> dict[str, Any]:
    """Settings by their full names; equal settings give equal probes, up to sampling.

    Args:
        config: the composed configuration of the run (not of its probe).
        hybrid: its checked ``hybrid_lora`` node.
    """
    probe = OmegaConf.to_container(OmegaConf.structured(hybrid.probe))
    settings = {
        f"hybrid_lora.probe.{name}": value for name, value in _leaves(probe) if name not in _PROBE_WITHOUT_EFFECT
    }
    settings["hybrid_lora.lora.rank"] = hybrid.lora.rank
    for node in (*_NODES, *(f"{_ACTOR}.{name}" for name in _ACTOR_SETTINGS)):
        value = OmegaConf.select(config, node, default=None, throw_on_missing=False)
        if OmegaConf.is_config(value):
            plain = OmegaConf.to_container(value, resolve=True)
            settings |= {f"{node}.{name}": leaf for name, leaf in _leaves(plain)}
        else:
            settings[node] = value
    settings = {
        name: value
        for name, value in settings.items()
        if not name.removeprefix("data.").startswith(_DATA_WITHOUT_EFFECT) or not name.startswith("data.")
    }
    settings["checkpoint"] = checkpoint_fingerprint(str(OmegaConf.select(config, "actor_rollout_ref.model.path")))
    files = OmegaConf.select(config, "data.train_files")
    files = list(files) if OmegaConf.is_list(files) else [files]
    local = [str(file) for file in files if file is not None and Path(str(file)).expanduser().is_file()]
    settings["data.train_files.sha256"] = [digest["sha256"] for digest in file_digests(local)]
    # Through JSON, so that it equals what is read back.
    return json.loads(json.dumps(settings, default=str))


def kept_settings(output_dir: str) -> dict[str, Any]:
    """The settings that the driver wrote before it started this probe."""
    return json.loads((Path(f"{output_dir}.partial") / "settings.json").read_text(encoding="utf-8"))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner
