"""What the plugin relies on in verl, vLLM, PEFT, torch, transformers, Ray and Hydra, as one table.

``CONTRACTS`` holds one record a symbol; ``check`` looks at what is installed and says what a symbol lacks.
``BEHAVIOURS`` holds what no look at names can show, each with the test that shows it. Nothing is imported before
``check`` asks for it, so the table can be read anywhere. It is complete for what the package imports and overrides:
``tests/test_contracts.py`` compares the two. ``docs/contracts.md`` is written from this file.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

#: version in which the symbols of each distribution were read
READ_IN = {
    "verl": "verl 0.9.1",
    "vllm": "vLLM 0.28.0",
    "peft": "PEFT 0.21.2",
    "torch": "torch 2.13.0",
    "transformers": "transformers 5.10.4",
    "ray": "Ray 2.60.0",
    "hydra": "Hydra 1.3",
}

#: what stops working without the symbols of each feature
FEATURES = {
    "register": "Registration of loss, advantage, engine and rollout side",
    "preflight": "Checks on the driver",
    "engine": "The engine that trains",
    "train": "The hybrid model, its layer, and loading",
    "sync": "Sending end of a weight sync",
    "receiver": "Receiving end of a weight sync",
    "server": "The rollout server",
    "metrics": "Metrics of a weight sync",
    "probe": "The probe with objective policy",
    "cpu": "Runs without an accelerator",
}


@dataclass(frozen=True)
class Contract:
    """One symbol of another library.

    Attributes:
        feature: a key of ``FEATURES``.
        module: module it is looked up in.
        name: qualified name in there, ``Class.attribute`` or ``function``; empty for the module itself.
        files: files that rely on it, relative to the package ``hybrid_lora_plugin``.
        reason: what for.
        arguments: parameters it is called with, or called with by the library, in the order of its signature.
    """

    feature: str
    module: str
    name: str
    files: tuple[str, ...]
    reason: str
    arguments: tuple[str, ...] = ()

    @property
    def symbol(self) -> str:
        """Full dotted name."""
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def last_name(self) -> str:
        """What the plugin's own source calls it."""
        return self.symbol.rpartition(".")[2]

    @property
    def kind(self) -> str:
        """``private`` if a part of the name begins with one underscore, else ``public``."""
        parts = self.symbol.split(".")
        return "private" if any(part.startswith("_") and not part.startswith("__") for part in parts) else "public"

    @property
    def read_in(self) -> str:
        """Library and version that the record was made from."""
        return READ_IN[self.module.partition(".")[0]]


@dataclass(frozen=True)
class Behaviour:
    """Something a library does, which its names do not show.

    Attributes:
        feature: as in ``Contract``.
        file: file that relies on it, relative to the package.
        holds: what must hold.
        test: ``tests/FILE.py::FUNCTION`` that fails when it does not; None where there is none.
    """

    feature: str
    file: str
    holds: str
    test: str | None


def check(contract: Contract) -> str | None:
    """Look a symbol up in what is installed.

    Returns:
        None if it is there with its arguments, else one line that names the first thing missing.
    """
    try:
        found = importlib.import_module(contract.module)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"{contract.symbol}: module {contract.module} cannot be imported ({type(error).__name__}: {reason})"
    where = contract.module
    parts = contract.name.split(".") if contract.name else []
    for position, part in enumerate(parts):
        # Attributes of instances: nothing to go on with, so only as the last part.
        inner = getattr(found, part, _ABSENT)
        if inner is _ABSENT:
            last = position == len(parts) - 1
            if not (last and inspect.isclass(found) and part in _instance_attributes(found)):
                return f"{contract.symbol}: {where} has no {part!r}; read in {contract.read_in}"
        found, where = inner, f"{where}.{part}"
    return _check_arguments(contract, found) if contract.arguments else None


_ABSENT = object()


def _check_arguments(contract: Contract, found: Any) -> str | None:
    try:
        names = list(inspect.signature(found).parameters)
    except (TypeError, ValueError) as error:
        return f"{contract.symbol}: its signature cannot be read ({error})"
    at = -1
    for argument in contract.arguments:
        if argument not in names:
            listed = ", ".join(names)
            return f"{contract.symbol}: no argument {argument!r} among ({listed}); read in {contract.read_in}"
        if names.index(argument) < at:
            return f"{contract.symbol}: argument {argument!r} has another place in ({', '.join(names)})"
        at = names.index(argument)
    return None


@functools.cache
def _instance_attributes(cls: type) -> frozenset[str]:
    """Names that a class and its bases declare or assign as ``self.NAME``, found in their source."""
    found: set[str] = set()
    for base in cls.__mro__:
        found.update(vars(base).get("__annotations__", ()))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue  # written in C
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    found.add(node.attr)
    return frozenset(found)


# -- the table ---------------------------------------------------------------------------------------------------

_ENGINE = "verl_backend/engine.py"
_REGISTER = "verl_backend/engine_registration.py"
_POLICY = "verl_backend/probe/policy_engine.py"
_PATCHES = "verl_backend/patches.py"
_ADAPTER = "verl_backend/sender/server_adapter.py"
_SOURCE = "verl_backend/sender/weight_source.py"
_PROMPT = "verl_backend/sender/logprob_prompt.py"
_TRANSPORT = "verl_backend/transport.py"
_WORKER = "verl_backend/receiver/worker.py"
_MODEL = "verl_backend/receiver/vllm_model.py"
_SERVER = "verl_backend/receiver/server.py"
_REPLICA = "verl_backend/receiver/replica.py"
_PLATFORM = "verl_backend/cpu/platform.py"
_REQUIREMENTS = "verl_backend/requirements.py"
_PREFLIGHT = "verl_backend/preflight.py"
_MODEL_CHECK = "verl_backend/model_check.py"
_HF_OUTPUT = "verl_backend/hugging_face_output.py"
_LORA_LINEAR = "training/lora_linear.py"
_LAYOUT = "verl_backend/receiver/vllm_layout.py"
_APPLY = "training/apply.py"
_REFERENCE = "training/reference.py"
_LOADING = "probing/loading.py"
_BOTH_ENGINES = (_ENGINE, _POLICY)


def _of(feature: str, module: str, owner: str, *rows: tuple) -> list[Contract]:
    """Records of one owner; a row is names, file or files, reason, arguments, with spaces between names."""
    made = []
    for names, files, reason, *arguments in rows:
        files = (files,) if isinstance(files, str) else files
        for name in names.split() or [""]:
            qualified = ".".join(part for part in (owner, name) if part)
            made.append(Contract(feature, module, qualified, files, reason, tuple(" ".join(arguments).split())))
    return made


