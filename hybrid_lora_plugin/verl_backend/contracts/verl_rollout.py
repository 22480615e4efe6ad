"""verl's side of a rollout engine: the sending end of a sync, its metrics, and the server."""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.record import SYNC, Subject, behaviour, rows

_ADAPTER = "verl_backend/sender/server_adapter.py"
_MOVES = "verl_backend/zeroth_order_requirements.py"
_SOURCE = "verl_backend/sender/weight_source.py"
_PROMPT = "verl_backend/sender/logprob_prompt.py"
_PACKED = "verl_backend/packed_rows.py"
_TRANSPORT = "verl_backend/transport.py"
_PATCHES = "verl_backend/patches.py"
_WORKER = "verl_backend/receiver/worker.py"
_SERVER = "verl_backend/receiver/server.py"
_REPLICA = "verl_backend/receiver/replica.py"
_GENERATION = "verl_backend/generation.py"
_ROLLOUT = "verl.workers.rollout"
_VLLM_SERVER = f"{_ROLLOUT}.vllm_rollout.vllm_async_server"

SENDER = Subject(
    "Sending end of a weight sync",
    (
        *rows(
            SYNC,
            f"{_ROLLOUT}.vllm_rollout.vllm_rollout",
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
        *rows(
            SYNC,
            "verl.workers.config.rollout",
            "",
            ("RolloutConfig.checkpoint_engine", _ADAPTER, "node with the size of a bucket"),
            ("CheckpointEngineConfig.update_weights_bucket_megabytes", _ADAPTER, "size of a bucket"),
        ),
        *rows(SYNC, f"{_ROLLOUT}.utils", "", ("ensure_async_iterator", _ADAPTER, "takes streams of both kinds")),
        *rows(
            SYNC,
            f"{_ROLLOUT}.vllm_rollout.bucketed_weight_transfer",
            "BucketedWeightSender",
            ("", _TRANSPORT, "base class of the sender"),
            ("__init__", _TRANSPORT, "called with these", "zmq_handle bucket_size_mb use_shm"),
            ("zmq_context socket", _TRANSPORT, "where our limited socket goes"),
            ("_init_socket", _TRANSPORT, "makes the socket"),
            ("async_send_weights", _ADAPTER, "sends a stream", "weights"),
        ),
        *rows(
            SYNC,
            f"{_ROLLOUT}.vllm_rollout.bucketed_weight_transfer",
            "BucketedWeightReceiver",
            ("", _TRANSPORT, "base class of the receiver"),
            ("__init__", _TRANSPORT, "called with these", "zmq_handle device use_shm"),
            ("zmq_context socket", _TRANSPORT, "where our limited socket goes"),
            ("receive_weights", _WORKER, "calls back with each bucket", "on_bucket_received"),
        ),
        *rows(
            SYNC,
            "verl.utils.torch_dtypes",
            "PrecisionType",
            ("", (_SOURCE, _PROMPT, _PACKED, _MOVES), "names of types"),
            (
                "to_dtype",
                (_SOURCE, _PROMPT, _PACKED, _MOVES),
                "type of the rollout engine, and of the trainer's passes",
            ),
        ),
        *rows(
            SYNC,
            "torch.distributed.distributed_c10d",
            "",
            ("_get_default_store", _ADAPTER, "tells other ranks of a failure outside the collectives"),
        ),
        *rows(SYNC, "ray", "ObjectRef", ("future", _ADAPTER, "waits for the workers with a limit")),
    ),
    (
        behaviour(
            SYNC,
            _TRANSPORT,
            "sender and receiver take their socket from `zmq_context.socket`, acknowledgements are empty, and the "
            "last one goes out after the last callback",
            "tests/test_sync_verl.py::test_transport_still_waits_and_acknowledges_where_ours_looks",
        ),
        behaviour(
            SYNC,
            _ADAPTER,
            "`_execute_method(non_block=True)` returns a Ray reference to what the workers returned",
            "tests/test_sync_run.py::test_run_with_engines_apart_proves_its_syncs_and_ends_at_the_first_that_fails",
        ),
        behaviour(
            SYNC,
            _ADAPTER,
            "the default store has `set`, `get` and `check`, which work while other ranks wait in a collective",
            "tests/test_sync_ranks.py::test_all_ranks_end_long_before_the_limit_and_name_the_cause",
        ),
        behaviour(
            SYNC,
            _TRANSPORT,
            "buckets of verl's other checkpoint engines view each tensor by its type at any offset",
            "tests/test_sync_verl.py::test_verls_buckets_without_gaps_carry_a_sync",
        ),
        behaviour(
            "sparse_merge",
            _SOURCE,
            "no trainer adds a replica to a checkpoint engine manager while it runs",
            "tests/test_sync_verl.py::test_no_trainer_of_verl_lets_an_engine_join_a_run",
        ),
    ),
)

METRICS = Subject(
    "Metrics of a weight sync",
    (
        *rows(
            SYNC,
            "verl.trainer.ppo.v1.trainer_base",
            "",
            ("", _PATCHES, "module of the trainer"),
            ("PPOTrainer", _PATCHES, "the trainer"),
            ("PPOTrainer._consume_sync_metrics", _PATCHES, "what it returns is logged after a sync"),
            ("PPOTrainer.actor_rollout_wg", _PATCHES, "the workers that have the figures"),
        ),
        *rows(SYNC, "verl.single_controller.ray", "RayWorkerGroup", ("workers", _PATCHES, "their actors")),
        *rows(
            SYNC,
            "ray",
            "",
            ("", (_PATCHES, _SERVER), "the figures of every worker; the server's actor"),
            ("get", _PATCHES, "asks with a limit", "object_refs timeout"),
            ("exceptions.GetTimeoutError", _PATCHES, "a busy worker is no error"),
        ),
    ),
    (
        behaviour(
            SYNC,
            _PATCHES,
            "`fit` logs what `_consume_sync_metrics` returns, right after the sync of a step",
            "tests/test_sync_verl.py::test_metrics_of_a_sync_are_logged_with_its_step",
        ),
        behaviour(
            SYNC,
            _PATCHES,
            "every Ray actor has `__ray_call__`, which runs a function in its process",
            "tests/test_sync_run.py::test_run_with_engines_apart_proves_its_syncs_and_ends_at_the_first_that_fails",
        ),
    ),
)

SERVER = Subject(
    "The rollout server",
    (
        *rows("server", _VLLM_SERVER, "", ("", _PATCHES, "module of the server")),
        *rows(
            "server",
            _VLLM_SERVER,
            "vLLMHttpServer",
            ("", (_SERVER, _PATCHES), "base class of the server, and refused itself for a model under Hybrid-LoRA"),
            ("_validate_configs", _PATCHES, "called as soon as a server has read its model"),
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
        ),
        *rows(
            "server",
            _VLLM_SERVER,
            "vLLMReplica",
            ("", (_SERVER, _REPLICA), "base class of the replica, and itself for another model"),
            ("__init__", (_SERVER, _REPLICA), "how verl makes one", "replica_rank config model_config"),
            ("server_class", _SERVER, "the actor class it starts"),
            ("is_reward_model is_teacher_model", _SERVER, "these keep verl's own server"),
        ),
        *rows("server", "ray", "", ("remote", _SERVER, "makes an actor class of the server")),
        *rows(
            "server",
            "verl.workers.config.rollout",
            "RolloutConfig",
            ("free_cache_engine enable_sleep_mode", _SERVER, "whether a sleep frees memory"),
        ),
        *rows(
            "logprobs",
            "verl.workers.config.rollout",
            "RolloutConfig",
            ("dtype", _SERVER, "named in a refusal"),
            ("load_format", _SERVER, "whether the engine starts from the base model"),
            ("max_model_len", _SERVER, "longest fixed prompt"),
        ),
        *rows(
            "server",
            "vllm.v1.engine.async_llm",
            "AsyncLLM",
            ("collective_rpc", _SERVER, "answers of all workers", "method timeout args kwargs"),
            ("reset_prefix_cache", _SERVER, "answers whether it could", "reset_connector"),
            ("vllm_config", _SERVER, "whether there is a connector to reset"),
        ),
        *rows("adapter", "vllm.v1.engine.async_llm", "AsyncLLM", ("list_loras", _SERVER, "adapters that are loaded")),
        *rows(
            "logprobs",
            "vllm.v1.engine.async_llm",
            "AsyncLLM",
            (
                "generate",
                _SERVER,
                "log-probabilities of the fixed prompt",
                "prompt sampling_params request_id lora_request",
            ),
        ),
        *rows(
            "server",
            "vllm.config",
            "VllmConfig",
            ("kv_transfer_config", _SERVER, "whether there is a connector to reset"),
        ),
        # Named when the server's module is imported, so that nothing is served without them.
        *rows(
            "server logprobs evaluation",
            "vllm",
            "",
            ("SamplingParams", (_SERVER, _GENERATION), "what is drawn, and how", "temperature max_tokens"),
        ),
        *rows(
            "server logprobs evaluation",
            "vllm.inputs",
            "TokensPrompt",
            ("", (_SERVER, _GENERATION), "a prompt of tokens"),
        ),
        *rows(
            "server logprobs evaluation",
            "vllm.lora.request",
            "LoRARequest",
            ("", (_SERVER, _GENERATION), "generates with the adapter", "lora_name lora_int_id lora_path"),
        ),
        *rows(
            "logprobs",
            "vllm",
            "",
            ("SamplingParams.prompt_logprobs", _SERVER, "asks for them"),
            ("RequestOutput.prompt_logprobs", _SERVER, "where they are"),
        ),
        *rows("logprobs", "vllm.logprobs", "Logprob", ("logprob", _SERVER, "one of them")),
        *rows(
            "logprobs evaluation",
            "vllm.inputs",
            "TokensPrompt",
            ("prompt_token_ids", (_SERVER, _GENERATION), "its tokens"),
        ),
    ),
    (
        behaviour(
            "server",
            _PATCHES,
            "a server reads its model, which imports `external_lib`, and calls `_validate_configs` while it is made",
            "tests/test_sync_verl.py::test_a_server_of_verls_own_is_refused_for_a_hybrid_model_while_it_is_made",
        ),
        behaviour(
            "server",
            _SERVER,
            "verl's `collective_rpc` forgets the workers' answers, and nothing in verl relies on that",
            "tests/test_sync_verl.py::test_server_still_has_what_ours_overrides",
        ),
        behaviour(
            "server",
            _SERVER,
            "`generate` passes `_park_until_admitted`, which has counted a request when it returns None",
            "tests/test_sync_verl.py::test_nothing_is_admitted_while_weights_are_unproven_and_the_count_stays_right",
        ),
        behaviour(
            "server",
            _SERVER,
            "`clear_kv_cache` resets the prefix cache and does not look at the answer",
            "tests/test_sync_verl.py::test_server_still_has_what_ours_overrides",
        ),
        behaviour(
            "server",
            _SERVER,
            "a sleep at level 1 brings back all that was allocated while the model was loaded, at level 2 its buffers "
            "only",
            "tests/test_sync_faults.py::test_after_every_sleep_a_sync_leaves_the_right_weights",
        ),
        behaviour(
            "server",
            _SERVER,
            "verl puts engines to sleep before a checkpoint is loaded, and wakes their weights before a sync and their "
            "cache after it",
            "tests/test_sync_verl.py::test_verl_still_wakes_weights_then_syncs_then_wakes_the_cache",
        ),
        behaviour(
            "logprobs",
            _SERVER,
            "`launch_server` returns when the engine can generate, before verl puts it to sleep",
            "tests/test_sync_verl.py::test_verl_still_launches_engines_before_it_puts_them_to_sleep",
        ),
        behaviour(
            "logprobs",
            _SERVER,
            "`resume_engine_generation` runs before verl opens the gate for requests",
            "tests/test_contracts.py::test_verl_still_resumes_its_engine_before_it_opens_the_gate",
        ),
    ),
)
