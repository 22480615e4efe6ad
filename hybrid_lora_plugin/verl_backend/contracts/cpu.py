"""What a run without an accelerator needs of verl, torch and vLLM."""

from __future__ import annotations

from hybrid_lora_plugin.verl_backend.contracts.record import Contract, Subject, behaviour, rows

_PLATFORM = "verl_backend/cpu/platform.py"
_PATCHES = "verl_backend/patches.py"

CPU = Subject(
    "Runs without an accelerator",
    (
        *rows(
            "cpu",
            "verl.plugin.platform.platform_manager",
            "PlatformRegistry",
            ("", _PLATFORM, "registry of platforms"),
            ("register", _PLATFORM, "puts ours there", "platform"),
        ),
        *rows(
            "cpu",
            "verl.plugin.platform.platform_base",
            "PlatformBase",
            ("", _PLATFORM, "base class of the platform"),
            ("device_name vendor_name device_module", _PLATFORM, "what verl calls the device"),
            (
                "is_available current_device device_count empty_cache communication_backend_name "
                "visible_devices_envvar profiler_start profiler_stop ray_resource_name ray_noset_envvars "
                "is_ipc_supported cudart",
                _PLATFORM,
                "verl's interface of a platform",
            ),
            (
                "set_device synchronize get_device_capability",
                _PLATFORM,
                "verl's interface of a platform",
                "device_index",
            ),
            ("manual_seed manual_seed_all", _PLATFORM, "verl's interface of a platform", "seed"),
            ("set_allocator_settings", _PLATFORM, "verl's interface of a platform", "settings"),
            ("nvtx_range", _PLATFORM, "verl's interface of a platform", "msg"),
            ("ray_resource_options", _PLATFORM, "verl's interface of a platform", "num_gpus"),
        ),
        *rows(
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
        *rows(
            "cpu",
            "vllm.model_executor.layers.utils",
            "",
            ("", _PATCHES, "module of the CPU linear"),
            ("dispatch_cpu_unquantized_gemm", _PATCHES, "packs a weight and empties it", "layer remove_weight"),
        ),
        Contract(
            ("cpu",),
            "vllm.plugins",
            "",
            (_PATCHES,),
            "group of entry points that vLLM loads in each of its processes",
            constant="vllm.general_plugins",
        ),
    ),
    (
        behaviour(
            "cpu",
            _PATCHES,
            "verl asks for the version of the distribution `vllm`",
            "tests/test_cpu_platform.py::test_verl_still_asks_for_the_distribution_vllm",
        ),
        behaviour(
            "cpu",
            _PATCHES,
            "verl builds `cpu:gloo,<device>:<backend>`, which torch refuses where both are gloo",
            "tests/test_cpu_platform.py::test_verl_still_builds_the_backend_string_that_torch_rejects",
        ),
        behaviour(
            "cpu",
            _PATCHES,
            "verl asks FSDP1 for `sync_module_states=True`, which torch refuses for weights on the host",
            "tests/test_cpu_platform.py::"
            "test_verl_still_asks_fsdp1_to_broadcast_states_and_torch_refuses_it_on_the_host",
        ),
        behaviour(
            "cpu",
            _PATCHES,
            "vLLM calls `dispatch_cpu_unquantized_gemm` through its module, and `layer.cpu_linear` is what runs",
            "tests/test_cpu_platform.py::test_vllm_still_packs_cpu_weights_and_our_hook_keeps_them",
        ),
    ),
)