_REGISTRATION = [
    *_of("register", "verl", "", ("", "verl_backend/registration.py", "its folder holds the version file")),
    *_of(
        "register",
        "verl.trainer.ppo.core_algos",
        "",
        ("", "verl_backend/registration.py", "the module whose import registers loss and advantage"),
        ("register_policy_loss", "verl_backend/losses.py", "registry of policy losses", "name"),
        ("register_adv_est", "verl_backend/advantages.py", "registry of advantages", "name_or_enum"),
        (
            "agg_loss",
            "verl_backend/losses.py",
            "averages over the global number of sequences",
            "loss_mat loss_mask loss_agg_mode dp_size global_batch_size",
        ),
        ("PolicyLossFn", "verl_backend/losses.py", "what a policy loss is called with"),
    ),
    *_of(
        "register",
        "verl.workers.config.actor",
        "ActorConfig",
        ("clip_ratio clip_ratio_low clip_ratio_high", "verl_backend/losses.py", "clip range of the loss"),
        ("global_batch_info", "verl_backend/losses.py", "ranks and sequences of the whole mini-batch"),
    ),
    *_of(
        "register",
        "verl.utils.device",
        "",
        ("get_device_name", (_REGISTER, _WORKER), "key of the engine registry; device of a worker"),
        ("get_vendor", _REGISTER, "key of the engine registry"),
        ("get_device_id", (_ENGINE, _POLICY, "verl_backend/probe/sft.py"), "where whole tensors are put together"),
        ("get_torch_device", (_ENGINE, "verl_backend/probe/sft.py"), "waits for copies, empties the cache"),
    ),
    *_of(
        "register",
        "verl.workers.engine",
        "EngineRegistry",
        ("", _REGISTER, "where verl looks for an engine"),
        ("_engines", _REGISTER, "tells whether another plugin holds the key"),
        ("register", _REGISTER, "puts the engine there", "model_type backend device vendor"),
    ),
    *_of(
        "register",
        "verl.workers.rollout.base",
        "",
        ("", _REGISTER, "module of the rollout registry"),
        ("_ROLLOUT_REGISTRY", _REGISTER, "where verl looks for a server adapter, as a dotted path"),
    ),
    *_of(
        "register",
        "verl.workers.rollout.replica",
        "",
        ("", "verl_backend/registration.py", "the module whose import registers the replica"),
        ("RolloutReplicaRegistry", "verl_backend/registration.py", "where verl looks for a replica"),
        ("RolloutReplicaRegistry.register", "verl_backend/registration.py", "puts it there", "name loader"),
    ),
    *_of(
        "register",
        "verl.workers.config.model",
        "HFModelConfig",
        (
            "external_lib",
            ("conf/hybrid_lora/enabled.yaml", _REQUIREMENTS),
            "names the module that registers the engine in every worker",
        ),
    ),
]

_TRAINING_ENGINE = [
    *_of(
        "engine",
        "verl.workers.config.model",
        "HFModelConfig",
        ("path", _BOTH_ENGINES, "base model, recorded with a checkpoint and an artifact"),
        (
            "local_path",
            (_ENGINE, _HF_OUTPUT, _POLICY, "verl_backend/probe/sft.py"),
            "folder whose weight files are read",
        ),
        (
            "trust_remote_code",
            (_HF_OUTPUT, _POLICY, "verl_backend/probe/sft.py"),
            "passed on to the probe, and for hf_model",
        ),
        ("hf_config", _ENGINE, "tells a model that is refused before its weights are read"),
        (
            "lora",
            (_REGISTER, _REQUIREMENTS, _SOURCE, _ADAPTER, _SERVER),
            "carries the hybrid_lora node to every worker",
        ),
        ("lora_rank lora_alpha", (_ENGINE, _REQUIREMENTS, _SOURCE), "rank and alpha of the adapters"),
        ("lora_adapter_path target_modules", _REQUIREMENTS, "refused where they say something else"),
        ("tokenizer", (_PROMPT, _SERVER, _HF_OUTPUT), "encodes the fixed prompts; its chat template is saved"),
    ),
    *_of(
        "engine",
        "verl.workers.config.engine",
        "FSDPEngineConfig",
        ("strategy", (_ENGINE, _REQUIREMENTS), "fsdp and fsdp2 are supported"),
        ("fsdp_size", _ENGINE, "FSDP1 in groups of one is refused"),
        ("forward_only", _ENGINE, "a reference policy of its own keeps no snapshot"),
        ("model_dtype", (_ENGINE, _REQUIREMENTS), "set to the type of frozen weights"),
        ("mixed_precision", (_REQUIREMENTS, _PROMPT), "its param_dtype is checked; whether the trainer rounds"),
        ("use_remove_padding use_fused_kernels", _PROMPT, "how the fixed prompts are passed"),
    ),
    *_of(
        "engine",
        "verl.workers.config.optimizer",
        "",
        ("FSDPOptimizerConfig.lr", _ENGINE, "learning rate of the LoRA group"),
        ("build_optimizer", _BOTH_ENGINES, "takes parameter groups", "parameters config"),
    ),
    *_of(
        "engine",
        "verl.trainer.config",
        "CheckpointConfig",
        ("save_lora_only", _REQUIREMENTS, "refused: full modules would be lost"),
    ),
    *_of(
        "engine",
        "verl.workers.engine",
        "FSDPEngineWithLMHead",
        ("", (_ENGINE, _POLICY, _REGISTER), "base class of both engines"),
        (
            "__init__",
            (_ENGINE, _POLICY, _REGISTER),
            "how a worker makes an engine",
            "model_config engine_config optimizer_config checkpoint_config",
        ),
        ("initialize", _ENGINE, "called before anything is built, so a probe has the memory"),
        ("_build_module", _ENGINE, "loads the model in engine_config.model_dtype"),
        ("_build_lora_module", _BOTH_ENGINES, "hook where the model gets its adapters", "module"),
        ("_build_fsdp_module", _ENGINE, "wraps what the hook above returned", "module"),
        ("_build_optimizer", _BOTH_ENGINES, "hook for two parameter groups", "module"),
        ("_build_lr_scheduler", _POLICY, "hook for a constant rate", "optimizer"),
        ("train_batch", _BOTH_ENGINES, "one mini-batch; its metrics are added to", "data loss_function"),
        ("infer_batch", _PROMPT, "log-probabilities of the fixed prompts", "data loss_function"),
        ("eval_mode", _PROMPT, "around that pass"),
        (
            "forward_backward_batch",
            _POLICY,
            "gradients of a mini-batch without a step",
            "data loss_function forward_only",
        ),
        ("optimizer_step", _ENGINE, "clips and steps; norms are taken around it"),
        ("optimizer_zero_grad", _POLICY, "clears gradients between masks"),
        ("lr_scheduler_step", _POLICY, "tells that a step is over"),
        ("is_mp_src_rank_with_outputs", _BOTH_ENGINES, "whether this rank has metrics"),
        ("to", _ENGINE, "moves the snapshot of the base along", "device model optimizer grad"),
        ("disable_adapter", _BOTH_ENGINES, "the reference policy"),
        ("get_per_tensor_param", _BOTH_ENGINES, "the stream of a weight sync", "layered_summon base_sync_done"),
        (
            "save_checkpoint",
            _BOTH_ENGINES,
            "adds the trained weights or the state of a probe",
            "local_path hdfs_path global_step max_ckpt_to_keep",
        ),
        (
            "load_checkpoint",
            _BOTH_ENGINES,
            "refuses a checkpoint of another setting",
            "local_path hdfs_path del_local_after_load",
        ),
        ("rank", _BOTH_ENGINES, "rank 0 writes and prints"),
        ("module", _BOTH_ENGINES, "the wrapped model"),
        ("optimizer", _ENGINE, "its groups"),
        ("model_config", _BOTH_ENGINES, "the model's settings"),
        ("engine_config", _ENGINE, "the strategy's settings; replaced while the model loads"),
        ("optimizer_config", _BOTH_ENGINES, "passed to build_optimizer"),
        ("checkpoint_manager", _ENGINE, "tells which of a checkpoint's files a resume reads; saves no hf_model"),
        ("_is_offload_param", _ENGINE, "whether FSDP1's weights lie on the host"),
        ("_autocast_dtype", _POLICY, "precision that the artifact records"),
    ),
    *_of(
        "engine",
        "verl.utils.checkpoint.checkpoint_manager",
        "BaseCheckpointManager",
        ("should_load_model should_load_optimizer should_load_extra", _ENGINE, "which files a resume reads"),
        ("checkpoint_load_contents", _ENGINE, "whether a resume reads weights"),
        ("checkpoint_save_contents", _HF_OUTPUT, "what verl saves; hf_model is taken out and saved by the engine"),
    ),
    *_of(
        "engine",
        "verl.utils.fsdp_utils",
        "",
        ("fsdp_version", _ENGINE, "FSDP1 or FSDP2", "model"),
        ("load_fsdp_model_to_gpu", _ENGINE, "FSDP1 gathers nothing from the host", "model"),
        ("offload_fsdp_model_to_cpu", _ENGINE, "and back", "model"),
    ),
    *_of(
        "engine",
        "torch.distributed.fsdp",
        "FullyShardedDataParallel",
        ("_handle", _ENGINE, "FSDP1's flat parameter, resharded around the reference policy"),
        ("_is_root", _ENGINE, "None until the first forward pass, before which there is no shard to go back to"),
        ("sharding_strategy process_group", _ENGINE, "the ranks that share one copy"),
    ),
    *_of(
        "engine",
        "torch.distributed.fsdp._flat_param",
        "FlatParamHandle",
        ("uses_sharded_strategy", _ENGINE, "whether there is something to reshard"),
        ("reshard", _ENGINE, "frees the gathered copy", "free_unsharded_flat_param"),
    ),
    *_of("engine", "torch", "", ("_foreach_norm", "training/dtensor.py", "norms of many shards in one call")),
]

