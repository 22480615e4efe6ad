"""verl's FSDP engine and torch's FSDP, which ``engine.py`` and ``probe/policy_engine.py`` change."""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.record import SYNC, Subject, behaviour, rows

_ENGINE = "verl_backend/engine.py"
_PIECES = "training/flat_pieces.py"
_ENGINES = "verl_backend/engine_registration.py"
_POLICY = "verl_backend/probe/policy_engine.py"
_SFT = "verl_backend/probe/sft.py"
_ADAPTER = "verl_backend/sender/server_adapter.py"
_SOURCE = "verl_backend/sender/weight_source.py"
_PROMPT = "verl_backend/sender/logprob_prompt.py"
_PACKED = "verl_backend/packed_rows.py"
_ROWS = "verl_backend/row_log_probs.py"
_SURROGATE = "verl_backend/surrogate.py"
_SERVER = "verl_backend/receiver/server.py"
_REQUIREMENTS = "verl_backend/requirements.py"
_REFERENCE = "training/reference.py"
_CHECKPOINTS = "verl_backend/engine_checkpoints.py"
_PATCHES = "verl_backend/patches.py"
_HF_OUTPUT = "verl_backend/hugging_face_output.py"
_BOTH_ENGINES = (_ENGINE, _POLICY)
_CONFIG = "verl.workers.config"

