"""Contracts with verl that training relies on: each fails when they change under it."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("verl", reason="verl is not installed")

from verl.workers.engine import FSDPEngineWithLMHead  # noqa: E402

from hybrid_lora_plugin.verl_backend.patches import only_parameters_cast  # noqa: E402


def test_verl_still_casts_the_whole_model_while_it_builds_it():
    assert "module.to(torch_dtype)" in inspect.getsource(FSDPEngineWithLMHead._build_module)


def test_casting_parameters_leaves_the_frequencies_of_rope(tiny_qwen2):
    plain = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    frequencies = plain.model.rotary_emb.inv_freq.clone()
    with only_parameters_cast():
        held = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.bfloat16).to(torch.bfloat16)
    assert {p.dtype for p in held.parameters()} == {torch.bfloat16}
    assert torch.equal(held.model.rotary_emb.inv_freq, frequencies)
    assert held.model.rotary_emb.inv_freq.dtype == torch.float32
    # What it is there for, and gone outside.
    rounded = plain.to(torch.bfloat16).model.rotary_emb.inv_freq
    assert rounded.dtype == torch.bfloat16 and not torch.equal(rounded.float(), frequencies)