_TRAIN = [
    *_of("train", "torch", "Tensor", ("_version", _LORA_LINEAR, "tells whether an input was changed in place")),
    *_of("train", "torch.nn", "Module", ("_buffers", _PATCHES, "buffers that must keep their type")),
    *_of(
        "train",
        "peft",
        "",
        ("PeftModel", _APPLY, "what apply_allocation returns"),
        ("PeftModel.peft_config", _APPLY, "tells a model that is wrapped already"),
        ("TaskType", _APPLY, "kind of model"),
        ("TaskType.CAUSAL_LM", _APPLY, "kind of model"),
        ("LoraConfig", _APPLY, "the adapters", "task_type r target_modules lora_alpha lora_dropout bias"),
        ("LoraConfig._register_custom_module", _APPLY, "puts our layer in place of PEFT's", "mapping"),
        ("get_peft_model", _APPLY, "wraps the model", "model peft_config adapter_name"),
    ),
    *_of(
        "train",
        "peft.tuners.lora",
        "",
        ("LoraLayer", (_APPLY, _REFERENCE), "marks the modules that got an adapter"),
        ("LoraLayer._disable_adapters", _REFERENCE, "switches an adapter off for the reference policy"),
        ("Linear", _LORA_LINEAR, "base class of our layer"),
        ("Linear.forward", _LORA_LINEAR, "answers for everything but the plain case", "x"),
        ("Linear.lora_A Linear.lora_B", (_APPLY, _LORA_LINEAR), "factors by adapter name"),
        (
            "Linear.lora_bias Linear.lora_dropout Linear.lora_variant Linear.scaling Linear.in_features "
            "Linear.base_layer",
            _LORA_LINEAR,
            "what the layer computes",
        ),
        (
            "Linear.disable_adapters Linear.merged Linear.active_adapters",
            _LORA_LINEAR,
            "tells whether the plain case holds",
        ),
        ("Linear.reset_lora_parameters", _APPLY, "draws A again in fp32", "adapter_name init_lora_weights"),
    ),
    *_of(
        "train",
        "transformers",
        "",
        ("PreTrainedModel", _PATCHES, "class whose cast is narrowed to parameters"),
        ("PreTrainedModel.to", _PATCHES, "the cast that verl calls"),
        ("PreTrainedModel.enable_input_require_grads", _BOTH_ENGINES, "gradient for checkpointed layers"),
        ("PreTrainedModel.get_output_embeddings", "linear_account.py", "which linear module is the head"),
        ("AutoConfig", (_LOADING, _MODEL_CHECK), "config of a checkpoint"),
        ("AutoConfig.from_pretrained", (_LOADING, _MODEL_CHECK), "config of a checkpoint"),
        ("AutoTokenizer", (_LOADING, "training/export.py"), "tokenizer of a checkpoint"),
        ("AutoTokenizer.from_pretrained", (_LOADING, "training/export.py"), "tokenizer of a checkpoint"),
        (
            "AutoModelForCausalLM",
            ("candidates.py", _LOADING, "training/export.py"),
            "the model, with or without weights",
        ),
        ("AutoModelForCausalLM.from_pretrained", (_LOADING, "training/export.py"), "the model with its weights"),
        ("AutoModelForCausalLM.from_config", "candidates.py", "the model on the meta device"),
        ("__version__", "probing/provenance.py", "recorded in the artifact"),
        ("PreTrainedConfig.get_text_config", "candidates.py", "text part of a composite config"),
        ("PreTrainedConfig._name_or_path", "allocation/schema.py", "names the model in a refusal"),
        (
            "PreTrainedTokenizerBase.apply_chat_template",
            "probing/data/batches.py",
            "tokens of a chat",
            "conversation add_generation_prompt tokenize",
        ),
        ("PreTrainedTokenizerBase.chat_template", "probing/data/batches.py", "whether chats can be encoded"),
    ),
    *_of(
        "train",
        "transformers.models.auto.modeling_auto",
        "",
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "candidates.py", "class name of a config that was never saved"),
    ),
]