ENGINE = Subject(
    "The engine that trains",
    (
        *rows(
            "engine",
            f"{_CONFIG}.model",
            "HFModelConfig",
            ("path", (_CHECKPOINTS, _POLICY), "base model, recorded with a checkpoint and an artifact"),
            ("local_path", (_ENGINE, _HF_OUTPUT, _POLICY, _SFT), "folder whose weight files are read"),
            (
                "hf_config",
                (_ENGINE, _PACKED),
                "tells a model that is refused before its weights are read; its vocabulary",
            ),
            ("use_remove_padding", (_PACKED, _PROMPT), "whether rows are packed"),
            ("use_fused_kernels", _ROWS, "how a few rows are passed"),
            (
                "lora",
                (_ENGINES, _REQUIREMENTS, _SOURCE, _ADAPTER, _SERVER),
                "carries the hybrid_lora node to every worker",
            ),
            ("lora_rank lora_alpha", (_ENGINE, _REQUIREMENTS, _SOURCE), "rank and alpha of the adapters"),
            ("lora_adapter_path target_modules", _REQUIREMENTS, "refused where they say something else"),
        ),
        *rows(
            "probe policy_probe checkpoint",
            f"{_CONFIG}.model",
            "HFModelConfig",
            ("trust_remote_code", (_HF_OUTPUT, _POLICY, _SFT), "passed on to the probe, and for hf_model"),
        ),
        *rows(
            "logprobs checkpoint",
            f"{_CONFIG}.model",
            "HFModelConfig",
            ("tokenizer", (_PROMPT, _SERVER, _HF_OUTPUT), "encodes the fixed prompts; its chat template is saved"),
        ),
        *rows(
            "engine",
            f"{_CONFIG}.engine",
            "FSDPEngineConfig",
            ("strategy", (_ENGINE, _REQUIREMENTS), "fsdp and fsdp2 are supported"),
            ("fsdp_size", _ENGINE, "FSDP1 in groups of one is refused"),
            ("ulysses_sequence_parallel_size", _ENGINE, "refused above 1 with recurrent layers"),
            ("forward_only", _ENGINE, "a reference policy of its own keeps no snapshot"),
            ("model_dtype", (_ENGINE, _REQUIREMENTS), "set to the type of frozen weights"),
            (
                "mixed_precision",
                (_REQUIREMENTS, _PACKED, _PROMPT),
                "its param_dtype is checked; whether the trainer rounds",
            ),
        ),
        *rows(
            "engine",
            f"{_CONFIG}.optimizer",
            "",
            ("FSDPOptimizerConfig.lr", _ENGINE, "learning rate of the LoRA group"),
            ("build_optimizer", _BOTH_ENGINES, "takes parameter groups", "parameters config"),
        ),
        *rows(
            "checkpoint",
            "verl.trainer.config",
            "CheckpointConfig",
            ("save_lora_only", _REQUIREMENTS, "refused: full modules would be lost"),
        ),
        *rows(
            "engine",
            "verl.workers.engine",
            "FSDPEngineWithLMHead",
            ("", (_ENGINE, _POLICY, _ENGINES), "base class of both engines"),
            (
                "__init__",
                (_ENGINE, _POLICY, _ENGINES),
                "how a worker makes an engine",
                "model_config engine_config optimizer_config checkpoint_config",
            ),
            ("initialize", (_ENGINE, _CHECKPOINTS), "called before anything is built, so a probe has the memory"),
            ("_build_module", _ENGINE, "loads the model in engine_config.model_dtype"),
            ("_build_lora_module", _BOTH_ENGINES, "hook where the model gets its adapters", "module"),
            ("_build_fsdp_module", _ENGINE, "wraps what the hook above returned", "module"),
            ("_build_optimizer", _BOTH_ENGINES, "hook for two parameter groups", "module"),
            (
                "train_batch",
                (*_BOTH_ENGINES, _CHECKPOINTS),
                "one mini-batch; its metrics are added to",
                "data loss_function",
            ),
            ("optimizer_step", _ENGINE, "clips and steps; norms are taken around it"),
            ("is_mp_src_rank_with_outputs", _BOTH_ENGINES, "whether this rank has metrics"),
            ("to", _ENGINE, "moves the snapshot of the base along", "device model optimizer grad"),
            ("disable_adapter", _BOTH_ENGINES, "the reference policy"),
            ("rank", _BOTH_ENGINES, "rank 0 writes and prints"),
            ("module", _BOTH_ENGINES, "the wrapped model"),
            ("optimizer", _ENGINE, "its groups"),
            ("lr_scheduler", (_ENGINE, _CHECKPOINTS), "the schedule, where it is and what a resumed run goes on with"),
            ("model_config", _BOTH_ENGINES, "the model's settings"),
            ("engine_config", _ENGINE, "the strategy's settings; replaced while the model loads"),
            ("optimizer_config", _BOTH_ENGINES, "passed to build_optimizer"),
            ("_is_offload_param", _ENGINE, "whether FSDP1's weights lie on the host"),
            (
                "infer_batch",
                (_ROWS, _ENGINE),
                "log-probabilities of a few rows; the loss of a mini-batch",
                "data loss_function",
            ),
            ("eval_mode", (_PACKED, _PROMPT), "around that pass"),
        ),
        *rows(
            "engine",
            "verl.utils.tensordict_utils",
            "",
            ("", (_ROWS, _ENGINE), "batches as verl's engine takes them"),
            ("assign_non_tensor", _ENGINE, "a setting of a batch", "tensor_dict"),
            ("get_tensordict", _ROWS, "makes a batch", "tensor_dict non_tensor_dict"),
        ),
        *rows(
            "engine",
            "verl.workers.utils.padding",
            "",
            ("no_padding_2_padding", (_ROWS, _SURROGATE), "log-probabilities of the answer"),
        ),
        *rows(
            "engine",
            "verl.utils.ulysses",
            "",
            ("get_ulysses_sequence_parallel_group", _ROWS, "the ranks that split a row"),
            ("set_ulysses_sequence_parallel_group", _ROWS, "none of them, where rows are whole on each", "group"),
        ),
        *rows(
            "policy_probe",
            "verl.workers.engine",
            "FSDPEngineWithLMHead",
            ("_build_lr_scheduler", _POLICY, "hook for a constant rate", "optimizer"),
            (
                "forward_backward_batch",
                _POLICY,
                "gradients of a mini-batch without a step",
                "data loss_function forward_only",
            ),
            ("optimizer_zero_grad", _POLICY, "clears gradients between masks"),
            ("lr_scheduler_step", _POLICY, "tells that a step is over"),
        ),
        *rows(
            "engine policy_probe",
            "verl.workers.engine",
            "FSDPEngineWithLMHead",
            ("_autocast_dtype", _BOTH_ENGINES, "what forward passes compute in"),
        ),
        *rows(
            SYNC,
            "verl.workers.engine",
            "FSDPEngineWithLMHead",
            ("get_per_tensor_param", _BOTH_ENGINES, "the stream of a weight sync", "layered_summon base_sync_done"),
        ),
        *rows(
            "checkpoint",
            "verl.workers.engine",
            "FSDPEngineWithLMHead",
            (
                "save_checkpoint",
                (_CHECKPOINTS, _POLICY),
                "adds the trained weights or the state of a probe",
                "local_path hdfs_path global_step max_ckpt_to_keep",
            ),
            (
                "load_checkpoint",
                (_CHECKPOINTS, _POLICY),
                "refuses a checkpoint of another setting",
                "local_path hdfs_path del_local_after_load",
            ),
            ("_is_offload_optimizer", _CHECKPOINTS, "whether a resumed state belongs on the host"),
            (
                "checkpoint_manager",
                _CHECKPOINTS,
                "which of a checkpoint's files a resume reads; saves no hf_model",
            ),
        ),
        *rows(
            "checkpoint",
            "verl.utils.checkpoint.checkpoint_manager",
            "BaseCheckpointManager",
            ("should_load_model should_load_optimizer should_load_extra", _CHECKPOINTS, "which files a resume reads"),
            ("checkpoint_load_contents", _CHECKPOINTS, "whether a resume reads weights"),
            ("checkpoint_save_contents", _HF_OUTPUT, "what verl saves; hf_model is taken out and saved by the engine"),
        ),
        *rows(
            "checkpoint",
            "verl.utils.tracking",
            "",
            ("", _PATCHES, "module whose import adds a logger to those of a run"),
            (
                "Tracking.__init__",
                _PATCHES,
                "is given the whole configuration",
                "project_name experiment_name default_backend config",
            ),
            ("Tracking.logger", _PATCHES, "loggers by name, each called with the metrics of a step"),
        ),
        *rows(
            "engine",
            "verl.utils.fsdp_utils",
            "",
            ("fsdp_version", _ENGINE, "FSDP1 or FSDP2", "model"),
            ("load_fsdp_model_to_gpu", _ENGINE, "FSDP1 gathers nothing from the host", "model"),
            ("offload_fsdp_model_to_cpu", _ENGINE, "and back", "model"),
            ("offload_fsdp_optimizer", _CHECKPOINTS, "for a resumed state that belongs on the host", "optimizer"),
        ),
        *rows(
            "engine",
            "torch.distributed.fsdp",
            "FullyShardedDataParallel",
            ("_handle", (_ENGINE, _PIECES), "FSDP1's flat parameter, resharded around the reference policy"),
            ("_is_root", _ENGINE, "None until the first forward pass, before which there is no shard to go back to"),
            ("sharding_strategy process_group", _ENGINE, "the ranks that share one copy"),
        ),
        *rows(
            "engine",
            "torch.distributed.fsdp._flat_param",
            "FlatParamHandle",
            ("uses_sharded_strategy", _ENGINE, "whether there is something to reshard"),
            ("reshard", _ENGINE, "frees the gathered copy", "free_unsharded_flat_param"),
            ("flat_param", _PIECES, "what a rank holds of a unit, for the metric of what arrived"),
        ),
        *rows(
            "engine",
            "torch.distributed.fsdp._flat_param",
            "FlatParameter",
            ("_shard_param_infos _fqns _params", _PIECES, "which parameters a rank's piece is of, and where it begins"),
        ),
        *rows(
            "engine",
            "torch.distributed.fsdp._flat_param",
            "_ShardParamInfo",
            ("in_shard offset_in_shard numel_in_shard intra_param_start_idx", _PIECES, "where that lies"),
        ),
        *rows("engine", "torch", "", ("_foreach_norm", "training/dtensor.py", "norms of many shards in one call")),
    ),
    (
        behaviour(
            "engine",
            _ENGINE,
            "`_build_module` casts the model it loaded with one `module.to(dtype)`",
            "tests/test_training_verl.py::test_verl_still_casts_the_whole_model_while_it_builds_it",
        ),
        behaviour(
            "engine",
            _ENGINE,
            "`_build_module` reads `engine_config.model_dtype` when it is called",
            "tests/test_sharding.py::test_what_trains_is_fp32_and_what_is_frozen_keeps_the_checkpoints_type",
        ),
        behaviour(
            "engine",
            _ENGINE,
            "`_build_lora_module` is called with the plain model, and its result goes to `_build_fsdp_module`",
            "tests/test_engine.py::test_trainables_are_fp32_and_exactly_the_allocations",
        ),
        behaviour(
            "engine",
            _ENGINE,
            "`optimizer_step` clips, steps and returns the norm",
            "tests/test_engine.py::test_each_kind_of_module_has_its_own_learning_rate_and_gradient_norm",
        ),
        behaviour(
            "engine",
            _ENGINE,
            "every metric of `train_batch` but grad_norm, lr and loss is a list, which the worker chains over ranks",
            "tests/test_sync_run.py::test_run_with_engines_apart_proves_its_syncs_and_ends_at_the_first_that_fails",
        ),
        behaviour(
            SYNC,
            _ENGINE,
            "`get_per_tensor_param` returns a stream and an adapter's configuration; None makes verl send merged "
            "weights",
            "tests/test_engine.py::test_synced_weights_are_the_fp32_merge_of_the_untouched_base",
        ),
        behaviour(
            "checkpoint",
            _HF_OUTPUT,
            "the checkpoint manager writes configuration and tokenizer to `huggingface`, and no weights without "
            "`hf_model`",
            "tests/test_engine.py::test_hf_model_in_a_checkpoint_is_what_the_export_writes",
        ),
        behaviour(
            "checkpoint",
            _HF_OUTPUT,
            "the merger reads `world_size` in `fsdp_config.json` and puts it into the name of the first file that it "
            "opens",
            "tests/test_engine.py::test_verls_merger_ends_with_a_line_that_names_the_export",
        ),
        behaviour(
            "checkpoint",
            _PATCHES,
            "`Tracking.log` calls each logger with `data` and `step`; a validation is logged with the step it is of",
            "tests/test_validation_log.py::test_a_tracking_of_verls_keeps_the_best_checkpoint",
        ),
        behaviour(
            "checkpoint",
            "verl_backend/checkpoint_retention.py",
            "the manager deletes nothing without a limit, and the trainer writes its tracker after the engine's save",
            "tests/test_validation_log.py::test_verl_still_writes_its_tracker_last",
        ),
        behaviour(
            "checkpoint",
            "verl_backend/earlier_checkpoint.py",
            "shards are named by kind, number of ranks and rank; a LoRA run adds `lora_train_meta.json`",
            "tests/test_own_disks.py::test_a_checkpoint_of_a_run_without_hybrid_lora_is_refused_before_ray",
        ),
        behaviour(
            "engine",
            "verl_backend/run_kinds.py",
            "`sft_trainer` reads its model, and with it `external_lib`, in each rank before it looks for an engine, "
            "and saves the engine's checkpoint into `global_step_N` itself",
            "tests/test_sft_run.py::test_a_resumed_run_ends_with_the_same_weights_bit_for_bit",
        ),
        behaviour(
            "engine",
            _ENGINE,
            "FSDP1 keeps a gathered copy until its handle reshards",
            "tests/test_sharding.py::test_reference_is_the_base_model",
        ),
        behaviour(
            "engine",
            _ENGINE,
            "FSDP1 gathers nothing before it knows which unit is the root",
            "tests/test_first_pass.py::test_every_order_of_first_passes_trains_to_the_same_bits",
        ),
        behaviour(
            "engine",
            _REFERENCE,
            "FSDP2 settles the type of its reductions at the first forward pass, from what requires a gradient then",
            "tests/test_first_pass.py::test_fsdp2_still_settles_how_it_reduces_at_the_first_forward_pass",
        ),
    ),
)
