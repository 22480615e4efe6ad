"""A verl command as the plan needs it: composed as verl composes it, looked at, and never started.

Everything verl-specific of ``hybrid-lora-plan`` is here: which program a command starts, where Hydra looks for its
files, and under which names verl 0.9.1 has what decides bytes and operations.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hybrid_lora_plugin.errors import ConfigurationError, UsageError, explained, reason_of
from hybrid_lora_plugin.plan.run import CHUNKED, COMPILED, EAGER, FULL, HYBRID, LORA, Pass, RolloutRun, Run
from hybrid_lora_plugin.sync.base_weights import stored_dtypes
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.training.precision import frozen_dtype
from hybrid_lora_plugin.verl_backend.run_kinds import (
    ACTOR,
    MODEL,
    REINFORCEMENT_LEARNING,
    ROLLOUT,
    SFT,
    RunKind,
    kind_of_run,
)

#: verl's programs that are planned, and the primary configuration of each
PROGRAMS = {
    "verl.trainer.main_ppo": REINFORCEMENT_LEARNING.primary,
    "verl.trainer.sft_trainer": SFT.primary,
}
_CONFIGURATION = "verl.trainer.config"
_DTYPES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
REFERENCE = "actor_rollout_ref.ref."


@dataclass(frozen=True)
class Command:
    """A command of verl's.

    Attributes:
        program: module that it runs.
        overrides: Hydra's.
        primary: name of the primary configuration.
        folders: where Hydra looks besides (``--config-dir``).
        primary_folder: where the primary configuration is, if it is not verl's (``--config-path``).
        processes: that torchrun starts in all; None without torchrun.
    """

    program: str
    overrides: list[str]
    primary: str
    folders: list[str] = field(default_factory=list)
    primary_folder: str | None = None
    processes: tuple[int, int] | None = None

    def with_overrides(self, overrides: Sequence[str]) -> Command:
        """The command with more arguments at its end."""
        return replace(self, overrides=[*self.overrides, *overrides])


def parse_command(words: Sequence[str]) -> Command:
    """A pasted command, split by the shell.

    Args:
        words: e.g. ``python3 -m verl.trainer.main_ppo data.train_batch_size=256 …``; assignments of the environment in
            front of it and ``torchrun`` with its options are understood.

    Raises:
        UsageError: it starts no program that can be planned, or an argument cannot be read.
    """
    words = [word for word in words if word.strip()]
    programs = " or ".join(PROGRAMS)
    if "-m" not in words or words.index("-m") + 1 >= len(words):
        raise UsageError(f"no program in the command; paste it as python -m {programs} … behind --")
    at = words.index("-m")
    # torchrun has a -m of its own, and so has python -m torch.distributed.run -m PROGRAM.
    launcher, module = words[:at], words[at + 1]
    rest = list(words[at + 2 :])
    if module in ("torch.distributed.run", "torch.distributed.launch") and "-m" in rest:
        launcher += rest[: rest.index("-m")]
        module, rest = rest[rest.index("-m") + 1], rest[rest.index("-m") + 2 :]
    if module not in PROGRAMS:
        raise UsageError(f"{module}: cannot be planned; give a command of {programs}")
    command = Command(module, [], PROGRAMS[module], processes=_processes(launcher))
    folders, overrides, primary, place = [], [], command.primary, None
    words = iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"):
            value = value if equals else next(words, "")
            if not value:
                raise UsageError(f"{name}: no value; write {name} VALUE")
            if name in ("--config-dir", "-cd"):
                folders.append(os.path.abspath(os.path.expanduser(value)))
            elif name in ("--config-name", "-cn"):
                primary = value.removesuffix(".yaml")
            else:
                place = os.path.abspath(os.path.expanduser(value))
        elif word.startswith("-"):
            raise UsageError(f"{word}: this option of a command cannot be planned; leave it out")
        else:
            overrides.append(word)
    return replace(command, folders=folders, overrides=overrides, primary=primary, primary_folder=place)


def recipe_command(recipe: str, folder: str, overrides: Sequence[str]) -> Command:
    """The command that starts a recipe, as recipes/README.md has it.

    Raises:
        ConfigurationError: there is no such folder.
    """
    if not os.path.isdir(os.path.join(folder, "recipe")):
        raise ConfigurationError(f"recipes: {folder!r} has no folder recipe; give the folder that holds the recipes")
    chosen = [f"+recipe={recipe}"] if not any(word.lstrip("+").startswith("recipe=") for word in overrides) else []
    hybrid = (
        []
        if any(word.lstrip("+~").startswith("hybrid_lora") and "enabled" in word for word in overrides)
        else ["+hybrid_lora=enabled"]
    )
    return Command(
        "verl.trainer.main_ppo",
        [*hybrid, *chosen, *overrides],
        REINFORCEMENT_LEARNING.primary,
        [os.path.abspath(os.path.expanduser(folder))],
    )


def _processes(launcher: Sequence[str]) -> tuple[int, int] | None:
    """Nodes and processes on each that torchrun starts; None without it."""
    if not any("torchrun" in word or "torch.distributed" in word for word in launcher):
        return None
    text = " ".join(launcher)

    def number(name: str) -> int:
        found = re.search(rf"--{name}[= ](\d+)", text)
        return int(found[1]) if found else 1

    return number("nnodes"), number("nproc[-_]per[-_]node")


def compose(command: Command) -> DictConfig:
    """verl's configuration of a command, settled as when it is started; Ray is not, and nothing is written.

    Raises:
        ConfigurationError: Hydra cannot compose it, or the plugin refuses it.
    """
    try:
        import verl  # noqa: F401  loads the plugin as in any verl process
    except ImportError as error:
        raise ConfigurationError(
            f"verl is not installed here ({error}), and its configuration says what a run does; install the extra cpu "
            "or gpu, see the README"
        ) from error
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for folder in (*command.folders, *([command.primary_folder] if command.primary_folder else [])):
        if not os.path.isdir(folder):
            raise ConfigurationError(f"{folder}: there is no such folder for Hydra to look in")
    GlobalHydra.instance().clear()
    where = (
        initialize_config_dir(command.primary_folder, version_base=None)
        if command.primary_folder
        else initialize_config_module(_CONFIGURATION, version_base=None)
    )
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in command.folders)}]"]
    try:
        with where:
            config = hydra_compose(
                command.primary,
                overrides=[*(search if command.folders else []), *command.overrides],
                return_hydra_config=True,
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(f"the command cannot be composed: {reason_of(error)}") from error
    if "hybrid_lora" in config:
        _settle(config)
    return config


def _settle(config: DictConfig) -> None:
    """What the preflight of a run does to a configuration, without what it asks of data and of checkpoints."""
    from hybrid_lora_plugin.verl_backend import registration, requirements, run_settings

    registration.register()
    run_settings.settle(config)
    requirements.check_run(config)


def planned_run(config: DictConfig, command: Command, model: str | None = None) -> tuple[Run, Any, str]:
    """What of a composed configuration the plan needs.

    Args:
        config: from ``compose``.
        command: that it was composed for.
        model: folder or name with another config.json, in place of the run's own.

    Returns:
        The run, the Hugging Face config of its model, and the model's name.

    Raises:
        ConfigurationError: the model's config cannot be read, or a setting that the plan needs has no value.
    """
    kind = SFT if command.program.endswith("sft_trainer") else REINFORCEMENT_LEARNING
    if "hybrid_lora" in config:
        kind = kind_of_run(config)
    read = _Reader(config, kind)
    path = os.path.expanduser(str(model or read(MODEL + "path")))
    return read.run(command, path), read.model_config(path, kind.place(MODEL + "path")), path


class _Reader:
    """Settings of one composed run by the names that a reinforcement learning run has for them."""

    def __init__(self, config: DictConfig, kind: RunKind):
        self.config, self.kind = config, kind
        self.notes: list[str] = []

    def __call__(self, name: str, default: Any = None) -> Any:
        value = self.kind.select(self.config, name)
        return default if value is None else value

    def own(self, name: str, default: Any = None) -> Any:
        """A setting that no other kind of run has a place for."""
        value = OmegaConf.select(self.config, name)
        return default if value is None else value

    def model_config(self, path: str, name: str) -> Any:
        """The Hugging Face config of the run's model."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(path, trust_remote_code=bool(self(MODEL + "trust_remote_code", False)))
        except Exception as error:
            raise ConfigurationError(
                f"{name}: no config.json of {path!r} ({reason_of(error)}); give model=FOLDER with one, no weights are "
                "needed"
            ) from error

    def run(self, command: Command, path: str) -> Run:
        """All of it."""
        hybrid = self._hybrid()
        rank = int(self(MODEL + "lora_rank", 0))
        training = HYBRID if hybrid is not None else LORA if rank > 0 else FULL
        samples = self.kind.samples
        nodes, devices = command.processes or (
            int(self.own("trainer.nnodes", 1)),
            int(self.own("trainer.n_gpus_per_node", 1)),
        )
        stored = self._stored(path)
        strategy = str(self(ACTOR + "strategy", "fsdp"))
        if strategy not in ("fsdp", "fsdp2"):
            raise ConfigurationError(
                f"{self.kind.place(ACTOR + 'strategy')}: {strategy!r} cannot be planned; give fsdp2 or fsdp"
            )
        held = _dtype(self(ACTOR + "fsdp_config.model_dtype", "fp32"))
        if hybrid is not None:
            names = {name for name, value in _STORED.items() if value == stored}
            held = str(frozen_dtype(hybrid.frozen_dtype, names)).removeprefix("torch.")
        precision = ACTOR + "fsdp_config.mixed_precision"
        size = int(self(ACTOR + "fsdp_config.fsdp_size", -1))
        world = nodes * devices
        kernel = str(self(MODEL + "override_config.attn_implementation", "flash_attention_2"))
        if kernel == "eager":
            self.notes.append("attention is planned as fused kernels hold it; eager attention takes far more")
        if int(self(MODEL + "use_liger", 0)):
            self.notes.append("use_liger is planned as if it were off")
        optimizer = str(self(ACTOR + "optim.optimizer", "AdamW"))
        if "adam" not in optimizer.lower() or "8bit" in optimizer.lower():
            self.notes.append(f"the optimizer is planned as Adam with two moments, not as {optimizer}")
        if hybrid is not None and hybrid.zeroth_order.enabled:
            self.notes.append(
                "zeroth order is not planned: for each weight that moves 6 to 8 bytes, shared out over the ranks, and "
                f"{2 * hybrid.zeroth_order.directions} forward passes over each mini-batch"
            )
        self._note_other_models()
        return Run(
            training=training,
            nodes=nodes,
            gpus_per_node=devices,
            shard_ranks=size if 0 < size < world else world,
            strategy=strategy,
            stored_dtype=stored,
            held_dtype=held,
            compute_dtype=_dtype(self(precision + ".param_dtype", "bf16")),
            reduce_dtype=_dtype(self(precision + ".reduce_dtype", "fp32")),
            param_offload=bool(self(ACTOR + "fsdp_config.param_offload", False)),
            optimizer_offload=bool(self(ACTOR + "fsdp_config.optimizer_offload", False)),
            offload_policy=bool(self(ACTOR + "fsdp_config.offload_policy", False)),
            keeps_gathered=not self(ACTOR + "fsdp_config.reshard_after_forward", True),
            whole_gradients=bool(self(ACTOR + "fsdp_config.use_no_sync_for_gradient_accumulation", False)),
            checkpointing=bool(self(MODEL + "enable_gradient_checkpointing", True)),
            activation_offload=bool(self(MODEL + "enable_activation_offload", False)),
            # verl takes flash-attn's cross entropy wherever flash-attn is, and then it is used for attention too.
            fused_cross_entropy=kernel.startswith("flash"),
            fused_head=bool(self(MODEL + "use_fused_kernels", False)),
            keeps_padding=not self(MODEL + "use_remove_padding", True),
            entropy_checkpointing=bool(self(ACTOR + "entropy_checkpointing", False)),
            entropy_chunk=int(self(ACTOR + "entropy_from_logits_chunk_size", 2048)),
            lora_rank=rank,
            lora_alpha=float(self(MODEL + "lora_alpha", 16)),
            lora_targets=_targets(self(MODEL + "target_modules", "all-linear")),
            hybrid=hybrid,
            **(self._sampling(training, hybrid, world) if samples else self._sft(world)),
            notes=tuple(self.notes),
        )

    def _hybrid(self):
        if "hybrid_lora" not in self.config:
            return None
        from hybrid_lora_plugin.verl_backend.requirements import hybrid_config

        return hybrid_config(OmegaConf.to_container(self.config.hybrid_lora, resolve=True))

    def _stored(self, path: str) -> str:
        """The type of the checkpoint: of its files, or what its config says."""
        if os.path.isdir(path):
            found = {_STORED[name] for name in stored_dtypes(path) if name in _STORED}
            if found:
                return found.pop() if len(found) == 1 else "float32"
        dtype = getattr(self.model_config(path, self.kind.place(MODEL + "path")), "dtype", None)
        return str(dtype).removeprefix("torch.") if dtype is not None else "bfloat16"

    def _note_other_models(self) -> None:
        if self.own("algorithm.adv_estimator") == "gae" and self.own("critic.enable") is not False:
            self.notes.append("algorithm.adv_estimator=gae trains a critic, a second model, which is not planned")
        if self.own("reward.reward_model.enable") or self.own("reward_model.enable"):
            self.notes.append("the reward model is not planned")
        if int(self.own(ROLLOUT + "nnodes", 0) or 0) > 0:
            self.notes.append("rollout engines apart from the trainer are planned as if they shared its GPUs")
        if self.own("actor_rollout_ref.model.mtp.enable"):
            self.notes.append("heads that predict several tokens are not planned")

    def _tokens(self, dynamic: bool, limit: Any, rows: Any, longest: int, name: str) -> int:
        """Most tokens of a micro-batch on one GPU."""
        parallel = int(self(ACTOR + "ulysses_sequence_parallel_size", 1))
        if dynamic:
            return int(limit)
        if rows is None:
            raise ConfigurationError(
                f"{name}: None, so nobody knows how large a micro-batch is; give it, or use_dynamic_bsz=true"
            )
        return -(-int(rows) * longest // parallel)

    def _sampling(self, training: str, hybrid: Any, world: int) -> dict[str, Any]:
        """What a run with rollouts has besides."""
        read, own = self, self.own
        prompt, response = int(own("data.max_prompt_length", 512)), int(own("data.max_response_length", 512))
        longest = prompt + response
        compiled = bool(read(ACTOR + "fsdp_config.use_torch_compile", True))
        chunked = bool(read(ACTOR + "entropy_from_logits_with_chunking", False))
        entropy = CHUNKED if chunked else COMPILED if compiled else EAGER
        wanted = bool(read(ACTOR + "calculate_entropy", False)) or float(read(ACTOR + "entropy_coeff", 0)) != 0

        def tokens(prefix: str, limit: str, rows: str, dynamic: str) -> int:
            return self._tokens(
                bool(own(prefix + dynamic, False)), own(prefix + limit), own(prefix + rows), longest, prefix + rows
            )

        update = tokens(ACTOR, "ppo_max_token_len_per_gpu", "ppo_micro_batch_size_per_gpu", "use_dynamic_bsz")
        names = ("log_prob_max_token_len_per_gpu", "log_prob_micro_batch_size_per_gpu", "log_prob_use_dynamic_bsz")
        bypass = bool(own("algorithm.rollout_correction.bypass_mode", False))
        old = None if bypass else Pass(tokens(ROLLOUT, *names), entropy)
        reference, own_model = None, False
        if read(ACTOR + "use_kl_loss", False) or own("algorithm.use_kl_in_reward", False):
            own_model = training == FULL
            # With adapters the actor itself is the reference, and computes in the micro-batches of its own.
            reference = Pass(tokens(REFERENCE, *names)) if own_model else Pass(tokens(ROLLOUT, *names))
        place = REFERENCE if own_model else ROLLOUT
        sequences = int(own("data.train_batch_size")) * int(own(ROLLOUT + "n", 1))
        mini = int(read(ACTOR + "ppo_mini_batch_size", 256)) * int(own(ROLLOUT + "n", 1))
        dynamic = bool(own(ACTOR + "use_dynamic_bsz", False))
        return dict(
            update=Pass(update, entropy if wanted else ""),
            log_probs=old,
            reference=reference,
            reference_model=own_model,
            reference_dtype=_dtype(own(REFERENCE + "fsdp_config.model_dtype", "fp32")),
            unit_temperature=float(own(ROLLOUT + "temperature", 1.0)) == 1.0,
            sequences=sequences,
            mini_batches=-(-sequences // mini) * int(read(ACTOR + "ppo_epochs", 1)),
            prompt_tokens=prompt,
            response_tokens=response,
            steps=_positive(own("trainer.total_training_steps")),
            rollout=self._rollout(training, hybrid, longest),
            sequence_parallel=int(read(ACTOR + "ulysses_sequence_parallel_size", 1)),
            padded_by_rows=not dynamic,
            settings=self._settings(
                {
                    "update tokens": ACTOR
                    + ("ppo_max_token_len_per_gpu" if dynamic else "ppo_micro_batch_size_per_gpu"),
                    "log-prob tokens": ROLLOUT + names[0 if own(ROLLOUT + names[2], False) else 1],
                    "reference tokens": place + names[0 if own(place + names[2], False) else 1],
                    "chunked entropy": ACTOR + "entropy_from_logits_with_chunking",
                    "checkpointing": MODEL + "enable_gradient_checkpointing",
                    "activation offload": MODEL + "enable_activation_offload",
                    "param offload": ACTOR + "fsdp_config.param_offload",
                    "optimizer offload": ACTOR + "fsdp_config.optimizer_offload",
                    "memory share": ROLLOUT + "gpu_memory_utilization",
                    "tensor parallel": ROLLOUT + "tensor_model_parallel_size",
                    "bucket": ROLLOUT + "checkpoint_engine.update_weights_bucket_megabytes",
                    "free cache": ROLLOUT + "free_cache_engine",
                    "sleep mode": ROLLOUT + "enable_sleep_mode",
                    "nodes": "trainer.nnodes",
                }
            ),
        )

    def _rollout(self, training: str, hybrid: Any, longest: int) -> RolloutRun:
        own = self.own
        engine = str(own(ROLLOUT + "name", "vllm"))
        if engine != "vllm":
            self.notes.append(f"the rollout engine is planned as vLLM, not as {engine}")
        for name in ("data_parallel_size", "pipeline_model_parallel_size", "expert_parallel_size"):
            if int(own(ROLLOUT + name, 1)) > 1:
                self.notes.append(f"{ROLLOUT}{name} is planned as 1")
        merged = bool(own(MODEL + "lora.merge", False))
        adapter = training == LORA and not merged
        level = 2
        if training == HYBRID:
            mode = sync_mode(hybrid.sync)
            adapter, level = mode.engine_adapter, 1 if mode.engine_keeps_weights else 2
        elif adapter:
            level = 1
        sleeps = bool(own(ROLLOUT + "free_cache_engine", True)) and bool(own(ROLLOUT + "enable_sleep_mode", True))
        return RolloutRun(
            dtype=_dtype(own(ROLLOUT + "dtype", "bfloat16")),
            tensor_parallel=int(own(ROLLOUT + "tensor_model_parallel_size", 1)),
            memory_share=float(own(ROLLOUT + "gpu_memory_utilization", 0.5)),
            max_model_len=int(own(ROLLOUT + "max_model_len") or longest),
            max_batched_tokens=int(own(ROLLOUT + "max_num_batched_tokens", 8192)),
            max_sequences=int(own(ROLLOUT + "max_num_seqs", 256)),
            sleeps=sleeps,
            sleep_level=level,
            bucket_bytes=int(own(ROLLOUT + "checkpoint_engine.update_weights_bucket_megabytes", 2048)) << 20,
            adapter=adapter,
        )

    def _sft(self, world: int) -> dict[str, Any]:
        """What a supervised run has besides."""
        own = self.own
        longest, dynamic = int(own("data.max_length", 1024)), bool(own("data.use_dynamic_bsz", True))
        limit, rows = own("data.max_token_len_per_gpu"), own("data.micro_batch_size_per_gpu")
        tokens = self._tokens(dynamic, limit, rows, longest, "data.micro_batch_size_per_gpu")
        return dict(
            update=Pass(tokens),
            sequences=int(own("data.train_batch_size", 256)),
            mini_batches=1,
            prompt_tokens=0,
            response_tokens=longest,
            steps=_positive(own("trainer.total_training_steps")),
            sequence_parallel=int(own("engine.ulysses_sequence_parallel_size", 1)),
            padded_by_rows=not dynamic,
            settings=self._settings(
                {
                    "update tokens": "data.max_token_len_per_gpu" if dynamic else "data.micro_batch_size_per_gpu",
                    "checkpointing": "model.enable_gradient_checkpointing",
                    "activation offload": "model.enable_activation_offload",
                    "param offload": "engine.param_offload",
                    "optimizer offload": "engine.optimizer_offload",
                }
            ),
        )

    def _settings(self, names: dict[str, str]) -> dict[str, tuple[str, object]]:
        return {what: (name, self.own(name)) for what, name in names.items()}


def _dtype(value: Any) -> str:
    name = str(value).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _positive(value: Any) -> int | None:
    return int(value) if value is not None and int(value) > 0 else None


def _targets(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def plan_inputs(command: Command, model: str | None) -> tuple[Run, Any, str]:
    """Compose a command and read it: the run, the Hugging Face config of its model, and the model's name."""
    with explained(otherwise="option-not-usable"):
        return planned_run(compose(command), command, model)