_SENDER = [
    *_of(
        "sync",
        "verl.workers.rollout.vllm_rollout.vllm_rollout",
        "ServerAdapter",
        ("", _ADAPTER, "base class of the sending end"),
        ("update_weights", _ADAPTER, "one weight sync", "weights global_steps wire_format"),
        ("_ensure_server_handle", _ADAPTER, "whether this rank talks to a server"),
        ("_execute_method", _ADAPTER, "starts the receiver in the workers", "method non_block kwargs"),
        ("server_handle", _ADAPTER, "the server's actor"),
        ("_has_server", _ADAPTER, "whether this rank starts the receiver"),
        ("use_shm", _ADAPTER, "shared memory in place of device IPC"),
        ("zmq_handle", _ADAPTER, "address of the receiver"),
        ("config", _ADAPTER, "size of a bucket"),
        ("model_config", _ADAPTER, "the hybrid_lora node"),
    ),
    *_of(
        "sync",
        "verl.workers.config.rollout",
        "",
        ("RolloutConfig.checkpoint_engine", _ADAPTER, "node with the size of a bucket"),
        ("CheckpointEngineConfig.update_weights_bucket_megabytes", _ADAPTER, "size of a bucket"),
    ),
    *_of("sync", "verl.workers.rollout.utils", "", ("ensure_async_iterator", _ADAPTER, "takes streams of both kinds")),
    *_of(
        "sync",
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer",
        "BucketedWeightSender",
        ("", _TRANSPORT, "base class of the sender"),
        ("__init__", _TRANSPORT, "called with these", "zmq_handle bucket_size_mb use_shm"),
        ("zmq_context socket", _TRANSPORT, "where our limited socket goes"),
        ("_init_socket", _TRANSPORT, "makes the socket"),
        ("async_send_weights", _ADAPTER, "sends a stream", "weights"),
    ),
    *_of(
        "sync",
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer",
        "BucketedWeightReceiver",
        ("", _TRANSPORT, "base class of the receiver"),
        ("__init__", _TRANSPORT, "called with these", "zmq_handle device use_shm"),
        ("zmq_context socket", _TRANSPORT, "where our limited socket goes"),
        ("receive_weights", _WORKER, "calls back with each bucket", "on_bucket_received"),
    ),
    *_of(
        "sync",
        "verl.utils.torch_dtypes",
        "PrecisionType",
        ("", (_SOURCE, _PROMPT), "names of types"),
        ("to_dtype", (_SOURCE, _PROMPT), "type of the rollout engine, and of the trainer's passes"),
    ),
    *_of(
        "sync",
        "torch.distributed.distributed_c10d",
        "",
        ("_get_default_store", _ADAPTER, "tells other ranks of a failure outside the collectives"),
    ),
    *_of("sync", "ray", "ObjectRef", ("future", _ADAPTER, "waits for the workers with a limit")),
    *_of(
        "sync",
        "verl.utils.tensordict_utils",
        "",
        ("", _PROMPT, "batches as verl's engine takes them"),
        ("get_tensordict", _PROMPT, "makes a batch", "tensor_dict non_tensor_dict"),
    ),
    *_of(
        "sync", "verl.workers.utils.padding", "", ("no_padding_2_padding", _PROMPT, "log-probabilities of the answer")
    ),
]

_METRICS = [
    *_of(
        "metrics",
        "verl.trainer.ppo.v1.trainer_base",
        "",
        ("", _PATCHES, "module of the trainer"),
        ("PPOTrainer", _PATCHES, "the trainer"),
        ("PPOTrainer._consume_sync_metrics", _PATCHES, "what it returns is logged after a sync"),
        ("PPOTrainer.actor_rollout_wg", _PATCHES, "the workers that have the figures"),
    ),
    *_of("metrics", "verl.single_controller.ray", "RayWorkerGroup", ("workers", _PATCHES, "their actors")),
    *_of(
        "metrics",
        "ray",
        "",
        ("", (_PATCHES, _SERVER), "the figures of every worker; the server's actor"),
        ("get", _PATCHES, "asks with a limit", "object_refs timeout"),
        ("remote", _SERVER, "makes an actor class of the server"),
        ("exceptions.GetTimeoutError", _PATCHES, "a busy worker is no error"),
    ),
]

