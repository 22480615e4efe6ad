"""The receiving end of a sync: verl's worker extension, and vLLM's worker, layers and adapters."""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.record import SYNC, Contract, Subject, behaviour, rows

_WORKER = "verl_backend/receiver/worker.py"
_MODEL = "verl_backend/receiver/vllm_model.py"
_LAYOUT = "verl_backend/receiver/vllm_layout.py"
_SERVER = "verl_backend/receiver/server.py"
_PATCHES = "verl_backend/patches.py"
_VERL = "verl.workers.rollout.vllm_rollout.utils"
_WORKER_BASE = "vllm.v1.worker.worker_base"
_LINEAR = "vllm.model_executor.layers.linear"
_MODELS = "vllm.model_executor.models"


def _packed(module: str, kind: str, reason: str = "which modules are packed into one") -> list[Contract]:
    return rows(SYNC, f"{_MODELS}.{module}", kind, ("packed_modules_mapping", _LAYOUT, reason))


RECEIVER = Subject(
    "Receiving end of a weight sync",
    (
        *rows(
            f"server {SYNC}",
            _VERL,
            "",
            ("VLLM_LORA_INT_ID", (_MODEL, _SERVER), "number of the one adapter"),
            ("VLLM_LORA_NAME VLLM_LORA_PATH", (_MODEL, _SERVER), "its name and path"),
        ),
        *rows(
            SYNC,
            _VERL,
            "vLLMColocateWorkerExtension",
            ("", _WORKER, "base class of the worker's extension"),
            ("__new__", _WORKER, "where verl replaces vLLM's loader of adapters"),
            ("_get_zmq_handle", _WORKER, "address of the sender"),
            (
                "_update_weights",
                _MODEL,
                "loads named tensors into the live model",
                "weights peft_config base_sync_done",
            ),
            ("_iter_all_models_with_config", _MODEL, "models to finish after loading"),
        ),
        *rows(SYNC, "verl.utils.vllm", "TensorLoRARequest", ("", _MODEL, "an adapter in memory")),
        *rows(
            "adapter",
            "verl.utils.vllm",
            "TensorLoRARequest",
            ("peft_config lora_tensors", _MODEL, "its configuration and tensors"),
        ),
        *rows(
            SYNC,
            _WORKER_BASE,
            "WorkerBase",
            ("device", (_WORKER, _MODEL), "where buckets arrive"),
            ("local_rank", _WORKER, "device of a worker that names none"),
            ("rank", _MODEL, "which of the workers this is"),
            ("model_runner", _MODEL, "leads to the live model"),
            ("model_config vllm_config", _MODEL, "checkpoint, graphs, adapters"),
        ),
        *rows(
            "adapter",
            _WORKER_BASE,
            "WorkerBase",
            ("add_lora", _MODEL, "takes the adapter", "lora_request"),
            ("remove_lora", _MODEL, "drops the old one", "lora_id"),
            ("list_loras", _MODEL, "tells whether it is gone"),
        ),
        *rows(
            SYNC,
            "vllm.config",
            "",
            ("ModelConfig.model ModelConfig.revision", _MODEL, "folder of the checkpoint"),
            ("ModelConfig.hf_config", _MODEL, "whether the head is the embedding"),
            ("ModelConfig.enforce_eager", _MODEL, "whether graphs hold addresses of weights"),
            ("VllmConfig.lora_config", _MODEL, "whether the engine runs adapters"),
        ),
        *rows(
            "adapter receiver_merge",
            "vllm.config",
            "",
            ("VllmConfig.parallel_config", _MODEL, "how many workers read one checkpoint"),
            (
                "ParallelConfig.nnodes ParallelConfig.distributed_executor_backend ParallelConfig.world_size",
                _MODEL,
                "whether all workers are on one machine, and how many they are",
            ),
        ),
        *rows(SYNC, "vllm.v1.worker.gpu_model_runner", "GPUModelRunner", ("model", _MODEL, "the live model")),
        *rows("adapter", "vllm.v1.worker.gpu_model_runner", "GPUModelRunner", ("lora_manager", _MODEL, "its adapters")),
        # The second model runner: vLLM takes it by default for Llama and Qwen3.
        *rows(SYNC, "vllm.v1.worker.gpu.model_runner", "GPUModelRunner", ("model", _MODEL, "the live model")),
        *rows("adapter", "vllm.v1.worker.gpu.model_runner", "GPUModelRunner", ("lora_manager", _MODEL, "its adapters")),
        *rows(
            SYNC,
            _LINEAR,
            "",
            ("", _LAYOUT, "vLLM's linear layers"),
            ("QKVParallelLinear", _LAYOUT, "q, k and v in one parameter"),
            (
                "QKVParallelLinear.head_size QKVParallelLinear.v_head_size QKVParallelLinear.num_heads "
                "QKVParallelLinear.num_kv_heads QKVParallelLinear.total_num_heads "
                "QKVParallelLinear.total_num_kv_heads QKVParallelLinear.num_kv_head_replicas",
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
            ("RowParallelLinear.tp_rank", _LAYOUT, "which shard this is"),
        ),
        *rows("adapter", _LINEAR, "RowParallelLinear", ("input_size_per_partition", _LAYOUT, "columns of a shard")),
        *rows(
            SYNC,
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
        *_packed("qwen2", "Qwen2ForCausalLM"),
        *_packed("qwen3", "Qwen3ForCausalLM"),
        *_packed("llama", "LlamaForCausalLM"),
        *_packed("phi3", "Phi3ForCausalLM", "that its own weights are packed"),
        *_packed("glm4", "Glm4ForCausalLM", "into which adapters a packed one is cut"),
        *_packed("falcon_h1", "FalconH1ForCausalLM"),
        *rows(
            SYNC,
            f"{_MODELS}.falcon_h1",
            "FalconH1ForCausalLM",
            ("hf_to_vllm_mapper", _LAYOUT, "names that its loader replaces, mamba and A_log"),
        ),
        *rows(
            SYNC,
            f"{_MODELS}.utils",
            "WeightsMapper",
            ("orig_to_new_substr", _LAYOUT, "parts of names that a loader replaces"),
            ("orig_to_new_stacked", _LAYOUT, "into which module a loader stacks another, and at which places"),
        ),
        *rows(
            SYNC,
            "vllm.model_executor.model_loader.utils",
            "",
            (
                "process_weights_after_loading",
                _MODEL,
                "what vLLM does after a load",
                "model model_config target_device",
            ),
        ),
        *rows(
            "adapter",
            "vllm.lora.worker_manager",
            "",
            ("WorkerLoRAManager._adapter_manager", _MODEL, "leads to the adapter's live factors"),
            (
                "LRUCacheWorkerLoRAManager._load_adapter",
                _MODEL,
                "what verl replaces to take an adapter from memory",
                "lora_request",
            ),
        ),
        # verl 0.9.1 (utils/vllm/utils.py) calls it from vLLM 0.25 on, for every model with a map of names.
        Contract(
            ("adapter",),
            f"{_MODELS}.utils",
            "WeightsMapper.get_unstacked_mapper",
            (_PATCHES,),
            "map of names without packing, which verl asks for as it loads an adapter",
            also=("WeightsMapper.get_rename_mapper",),
            since="0.25.0",
        ),
        *rows(
            "adapter",
            "vllm.lora.model_manager",
            "LoRAModelManager",
            ("lora_index_to_id", _MODEL, "slot of the adapter"),
            ("modules", _MODEL, "layers with an adapter, by name"),
        ),
        *rows(
            "adapter",
            "vllm.lora.layers.base_linear",
            "BaseLinearLayerWithLoRA",
            ("lora_a_stacked", _LAYOUT, "live factor A by slot, read back"),
            ("lora_b_stacked", (_MODEL, _LAYOUT), "live factor B by slot, read back"),
            ("base_layer", _LAYOUT, "the layer inside"),
        ),
    ),
    (
        behaviour(
            SYNC,
            _WORKER,
            "neither vLLM's workers nor verl's extension have a method `receive_hybrid_weights`",
            "tests/test_sync_verl.py::test_extension_adds_no_name_that_vllm_or_verl_use",
        ),
        behaviour(
            SYNC,
            _MODEL,
            "`_update_weights` with `base_sync_done=False` loads whole weights, also in an engine that runs adapters",
            "tests/test_sync_faults.py::test_rollout_agrees_with_the_trainer_after_every_update",
        ),
        behaviour(
            "adapter",
            _MODEL,
            "`add_lora` with a `TensorLoRARequest` reaches verl's loader, `lora_b_stacked` holds B times alpha / r",
            "tests/test_sync_faults.py::test_rollout_agrees_with_the_trainer_after_every_update",
        ),
        behaviour(
            SYNC,
            _MODEL,
            "Mamba-2's in_proj and conv1d lie as in the checkpoint, and A is -exp(A_log) in float32",
            "tests/test_model_families.py::test_a_family_goes_all_the_way",
        ),
        # Its module imports torchvision, which runs of other models need not have.
        behaviour(
            SYNC,
            _LAYOUT,
            "`Qwen3_5Model` has a `hf_to_vllm_mapper` that stacks in_proj_qkv, z, b and a at the places in it",
            "tests/test_model_families.py::test_a_family_goes_all_the_way",
        ),
        behaviour(
            "adapter",
            _LAYOUT,
            "of the factors for a module that others are stacked into, one of several places needs all others beside "
            "it; zeros are none",
            "tests/test_model_families.py::test_a_family_goes_all_the_way",
        ),
        behaviour(
            SYNC,
            "model_families.py",
            "Mamba-2's gated norm gates first, whatever `mamba_norm_before_gate` says",
            "tests/test_gated_norm.py::test_vllm_gates_first_and_a_config_that_says_otherwise_is_refused",
        ),
        behaviour(
            SYNC,
            _MODEL,
            "q, k, v and gate, up lie in this order in one parameter, an embedding is padded at its end",
            "tests/test_sync_faults.py::test_merge_and_receiver_merge_leave_the_same_bits_in_vllm",
        ),
    ),
)
