"""The kinds of verl run that train under an allocation, and where each has its settings.

Everything else names a setting as a reinforcement learning run does; another kind has the same setting in another
place, or does not have it. So a rule is written once, and a message names what the user of that run can type.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.errors import ConfigurationError

ACTOR, MODEL, ROLLOUT = "actor_rollout_ref.actor.", "actor_rollout_ref.model.", "actor_rollout_ref.rollout."
#: in the node of a model that its workers get: the kind of run they are part of
KIND = MODEL + "lora.run"


@dataclass(frozen=True)
class RunKind:
    """A kind of run."""

    #: as the model's node has it
    name: str
    #: verl's primary configuration of it, which holds verl's defaults
    primary: str
    #: the command that starts it
    command: str
    #: whether it samples from the model, so that weights are synced
    samples: bool
    #: the actor's folder within a checkpoint of the run
    actor_folder: str
    #: beginnings of names, and what stands there instead; None: no such settings. The first that fits counts.
    places: tuple[tuple[str, str | None], ...] = ()

    def place(self, name: str) -> str | None:
        """Where this kind of run has the setting ``name``; None if nowhere."""
        for beginning, instead in self.places:
            if name.startswith(beginning):
                return None if instead is None else instead + name.removeprefix(beginning)
        return name

    def text(self, message: str) -> str:
        """``message`` with the names that this kind of run has."""
        for beginning, instead in self.places:
            if instead is not None:
                message = message.replace(beginning, instead)
        return message

    def ranks(self, config: DictConfig) -> int:
        """How many ranks train ``config``, a run of this kind."""
        if not self.samples and "WORLD_SIZE" in os.environ:
            # torchrun's: its trainer reads neither of the two below.
            return int(os.environ["WORLD_SIZE"])
        nodes, devices = (OmegaConf.select(config, f"trainer.{name}") for name in ("nnodes", "n_gpus_per_node"))
        return int(nodes or 1) * int(devices or 1)

    def select(self, config: DictConfig, name: str, default: Any = None) -> Any:
        """The value of a setting in ``config``, a run of this kind."""
        place = self.place(name)
        return default if place is None else OmegaConf.select(config, place, default=default)


REINFORCEMENT_LEARNING = RunKind(
    name="reinforcement_learning",
    primary="ppo_trainer",
    command="python -m verl.trainer.main_ppo",
    samples=True,
    actor_folder="actor",
)
#: verl 0.9.1 ``trainer/config/sft_trainer_engine.yaml``
SFT = RunKind(
    name="sft",
    primary="sft_trainer_engine",
    command="torchrun -m verl.trainer.sft_trainer",
    samples=False,
    actor_folder="",
    places=(
        (ACTOR + "fsdp_config.", "engine."),
        (ACTOR + "strategy", "engine.strategy"),
        (ACTOR + "_target_", "engine._target_"),
        (ACTOR + "optim.", "optim."),
        (ACTOR + "checkpoint.", "checkpoint."),
        (MODEL, "model."),
        # What exported weights have; no rollout engine has any.
        (ROLLOUT + "dtype", "model.lora.rollout_dtype"),
        ("actor_rollout_ref.", None),
        ("model_engine", None),
        # Its trainer copies each checkpoint there itself.
        ("trainer.default_hdfs_dir", None),
    ),
)
KINDS = {kind.name: kind for kind in (REINFORCEMENT_LEARNING, SFT)}


def kind_of_run(config: DictConfig) -> RunKind:
    """What a composed configuration is one of.

    Raises:
        ConfigurationError: none in which the plugin trains.
    """
    if "algorithm" in config and "rollout" in config.get("actor_rollout_ref", {}):
        return REINFORCEMENT_LEARNING
    job = OmegaConf.select(config, "hydra.job.name", default=None)
    if job == "sft_trainer_ray":
        # Read in verl 0.9.1: its workers get the model as the driver has read it, and import no external_lib.
        raise ConfigurationError(
            "+hybrid_lora=enabled: verl.trainer.sft_trainer_ray starts workers that never load the plugin and would "
            "train plain LoRA; start the same arguments with torchrun -m verl.trainer.sft_trainer",
            see="not-a-run-that-trains-here",
        )
    if all(node in config for node in ("model", "engine", "optim", "checkpoint")):
        return SFT
    commands = " or ".join(kind.command for kind in KINDS.values())
    raise ConfigurationError(
        f"+hybrid_lora=enabled: this is the configuration of no run that the plugin trains in; use it with {commands}",
        see="not-a-run-that-trains-here",
    )


def kind_of_model(model_config: Any) -> RunKind:
    """The kind of run that a worker with verl's ``HFModelConfig`` belongs to."""
    return KINDS[model_config.lora.get("run") or REINFORCEMENT_LEARNING.name]


def tell(line: str) -> None:
    """A line for the user before a run starts; of several ranks that torchrun starts, the first says it."""
    if int(os.environ.get("RANK") or 0) == 0:
        print(f"hybrid_lora: {line}", flush=True)