_RECEIVER = [
    *_of(
        "receiver",
        "verl.workers.rollout.vllm_rollout.utils",
        "",
        ("VLLM_LORA_INT_ID", (_MODEL, _SERVER), "number of the one adapter"),
        ("VLLM_LORA_NAME VLLM_LORA_PATH", (_MODEL, _SERVER), "its name and path"),
        ("vLLMColocateWorkerExtension", _WORKER, "base class of the worker's extension"),
        ("vLLMColocateWorkerExtension._get_zmq_handle", _WORKER, "address of the sender"),
        (
            "vLLMColocateWorkerExtension._update_weights",
            _MODEL,
            "loads named tensors into the live model",
            "weights peft_config base_sync_done",
        ),
        ("vLLMColocateWorkerExtension._iter_all_models_with_config", _MODEL, "models to finish after loading"),
    ),
    *_of(
        "receiver",
        "verl.utils.vllm",
        "",
        ("TensorLoRARequest", _MODEL, "an adapter in memory"),
        ("TensorLoRARequest.peft_config TensorLoRARequest.lora_tensors", _MODEL, "its configuration and tensors"),
    ),
    *_of(
        "receiver",
        "vllm.v1.worker.worker_base",
        "WorkerBase",
        ("device", (_WORKER, _MODEL), "where buckets arrive"),
        ("local_rank", _WORKER, "device of a worker that names none"),
        ("rank", _MODEL, "which of the workers this is"),
        ("model_runner", _MODEL, "leads to the live model"),
        ("model_config vllm_config", _MODEL, "checkpoint, graphs, adapters"),
        ("add_lora", _MODEL, "takes the adapter", "lora_request"),
        ("remove_lora", _MODEL, "drops the old one", "lora_id"),
        ("list_loras", _MODEL, "tells whether it is gone"),
    ),
    *_of(
        "receiver",
        "vllm.config",
        "",
        ("ModelConfig.model ModelConfig.revision", _MODEL, "folder of the checkpoint"),
        ("ModelConfig.hf_config", _MODEL, "whether the head is the embedding"),
        ("ModelConfig.enforce_eager", _MODEL, "whether graphs hold addresses of weights"),
        ("VllmConfig.lora_config", _MODEL, "whether the engine runs adapters"),
        ("VllmConfig.kv_transfer_config", _SERVER, "whether there is a connector to reset"),
        ("VllmConfig.parallel_config", _MODEL, "how many workers read one checkpoint"),
        (
            "ParallelConfig.nnodes ParallelConfig.distributed_executor_backend ParallelConfig.world_size",
            _MODEL,
            "whether all workers are on one machine, and how many they are",
        ),
    ),
    *_of(
        "receiver",
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        ("model", _MODEL, "the live model"),
        ("lora_manager", _MODEL, "its adapters"),
    ),
    *_of(
        "receiver",
        # The second model runner: vLLM takes it by default for Llama and Qwen3.
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        ("model", _MODEL, "the live model"),
        ("lora_manager", _MODEL, "its adapters"),
    ),
    *_of(
        "receiver",
        "vllm.model_executor.layers.linear",
        "",
        ("", _LAYOUT, "vLLM's linear layers"),
        ("QKVParallelLinear", _LAYOUT, "q, k and v in one parameter"),
        (
            "QKVParallelLinear.head_size QKVParallelLinear.v_head_size QKVParallelLinear.num_heads "
            "QKVParallelLinear.num_kv_heads QKVParallelLinear.total_num_heads QKVParallelLinear.total_num_kv_heads "
            "QKVParallelLinear.num_kv_head_replicas",
            _LAYOUT,
            "where q, k and v lie in it",
        ),
        ("QKVParallelLinear.output_sizes", _LAYOUT, "rows of the parts of a packed one"),
        ("MergedColumnParallelLinear", _LAYOUT, "gate and up in one parameter"),
        ("MergedColumnParallelLinear.output_sizes", _LAYOUT, "where gate and up lie in it"),
        ("ColumnParallelLinear", _LAYOUT, "rows are sharded"),
        ("ColumnParallelLinear.output_size", _LAYOUT, "rows of the whole weight"),
        ("ColumnParallelLinear.tp_rank ColumnParallelLinear.tp_size", _LAYOUT, "which shard this is"),
        ("RowParallelLinear", _LAYOUT, "columns are sharded"),
        ("RowParallelLinear.input_size", _LAYOUT, "columns of the whole weight"),
        ("RowParallelLinear.input_size_per_partition", _LAYOUT, "columns of a shard"),
        ("RowParallelLinear.tp_rank", _LAYOUT, "which shard this is"),
    ),
    *_of(
        "receiver",
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "",
        ("VocabParallelEmbedding.shard_indices", _LAYOUT, "rows of this worker"),
        ("VocabParallelEmbedding.org_vocab_size", _LAYOUT, "rows without padding"),
        (
            "VocabParallelEmbeddingShardIndices.num_org_elements "
            "VocabParallelEmbeddingShardIndices.org_vocab_start_index",
            _LAYOUT,
            "which rows they are",
        ),
    ),
    *_of(
        "receiver",
        "vllm.model_executor.models.qwen2",
        "Qwen2ForCausalLM",
        ("packed_modules_mapping", _LAYOUT, "which modules are packed into one"),
    ),
    *_of(
        "receiver",
        "vllm.model_executor.models.qwen3",
        "Qwen3ForCausalLM",
        ("packed_modules_mapping", _LAYOUT, "which modules are packed into one"),
    ),
    *_of(
        "receiver",
        "vllm.model_executor.models.llama",
        "LlamaForCausalLM",
        ("packed_modules_mapping", _LAYOUT, "which modules are packed into one"),
    ),
    *_of(
        "receiver",
        "vllm.model_executor.models.phi3",
        "Phi3ForCausalLM",
        ("packed_modules_mapping", _LAYOUT, "that its own weights are packed"),
    ),
    *_of(
        "receiver",
        "vllm.model_executor.models.glm4",
        "Glm4ForCausalLM",
        ("packed_modules_mapping", _LAYOUT, "into which adapters a packed one is cut"),
    ),
    *_of(
        "receiver",
        "vllm.model_executor.model_loader.utils",
        "",
        ("process_weights_after_loading", _MODEL, "what vLLM does after a load", "model model_config target_device"),
    ),
    *_of(
        "receiver",
        "vllm.lora.worker_manager",
        "WorkerLoRAManager",
        ("_adapter_manager", _MODEL, "leads to the adapter's live factors"),
    ),
    *_of(
        "receiver",
        "vllm.lora.model_manager",
        "LoRAModelManager",
        ("lora_index_to_id", _MODEL, "slot of the adapter"),
        ("modules", _MODEL, "layers with an adapter, by name"),
    ),
    *_of(
        "receiver",
        "vllm.lora.layers.base_linear",
        "BaseLinearLayerWithLoRA",
        ("lora_a_stacked", _LAYOUT, "live factor A by slot, read back"),
        ("lora_b_stacked", (_MODEL, _LAYOUT), "live factor B by slot, read back"),
        ("base_layer", _LAYOUT, "the layer inside"),
    ),
]

