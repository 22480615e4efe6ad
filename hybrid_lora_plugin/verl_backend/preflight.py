"""Check a composed configuration on the driver, before Ray starts and before anything is written.

``+hybrid_lora=enabled`` adds this as a Hydra callback; Hydra calls it with the final configuration of the run.
Hydra only warns when a callback raises, so a refusal leaves as SystemExit: one line, exit status 1.
"""

from __future__ import annotations

import os
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.config import ConfigurationError


def check_configuration(config: DictConfig) -> None:
    """Everything that can be known to fail before a worker exists.

    The path of the allocation is made absolute in ``config``: workers may start in another folder.

    Raises:
        ConfigurationError: an option, the allocation, or a verl setting cannot be used.
        ImportError: this plugin was not written for the installed verl.
    """
    from hybrid_lora_plugin.verl_backend import registration, requirements

    registration.register()
    if "algorithm" not in config or "rollout" not in config.get("actor_rollout_ref", {}):
        raise ConfigurationError(
            "+hybrid_lora=enabled: this is not the configuration of a reinforcement learning run; use it with "
            "verl.trainer.main_ppo"
        )
    hybrid = requirements.hybrid_config(OmegaConf.to_container(config.hybrid_lora, resolve=True))
    requirements.check_run(config)

    from hybrid_lora_plugin.allocation.artifact import load_allocation

    allocation = load_allocation(hybrid.allocation)
    OmegaConf.update(config, "hybrid_lora.allocation", os.path.abspath(hybrid.allocation))
    path = OmegaConf.select(config, "actor_rollout_ref.model.path")
    if os.path.isdir(os.path.expanduser(str(path))):
        # A model on a hub or on HDFS is only fetched by the workers, which check it themselves.
        from transformers import AutoConfig

        from hybrid_lora_plugin.candidates import find_candidates_from_config

        trust = bool(OmegaConf.select(config, "actor_rollout_ref.model.trust_remote_code", default=False))
        model_config = AutoConfig.from_pretrained(os.path.expanduser(str(path)), trust_remote_code=trust)
        allocation.check_model(model_config, find_candidates_from_config(model_config))


def _check_or_exit(config: DictConfig) -> None:
    try:
        check_configuration(config)
    except (ConfigurationError, ImportError) as error:
        raise SystemExit(f"hybrid_lora: {str(error).removeprefix('hybrid_lora: ')}") from error
    except Exception as error:  # Hydra would turn it into a warning and start the run unchecked
        raise SystemExit(f"hybrid_lora: the configuration could not be checked: {error!r}") from error


class Preflight(Callback):
    """Hydra callback that stops a run which cannot work."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Before Hydra makes the run's output folder.
        _check_or_exit(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Each job of a sweep has a configuration of its own; a single run was checked above.
        if config.hydra.mode == RunMode.MULTIRUN:
            _check_or_exit(config)
