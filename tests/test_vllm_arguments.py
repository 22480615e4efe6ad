"""``rollout.engine_kwargs.vllm`` goes to vLLM last: what is known as harmless passes, the rest is refused by name."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.verl_backend import vllm_arguments
from hybrid_lora_plugin.verl_backend.vllm_arguments import check_vllm_arguments

#: what recipes of verl and of its users set
HARMLESS = {
    "disable_mm_preprocessor_cache": True,
    "mm_processor_cache_gb": 0,
    "limit_mm_per_prompt": {"image": 2},
    "distributed_executor_backend": "mp",
    "attention_backend": "FLASH_ATTN",
    "disable_cascade_attn": True,
    "compilation_config": {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [8, 16]},
    "kernel_config": {"enable_flashinfer_autotune": False},
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "max_num_seqs": 64,
    "max_model_len": 2048,
    "seed": 1701,
    "enforce_eager": True,
    "num_gpu_blocks_override": 64,
    "swap_space": 8,
    "max-logprobs": 20,
    "async_scheduling": False,
    "enable_prefix_caching": False,
}
#: with what the message names as a way out
REFUSED = {
    "quantization": ("fp8", "rollout.quantization"),
    "quantization_config": ({"method": "fp8"}, "null"),
    "pipeline_parallel_size": (2, "give 1"),
    "data_parallel_size": (2, "give 1"),
    "data-parallel-size": (2, "give 1"),
    "tensor_parallel_size": (2, "rollout.tensor_model_parallel_size"),
    "decode_context_parallel_size": (2, "give 1"),
    "enable_expert_parallel": (True, "rollout.expert_parallel_size"),
    "dtype": ("float16", "rollout.dtype"),
    "load_format": ("dummy", "rollout.load_format"),
    "model_loader_extra_config": ({}, "null"),
    "cpu_offload_gb": (4, "null"),
    "kv_cache_dtype": ("fp8", "give auto"),
    "speculative_config": ({"method": "ngram"}, "null"),
    "hf_overrides": ({"num_hidden_layers": 1}, "rope_scaling"),
    "model_impl": ("transformers", "null"),
    "worker_cls": ("a.B", "null"),
    "worker_extension_cls": ("a.B", "null"),
    "distributed_executor_backend": ("my.Executor", "mp or uni or ray"),
    "kernel_config": ({"linear_backend": "marlin"}, "enable_flashinfer_autotune"),
    "enable_lora": (True, "hybrid_lora.sync"),
    "kv_transfer_config": ({"kv_connector": "X"}, "null"),
    "enable_sleep_mode": (False, "rollout.enable_sleep_mode"),
    "of_a_version_to_come": (1, "null"),
}


@pytest.mark.parametrize("arguments", [None, {}, HARMLESS, {"quantization": None}, {"data_parallel_size": 1}])
def test_harmless_arguments_and_nulls_pass(arguments):
    check_vllm_arguments(arguments)


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_may_touch_weights_or_workers_is_refused_by_name(name):
    value, way_out = REFUSED[name]
    with pytest.raises(ConfigurationError) as caught:
        check_vllm_arguments(HARMLESS | {name: value})
    message = str(caught.value)
    assert "\n" not in message and f"engine_kwargs.vllm.{name}: {value!r}" in message and way_out in message


def test_positions_may_be_changed_at_both_ends_alike_and_not_at_one():
    yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    check_vllm_arguments({"hf_overrides": yarn}, yarn | {"attn_implementation": "sdpa"})
    check_vllm_arguments({"hf_overrides": '{"rope_theta": 1e6}'}, {"rope_theta": 1000000.0})
    for mine in ({}, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}):
        with pytest.raises(ConfigurationError, match="hf_overrides.*actor_rollout_ref.model.override_config"):
            check_vllm_arguments({"hf_overrides": yarn}, mine)


def test_a_long_value_is_cut():
    with pytest.raises(ConfigurationError) as caught:
        check_vllm_arguments({"additional_config": {"x": "y" * 5000}})
    assert len(str(caught.value)) < 600


def fields_of_vllm() -> set[str]:
    """Every argument of the installed vLLM, read from its source: importing it takes half a minute."""
    folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    files = {"engine/arg_utils.py": "EngineArgs", "entrypoints/openai/cli_args.py": "FrontendArgs"}
    found = set()
    for file, last in files.items():
        for node in ast.parse((folder / file).read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(last):
                found |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
    return found


#: renamed or removed before vLLM 0.28, in other versions that verl 0.9.1 runs with
OLDER = set(
    """
    swap_space max_num_partial_prefills max_long_partial_prefills max_seq_len_to_capture num_scheduler_steps
    multi_step_stream_outputs disable_async_output_proc preemption_mode cuda_graph_sizes guided_decoding_backend
    disable_mm_preprocessor_cache disable_log_requests
    """.split()
)


def test_names_allowed_are_arguments_of_vllm():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    named = vllm_arguments._ALLOWED | set(vllm_arguments._VALUES) | set(vllm_arguments._PARTS) | {"hf_overrides"}
    fields = fields_of_vllm()
    assert named - fields == OLDER
    # No type or place of weights among them, and no number of workers.
    words = "quant load_format loader parallel_size dtype lora offload weight expert revision worker_".split()
    assert [name for name in vllm_arguments._ALLOWED if any(word in name for word in words)] == []


@pytest.mark.verl
def test_verl_still_puts_them_behind_its_own_arguments():
    server = pytest.importorskip("verl.workers.rollout.vllm_rollout.vllm_async_server")
    source = inspect.getsource(server.vLLMHttpServer.launch_server)
    assert source.index('"quantization": quantization') < source.index("**engine_kwargs,")
    assert "val is not None" in source