_SERVER_SIDE = [
    *_of(
        "server",
        "verl.workers.rollout.vllm_rollout.vllm_async_server",
        "vLLMHttpServer",
        ("", (_SERVER, _PATCHES), "base class of the server; itself refused for a model under Hybrid-LoRA"),
        ("__init__", _SERVER, "sets config and model_config", "config model_config"),
        ("launch_server", _SERVER, "starts the engine; the base model is looked at then"),
        ("_get_worker_extension_cls", _SERVER, "names our worker extension"),
        ("_resolve_sleep_level", _SERVER, "how deep a sleep is"),
        ("collective_rpc", _SERVER, "calls a method of all workers", "method timeout args kwargs"),
        ("clear_kv_cache", _SERVER, "resets the caches"),
        ("set_global_steps", _SERVER, "step of the weights", "global_steps"),
        ("lora_as_adapter", _SERVER, "whether the engine runs an adapter"),
        ("_submission_paused", _SERVER, "whether requests wait at the gate"),
        ("_admitting", _SERVER, "count of admitted requests"),
        ("_park_until_admitted", _SERVER, "the gate", "request_id"),
        ("sleep release_kv_cache resume_kv_cache", _SERVER, "when the engine can generate"),
        ("wake_up", _SERVER, "when the engine can generate", "tags"),
        ("resume_engine_generation", _SERVER, "the engine runs again, the gate is still closed"),
        ("generate", _SERVER, "refused while weights are not proven"),
        ("engine", _SERVER, "vLLM's engine"),
        ("node_rank", _SERVER, "the first node holds the engine"),
        ("config", _SERVER, "settings of the rollout"),
        ("model_config", (_SERVER, _PATCHES), "the hybrid_lora node"),
        ("_validate_configs", _PATCHES, "called as soon as a server has read its model"),
    ),
    *_of(
        "server",
        "verl.workers.rollout.vllm_rollout.vllm_async_server",
        "",
        ("", _PATCHES, "module of the server"),
    ),
    *_of(
        "server",
        "verl.workers.rollout.vllm_rollout.vllm_async_server",
        "vLLMReplica",
        ("", (_SERVER, _REPLICA), "base class of the replica, and itself for another model"),
        ("__init__", (_SERVER, _REPLICA), "how verl makes one", "replica_rank config model_config"),
        ("server_class", _SERVER, "the actor class it starts"),
        ("is_reward_model is_teacher_model", _SERVER, "these keep verl's own server"),
    ),
    *_of(
        "server",
        "verl.workers.config.rollout",
        "RolloutConfig",
        ("free_cache_engine enable_sleep_mode", _SERVER, "whether a sleep frees memory"),
        ("dtype", _SERVER, "named in a refusal"),
        ("load_format", _SERVER, "whether the engine starts from the base model"),
        ("max_model_len", _SERVER, "longest fixed prompt"),
    ),
    *_of(
        "server",
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        ("collective_rpc", _SERVER, "answers of all workers", "method timeout args kwargs"),
        ("reset_prefix_cache", _SERVER, "answers whether it could", "reset_connector"),
        ("list_loras", _SERVER, "adapters that are loaded"),
        (
            "generate",
            _SERVER,
            "log-probabilities of the fixed prompt",
            "prompt sampling_params request_id lora_request",
        ),
        ("vllm_config", _SERVER, "whether there is a connector to reset"),
    ),
    *_of(
        "server",
        "vllm",
        "",
        ("SamplingParams", _SERVER, "one token, log-probabilities of the prompt", "temperature max_tokens"),
        ("SamplingParams.prompt_logprobs", _SERVER, "asks for them"),
        ("RequestOutput.prompt_logprobs", _SERVER, "where they are"),
    ),
    *_of("server", "vllm.logprobs", "Logprob", ("logprob", _SERVER, "one of them")),
    *_of(
        "server",
        "vllm.inputs",
        "TokensPrompt",
        ("", _SERVER, "a prompt of tokens"),
        ("prompt_token_ids", _SERVER, "its tokens"),
    ),
    *_of(
        "server",
        "vllm.lora.request",
        "LoRARequest",
        ("", _SERVER, "generates with the adapter", "lora_name lora_int_id lora_path"),
    ),
]

_PROBE = [
    *_of(
        "probe",
        "verl.utils.torch_functional",
        "",
        ("get_constant_schedule_with_warmup", _POLICY, "a constant rate", "optimizer num_warmup_steps"),
    ),
    *_of(
        "probe",
        "verl.utils.dataset.rl_dataset",
        "RLHFDataset",
        (
            "",
            "verl_backend/probe/policy_dataset.py",
            "the run's own prompts",
            "data_files tokenizer config processor max_samples",
        ),
    ),
    *_of(
        "probe",
        "verl.utils.import_utils",
        "",
        (
            "load_extern_object",
            "verl_backend/probe/policy_dataset.py",
            "the run's own dataset class",
            "module_path object_name",
        ),
    ),
]

_CPU = [
    *_of("cpu", "verl.plugin.platform.platform_manager", "PlatformRegistry", ("", _PLATFORM, "registry of platforms")),
    *_of(
        "cpu",
        "verl.plugin.platform.platform_manager",
        "PlatformRegistry",
        ("register", _PLATFORM, "puts ours there", "platform"),
    ),
    *_of(
        "cpu",
        "verl.plugin.platform.platform_base",
        "PlatformBase",
        ("", _PLATFORM, "base class of the platform"),
        ("device_name vendor_name device_module", _PLATFORM, "what verl calls the device"),
        (
            "is_available current_device device_count empty_cache communication_backend_name visible_devices_envvar "
            "profiler_start profiler_stop ray_resource_name ray_noset_envvars is_ipc_supported cudart",
            _PLATFORM,
            "verl's interface of a platform",
        ),
        ("set_device synchronize get_device_capability", _PLATFORM, "verl's interface of a platform", "device_index"),
        ("manual_seed manual_seed_all", _PLATFORM, "verl's interface of a platform", "seed"),
        ("set_allocator_settings", _PLATFORM, "verl's interface of a platform", "settings"),
        ("nvtx_range", _PLATFORM, "verl's interface of a platform", "msg"),
        ("ray_resource_options", _PLATFORM, "verl's interface of a platform", "num_gpus"),
    ),
    *_of(
        "cpu",
        "torch.distributed.fsdp._init_utils",
        "",
        ("", _PATCHES, "module of FSDP1's check"),
        (
            "_check_module_states_for_sync_module_states",
            _PATCHES,
            "the check that keeps FSDP1 from the host",
            "module_states",
        ),
    ),
    *_of(
        "cpu",
        "vllm.model_executor.layers.utils",
        "",
        ("", "verl_backend/patches.py", "module of the CPU linear"),
        (
            "dispatch_cpu_unquantized_gemm",
            "verl_backend/patches.py",
            "packs a weight and empties it",
            "layer remove_weight",
        ),
    ),
]

_DRIVER = [
    *_of(
        "preflight",
        "hydra.experimental.callback",
        "Callback",
        ("", _PREFLIGHT, "base class of the check on the driver"),
        ("on_run_start on_job_start", _PREFLIGHT, "called with the composed configuration", "config"),
    ),
    *_of(
        "preflight",
        "hydra.types",
        "RunMode",
        ("", _PREFLIGHT, "whether it is a sweep"),
        ("MULTIRUN", _PREFLIGHT, "whether it is a sweep"),
    ),
    *_of(
        "preflight",
        "hydra.plugins.search_path_plugin",
        "SearchPathPlugin",
        ("", "../hydra_plugins/hybrid_lora/search_path.py", "base class of the plugin for Hydra"),
        ("manipulate_search_path", "../hydra_plugins/hybrid_lora/search_path.py", "the hook", "search_path"),
    ),
    *_of(
        "preflight",
        "hydra.core.config_search_path",
        "ConfigSearchPath",
        ("", "../hydra_plugins/hybrid_lora/search_path.py", "where configuration groups are found"),
        ("append", "../hydra_plugins/hybrid_lora/search_path.py", "adds ours", "provider path"),
    ),
    *_of(
        "preflight",
        "hydra.core.config_store",
        "ConfigStore",
        ("", "../hydra_plugins/hybrid_lora/search_path.py", "where the defaults of our options are found"),
        ("instance", "../hydra_plugins/hybrid_lora/search_path.py", "the one of the process"),
        ("store", "../hydra_plugins/hybrid_lora/search_path.py", "adds ours", "name node group provider"),
    ),
]

CONTRACTS: tuple[Contract, ...] = tuple(
    _REGISTRATION + _DRIVER + _TRAINING_ENGINE + _TRAIN + _SENDER + _METRICS + _RECEIVER + _SERVER_SIDE + _PROBE + _CPU
)

