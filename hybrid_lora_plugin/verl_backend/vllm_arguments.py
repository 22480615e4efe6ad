"""Arguments that ``rollout.engine_kwargs.vllm`` may hand to vLLM (verl 0.9.1
``workers/rollout/vllm_rollout/vllm_async_server.py:launch_server``).

verl puts them behind its own arguments, so they win over settings that were checked: a run could be refused
``rollout.quantization=fp8`` and get it here. Allowed is what is known to leave alone the weights, how they are loaded,
how they lie in memory and over which workers; everything else is refused by name, of later versions too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError

NODE = "actor_rollout_ref.rollout.engine_kwargs.vllm"

#: scheduling, memory for keys and values, kernels of attention, graphs, sampling, multimodal input, tools, HTTP, logs;
#: read in vLLM 0.28 (``engine/arg_utils.py``, ``entrypoints/openai/cli_args.py``), with older names of the same
_ALLOWED = frozenset(
    """
    seed distributed_timeout_seconds cpu_distributed_timeout_seconds numa_bind numa_bind_nodes numa_bind_cpus
    disable_custom_all_reduce fail_on_environ_validation shutdown_timeout

    max_model_len max_num_seqs max_num_batched_tokens max_num_scheduled_tokens max_num_partial_prefills
    max_long_partial_prefills long_prefill_token_threshold max_seq_len_to_capture enable_chunked_prefill
    disable_chunked_mm_input scheduling_policy scheduler_reserve_full_isl prefill_schedule_interval watermark
    async_scheduling stream_interval num_scheduler_steps multi_step_stream_outputs disable_async_output_proc
    preemption_mode performance_mode

    gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override block_size swap_space
    enable_prefix_caching prefix_caching_hash_algo disable_hybrid_kv_cache_manager

    attention_backend attention_config disable_cascade_attn disable_sliding_window mm_encoder_attn_backend
    enforce_eager compilation_config optimization_level cudagraph_capture_sizes max_cudagraph_capture_size
    cuda_graph_sizes enable_flashinfer_autotune use_fp64_gumbel

    max_logprobs logprobs_mode generation_config override_generation_config structured_outputs_config
    guided_decoding_backend reasoning_config

    disable_mm_preprocessor_cache mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb
    mm_processor_kwargs media_io_kwargs limit_mm_per_prompt interleave_mm_strings skip_mm_profiling
    allowed_local_media_path allowed_media_domains

    chat_template chat_template_content_format default_chat_template_kwargs trust_request_chat_template response_role
    enable_auto_tool_choice exclude_tools_when_tool_choice_none tool_call_parser tool_parser_plugin tool_server
    reasoning_parser reasoning_parser_plugin return_tokens_as_token_ids enable_prompt_tokens_details
    served_model_name uvicorn_log_level disable_uvicorn_access_log disable_fastapi_docs enable_request_id_headers
    h11_max_incomplete_event_size h11_max_header_count

    disable_log_stats disable_log_requests enable_log_requests enable_log_outputs enable_log_deltas max_log_len
    log_config_file log_error_stack use_tqdm_on_load aggregate_engine_logging enable_logging_iteration_details
    show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces kv_cache_metrics
    kv_cache_metrics_sample cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics
    enable_mm_processor_stats enable_server_load_tracking enable_per_request_metrics profiler_config
    """.split()
)
#: allowed with these values only, which are those that vLLM has anyway or that keep workers as verl counts them
_VALUES: dict[str, tuple[Any, ...]] = {
    "distributed_executor_backend": ("mp", "uni", "ray"),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "prefill_context_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "kv_cache_dtype": ("auto",),
}
#: allowed with these parts only
_PARTS: dict[str, frozenset[str]] = {"kernel_config": frozenset({"enable_flashinfer_autotune", "ir_op_priority"})}
#: parts of ``hf_overrides`` that change positions and no weight; the trainer needs the same
_POSITIONS = frozenset({"rope_scaling", "rope_theta", "rope_parameters", "max_position_embeddings"})
#: verl's own setting of the same thing, which is checked, or from which the plugin learns what it has to send
_INSTEAD = {
    "quantization": "actor_rollout_ref.rollout.quantization",
    "dtype": "actor_rollout_ref.rollout.dtype",
    "load_format": "actor_rollout_ref.rollout.load_format",
    "tensor_parallel_size": "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "pipeline_parallel_size": "actor_rollout_ref.rollout.pipeline_model_parallel_size",
    "data_parallel_size": "actor_rollout_ref.rollout.data_parallel_size",
    "enable_expert_parallel": "actor_rollout_ref.rollout.expert_parallel_size",
    "enable_sleep_mode": "actor_rollout_ref.rollout.enable_sleep_mode",
    "trust_remote_code": "actor_rollout_ref.model.trust_remote_code",
    "model": "actor_rollout_ref.model.path",
    "tokenizer": "actor_rollout_ref.model.tokenizer_path",
    "enable_lora": "hybrid_lora.sync",
    "max_lora_rank": "hybrid_lora.lora.rank",
    "hf_overrides": "actor_rollout_ref.model.override_config",
}


def check_vllm_arguments(arguments: Mapping[str, Any] | None, model_overrides: Mapping[str, Any] | None = None) -> None:
    """Refuse the first argument of vLLM that is not known to leave weights and workers alone.

    Args:
        arguments: ``rollout.engine_kwargs.vllm``; one that is null is dropped by verl too.
        model_overrides: ``model.override_config``, what the trainer's model is changed by.

    Raises:
        ConfigurationError: naming the argument, its value and the way out.
    """
    for name, value in (arguments or {}).items():
        # vLLM takes either spelling.
        plain = str(name).replace("-", "_")
        if value is None or plain in _ALLOWED or value in _VALUES.get(plain, ()):
            continue
        if plain in _PARTS and isinstance(value, Mapping) and set(value) <= _PARTS[plain]:
            continue
        if plain == "hf_overrides" and _same_positions(value, model_overrides or {}):
            continue
        raise ConfigurationError(
            f"{NODE}.{name}: {value!r:.120} goes to vLLM past all checks, and it is not known to leave weights and "
            f"workers as a sync needs them; give {_way_out(plain)}",
            see="argument-of-vllm-not-supported",
        )


def _same_positions(value: Any, model_overrides: Mapping[str, Any]) -> bool:
    """Whether ``hf_overrides`` changes positions alone, and those of the trainer's model in the same way."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    if not isinstance(value, Mapping):
        return False
    return all(name in _POSITIONS and model_overrides.get(name) == wanted for name, wanted in value.items())


def _way_out(name: str) -> str:
    if name in _VALUES:
        listed = " or ".join(map(str, _VALUES[name]))
        return f"{listed}, or null"
    if name in _PARTS:
        return f"no more than {', '.join(sorted(_PARTS[name]))} in it, or null"
    if name == "hf_overrides":
        listed = ", ".join(sorted(_POSITIONS))
        return f"no more than {listed} in it, each as in {_INSTEAD[name]}: both models must compute alike"
    return f"null and use {_INSTEAD[name]}" if name in _INSTEAD else "null"
