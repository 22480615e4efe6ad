"""The probe with objective ``policy``: the same verl command, started once more before the run itself.

The probe is a reinforcement learning run of its own (``policy_probe_engine.py``) in a process of its own. When it has
written the artifact it ends, and with it everything it trained: actor, optimizer and rollout engine of the run that
follows are made from the original checkpoint, as Algorithm 2 asks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.allocation.artifact import ALLOCATION_FILE
from hybrid_lora_plugin.config import ConfigurationError, HybridLoraConfig
from hybrid_lora_plugin.scoring import get_criterion

MEASURED = frozenset({"sensitivities", "alpha", "delta_norm"})
_DATASET = "pkg://hybrid_lora_plugin.verl_backend.held_out_prompts"


def check_policy_probe(config: DictConfig, hybrid: HybridLoraConfig) -> None:
    """Refuse what a policy probe cannot do, before it starts.

    Raises:
        ConfigurationError: naming the setting and the way out.
    """
    criterion = get_criterion(hybrid.criterion)
    missing = [name for name in criterion.needs if name not in MEASURED]
    if criterion.run != "svd_lora" or missing:
        raise ConfigurationError(
            f"hybrid_lora.criterion: {hybrid.criterion!r} is not measured by objective policy; give "
            f"hybrid_lora.probe.objective=sft, or a criterion of the masked probe, e.g. hybrid"
        )
    if hybrid.probe.warmup_steps < 1:
        raise ConfigurationError(
            f"hybrid_lora.probe.warmup_steps: {hybrid.probe.warmup_steps} steps leave every adapter at 0; give at least 1"
        )
    if OmegaConf.select(config, "algorithm.filter_groups.enable", default=False):
        raise ConfigurationError(
            "algorithm.filter_groups.enable: True draws an unknown number of prompts a step, so none can be held out; "
            "give false while probing with objective policy, or hybrid_lora.probe.objective=sft"
        )
    mode = OmegaConf.select(config, "trainer.v1.trainer_mode", default="sync")
    if mode != "sync" or not OmegaConf.select(config, "trainer.use_v1", default=True):
        raise ConfigurationError(
            f"trainer.v1.trainer_mode: {mode!r} is not supported by objective policy, whose steps must use the prompts of "
            f"that step; give sync with trainer.use_v1=true, or hybrid_lora.probe.objective=sft"
        )


def probe_overrides(config: DictConfig, hybrid: HybridLoraConfig) -> list[str]:
    """What the probe's command line has behind that of the run; ``hybrid.output_dir`` is absolute."""
    probe, partial = hybrid.probe, Path(f"{hybrid.output_dir}.partial")
    scoring = -(-probe.partitions // probe.partitions_per_batch)
    custom = OmegaConf.select(config, "data.custom_cls.path", default=None)
    name = OmegaConf.select(config, "data.custom_cls.name", default=None)
    warmup = probe.warmup_steps
    overrides = {
        "hybrid_lora.phase": "probe",
        "hybrid_lora.output_dir": hybrid.output_dir,
        "trainer.total_training_steps": warmup + scoring,
        # An epoch of the reordered prompts is the whole probe.
        "trainer.total_epochs": 1,
        "trainer.default_local_dir": partial / "checkpoints",
        "trainer.experiment_name": f"{OmegaConf.select(config, 'trainer.experiment_name')}-probe",
        "trainer.val_before_train": "false",
        "trainer.test_freq": -1,
        "data.shuffle": "false",
        "data.train_max_samples": -1,
        "data.custom_cls.path": _DATASET,
        "data.custom_cls.name": "HeldOutPrompts",
        "++data.hybrid_lora.warmup_steps": warmup,
        "++data.hybrid_lora.scoring_steps": scoring,
        "++data.hybrid_lora.seed": probe.seed,
        "++data.hybrid_lora.custom_cls_path": custom or "null",
        "++data.hybrid_lora.custom_cls_name": name or "null",
        "hydra.run.dir": partial / "hydra",
    }
    if config.trainer.resume_mode == "resume_path":
        overrides |= {"trainer.resume_mode": "auto", "trainer.resume_from_path": "null"}
    return [f"{key}={value}" for key, value in overrides.items()]


def run_policy_probe(config: DictConfig, hybrid: HybridLoraConfig) -> None:
    """Run the probe and wait for it; afterwards ``hybrid.output_dir`` holds the artifact.

    Raises:
        ConfigurationError: the probe failed or was stopped.
    """
    command = [sys.executable, *sys.orig_argv[1:], *probe_overrides(config, hybrid)]
    environment = dict(os.environ)
    if metrics := environment.get("VERL_FILE_LOGGER_PATH"):
        # The file logger would mix the probe's steps into those of the run.
        environment["VERL_FILE_LOGGER_PATH"] = str(Path(metrics).with_suffix(f".probe{Path(metrics).suffix}"))
    print(
        f"hybrid_lora: no allocation given, probing first with the policy objective: {hybrid.probe.warmup_steps} warm-up "
        f"steps, then {hybrid.probe.partitions} partitions; the artifact will be in {hybrid.output_dir}",
        flush=True,
    )
    status = subprocess.run(command, env=environment).returncode
    if status != 0 or not (Path(hybrid.output_dir) / ALLOCATION_FILE).is_file():
        raise ConfigurationError(
            f"hybrid_lora.probe.objective: the policy probe ended with exit status {status} and no allocation; its "
            f"messages are above, and the same command continues from its last checkpoint, if trainer.save_freq made one"
        )
    shutil.rmtree(f"{hybrid.output_dir}.partial", ignore_errors=True)