BEHAVIOURS: tuple[Behaviour, ...] = (
    Behaviour(
        "register",
        "verl_backend/registration.py",
        "`import verl` loads the entry points of group `verl.plugins`, unless VERL_USE_EXTERNAL_PLUGINS leaves "
        "them out",
        "tests/test_losses.py::test_loss_and_advantage_are_found_through_verls_registries",
    ),
    Behaviour(
        "register",
        _REGISTER,
        "a worker imports `external_lib` before it looks for an engine, and stops if that fails",
        "tests/test_verl_configuration.py::test_worker_without_the_plugin_stops_instead_of_training_plain_lora",
    ),
    Behaviour(
        "register",
        _REGISTER,
        "the registry of engines looks for (device, vendor) before device",
        "tests/test_engine.py::test_registry_gives_our_engine_to_a_hybrid_model",
    ),
    Behaviour(
        "register",
        _REGISTER,
        "the trainer reads the model, and so imports `external_lib`, before it looks for a replica",
        "tests/test_sync_verl.py::test_verl_still_reads_the_model_before_it_looks_for_the_rollout_side",
    ),
    Behaviour(
        "register",
        _REGISTER,
        "a value of the rollout registry may be a dotted path",
        "tests/test_sync_verl.py::test_registration_puts_our_rollout_side_where_verl_looks",
    ),
    Behaviour(
        "register",
        "verl_backend/losses.py",
        "`agg_loss` with `seq-mean-token-sum` divides by the global number of sequences",
        "tests/test_losses.py::test_mean_over_ranks_is_the_loss_of_one_rank",
    ),
    Behaviour(
        "preflight",
        _PREFLIGHT,
        "Hydra lets SystemExit out of a callback, and calls `on_run_start` before it makes the output folder",
        "tests/test_verl_configuration.py::test_main_ppo_stops_with_one_line_and_writes_nothing",
    ),
    Behaviour(
        "preflight",
        _REQUIREMENTS,
        "the settings of verl that are checked or set have these names",
        "tests/test_verl_configuration.py::test_recipe_composes_and_passes_verls_own_validation",
    ),
    Behaviour(
        "engine",
        _ENGINE,
        "`_build_module` casts the model it loaded with one `module.to(dtype)`",
        "tests/test_training_verl.py::test_verl_still_casts_the_whole_model_while_it_builds_it",
    ),
    Behaviour(
        "engine",
        _ENGINE,
        "`_build_module` reads `engine_config.model_dtype` when it is called",
        "tests/test_sharding.py::test_what_trains_is_fp32_and_what_is_frozen_keeps_the_checkpoints_type",
    ),
    Behaviour(
        "engine",
        _ENGINE,
        "`_build_lora_module` is called with the plain model, and its result goes to `_build_fsdp_module`",
        "tests/test_engine.py::test_trainables_are_fp32_and_exactly_the_allocations",
    ),
    Behaviour(
        "engine",
        _ENGINE,
        "`optimizer_step` clips, steps and returns the norm",
        "tests/test_engine.py::test_each_kind_of_module_has_its_own_learning_rate_and_gradient_norm",
    ),
    Behaviour(
        "engine",
        _ENGINE,
        "every metric of `train_batch` but grad_norm, lr and loss is a list, which the worker chains over ranks",
        "tests/test_sync_run.py::test_run_with_engines_apart_proves_its_syncs_and_ends_at_the_first_that_fails",
    ),
    Behaviour(
        "engine",
        _ENGINE,
        "`get_per_tensor_param` returns a stream and an adapter's configuration; None makes verl send merged weights",
        "tests/test_engine.py::test_synced_weights_are_the_fp32_merge_of_the_untouched_base",
    ),
    Behaviour(
        "engine",
        _HF_OUTPUT,
        "the checkpoint manager writes configuration and tokenizer to `huggingface`, and no weights without `hf_model`",
        "tests/test_engine.py::test_hf_model_in_a_checkpoint_is_what_the_export_writes",
    ),
    Behaviour(
        "engine",
        _HF_OUTPUT,
        "the merger reads `world_size` in `fsdp_config.json` and puts it into the name of the first file it opens",
        "tests/test_engine.py::test_verls_merger_ends_with_a_line_that_names_the_export",
    ),
    Behaviour(
        "engine",
        "verl_backend/earlier_checkpoint.py",
        "shards are named by kind, number of ranks and rank; a LoRA run adds `lora_train_meta.json`",
        "tests/test_own_disks.py::test_a_checkpoint_of_a_run_without_hybrid_lora_is_refused_before_ray",
    ),
    Behaviour(
        "train",
        "training/model_folder.py",
        "`save_pretrained` writes no weights of an empty state, and else fills its files in the order of `file_order`",
        "tests/test_training.py::test_a_folder_written_one_weight_at_a_time_is_transformers_own",
    ),
    Behaviour(
        "engine",
        _ENGINE,
        "FSDP1 keeps a gathered copy until its handle reshards",
        "tests/test_sharding.py::test_reference_is_the_base_model",
    ),
    Behaviour(
        "engine",
        _ENGINE,
        "FSDP1 gathers nothing before it knows which unit is the root",
        "tests/test_first_pass.py::test_every_order_of_first_passes_trains_to_the_same_bits",
    ),
    Behaviour(
        "train",
        _APPLY,
        "PEFT puts the registered class in place of its own layer and keeps its names",
        "tests/test_training.py::test_exactly_the_allocated_modules_train_each_in_its_own_way",
    ),
    Behaviour(
        "train",
        _REFERENCE,
        "a LoRA layer of PEFT's computes its base alone while `_disable_adapters` is set, whatever its factors require",
        "tests/test_training.py::test_adapters_off_is_the_base_layer_and_leaves_every_gradient_on",
    ),
    Behaviour(
        "engine",
        _REFERENCE,
        "FSDP2 settles the type of its reductions at the first forward pass, from what requires a gradient then",
        "tests/test_first_pass.py::test_fsdp2_still_settles_how_it_reduces_at_the_first_forward_pass",
    ),
    Behaviour(
        "train",
        _LORA_LINEAR,
        "PEFT's layer computes the formula that ours computes in fewer steps",
        "tests/test_lora_linear.py::test_losses_and_gradients_are_pefts",
    ),
    Behaviour(
        "train",
        _PATCHES,
        "`to` of a Hugging Face model casts buffers too",
        "tests/test_training_verl.py::test_casting_parameters_leaves_the_frequencies_of_rope",
    ),
    Behaviour(
        "train",
        "probing/data/batches.py",
        "a tokenizer answers for `eos_token_id` and `pad_token_id`, which its class does not name",
        "tests/test_probe_data.py::test_labels_cover_response_and_end_token_only",
    ),
    Behaviour(
        "sync",
        _TRANSPORT,
        "sender and receiver take their socket from `zmq_context.socket`, acknowledgements are empty, and the "
        "last one goes out after the last callback",
        "tests/test_sync_verl.py::test_transport_still_waits_and_acknowledges_where_ours_looks",
    ),
    Behaviour(
        "sync",
        _ADAPTER,
        "`_execute_method(non_block=True)` returns a Ray reference to what the workers returned",
        "tests/test_sync_run.py::test_run_with_engines_apart_proves_its_syncs_and_ends_at_the_first_that_fails",
    ),
    Behaviour(
        "sync",
        _ADAPTER,
        "the default store has `set`, `get` and `check`, which work while other ranks wait in a collective",
        "tests/test_sync_ranks.py::test_all_ranks_end_long_before_the_limit_and_name_the_cause",
    ),
    Behaviour(
        "sync",
        _TRANSPORT,
        "buckets of verl's other checkpoint engines view each tensor by its type at any offset",
        "tests/test_sync_verl.py::test_verls_buckets_without_gaps_carry_a_sync",
    ),
    Behaviour(
        "sync",
        _SOURCE,
        "no trainer adds a replica to a checkpoint engine manager while it runs",
        "tests/test_sync_verl.py::test_no_trainer_of_verl_lets_an_engine_join_a_run",
    ),
    Behaviour(
        "metrics",
        _PATCHES,
        "`fit` logs what `_consume_sync_metrics` returns, right after the sync of a step",
        "tests/test_sync_verl.py::test_metrics_of_a_sync_are_logged_with_its_step",
    ),
    Behaviour(
        "metrics",
        _PATCHES,
        "every Ray actor has `__ray_call__`, which runs a function in its process",
        "tests/test_sync_run.py::test_run_with_engines_apart_proves_its_syncs_and_ends_at_the_first_that_fails",
    ),
    Behaviour(
        "receiver",
        _WORKER,
        "neither vLLM's workers nor verl's extension have a method `receive_hybrid_weights`",
        "tests/test_sync_verl.py::test_extension_adds_no_name_that_vllm_or_verl_use",
    ),
    Behaviour(
        "engine",
        "verl_backend/run_kinds.py",
        "`sft_trainer` reads its model, and with it `external_lib`, in each rank before it looks for an engine, and "
        "saves the engine's checkpoint into `global_step_N` itself",
        "tests/test_sft_run.py::test_a_resumed_run_ends_with_the_same_weights_bit_for_bit",
    ),
    Behaviour(
        "receiver",
        _MODEL,
        "`_update_weights` with `base_sync_done=False` loads whole weights, also in an engine that runs adapters",
        "tests/test_sync_faults.py::test_rollout_agrees_with_the_trainer_after_every_update",
    ),
    Behaviour(
        "receiver",
        _MODEL,
        "`add_lora` with a `TensorLoRARequest` reaches verl's loader, `lora_b_stacked` holds B times alpha / r",
        "tests/test_sync_faults.py::test_rollout_agrees_with_the_trainer_after_every_update",
    ),
    Behaviour(
        "receiver",
        _MODEL,
        "q, k, v and gate, up lie in this order in one parameter, an embedding is padded at its end",
        "tests/test_sync_faults.py::test_merge_and_receiver_merge_leave_the_same_bits_in_vllm",
    ),
    Behaviour(
        "server",
        _PATCHES,
        "a server reads its model, which imports `external_lib`, and calls `_validate_configs` while it is made",
        "tests/test_sync_verl.py::test_a_server_of_verls_own_is_refused_for_a_hybrid_model_while_it_is_made",
    ),
    Behaviour(
        "server",
        _SERVER,
        "verl's `collective_rpc` forgets the workers' answers, and nothing in verl relies on that",
        "tests/test_sync_verl.py::test_server_still_has_what_ours_overrides",
    ),
    Behaviour(
        "server",
        _SERVER,
        "`generate` passes `_park_until_admitted`, which has counted a request when it returns None",
        "tests/test_sync_verl.py::test_nothing_is_admitted_while_weights_are_unproven_and_the_count_stays_right",
    ),
    Behaviour(
        "server",
        _SERVER,
        "`clear_kv_cache` resets the prefix cache and does not look at the answer",
        "tests/test_sync_verl.py::test_server_still_has_what_ours_overrides",
    ),
    Behaviour(
        "server",
        _SERVER,
        "a sleep at level 1 brings back all that was allocated while the model was loaded, at level 2 its buffers only",
        "tests/test_sync_faults.py::test_after_every_sleep_a_sync_leaves_the_right_weights",
    ),
    Behaviour(
        "server",
        _SERVER,
        "verl puts engines to sleep before a checkpoint is loaded, and wakes their weights before a sync and their "
        "cache after it",
        "tests/test_sync_verl.py::test_verl_still_wakes_weights_then_syncs_then_wakes_the_cache",
    ),
    Behaviour(
        "server",
        _SERVER,
        "`launch_server` returns when the engine can generate, before verl puts it to sleep",
        "tests/test_sync_verl.py::test_verl_still_launches_engines_before_it_puts_them_to_sleep",
    ),
    Behaviour(
        "server",
        _SERVER,
        "`resume_engine_generation` runs before verl opens the gate for requests",
        "tests/test_contracts.py::test_verl_still_resumes_its_engine_before_it_opens_the_gate",
    ),
    Behaviour(
        "probe",
        _POLICY,
        "a worker calls `lr_scheduler_step` once a step, after the last mini-batch",
        "tests/test_contracts.py::test_verl_still_steps_the_schedule_once_after_the_last_mini_batch",
    ),
    Behaviour(
        "probe",
        "verl_backend/probe/policy_dataset.py",
        "`data.custom_cls` replaces the dataset of training and of validation",
        "tests/test_probing_runs.py::test_held_out_prompts_wrap_verls_own_dataset",
    ),
    Behaviour(
        "cpu",
        _PATCHES,
        "verl asks for the version of the distribution `vllm`",
        "tests/test_cpu_platform.py::test_verl_still_asks_for_the_distribution_vllm",
    ),
    Behaviour(
        "cpu",
        _PATCHES,
        "verl builds `cpu:gloo,<device>:<backend>`, which torch refuses where both are gloo",
        "tests/test_cpu_platform.py::test_verl_still_builds_the_backend_string_that_torch_rejects",
    ),
    Behaviour(
        "cpu",
        _PATCHES,
        "verl asks FSDP1 for `sync_module_states=True`, which torch refuses for weights on the host",
        "tests/test_cpu_platform.py::test_verl_still_asks_fsdp1_to_broadcast_states_and_torch_refuses_it_on_the_host",
    ),
    Behaviour(
        "cpu",
        "verl_backend/patches.py",
        "vLLM calls `dispatch_cpu_unquantized_gemm` through its module, and `layer.cpu_linear` is what runs",
        "tests/test_cpu_platform.py::test_vllm_still_packs_cpu_weights_and_our_hook_keeps_them",
    ),
)
