"""Which modules are candidates, and when two models count as the same."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from hybrid_lora_plugin.candidates import (
    architecture_of,
    find_candidates,
    find_candidates_from_config,
    model_fingerprint,
)
from hybrid_lora_plugin.errors import ConfigurationError
from tests.support.drawn_allocations import TYPES
from tests.support.tiny_models import tiny_qwen2_config

QWEN25 = {
    # hidden, intermediate, layers, heads, kv heads -> candidate parameters, modules
    "1.5B": ((1536, 8960, 28, 12, 2), 1_310_253_056, 196),
    "3B": ((2048, 11008, 36, 16, 2), 2_774_624_256, 252),
    "7B": ((3584, 18944, 28, 28, 4), 6_525_417_472, 196),
}


def qwen25_config(shape, **changes):
    hidden, intermediate, layers, heads, kv_heads = shape
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **changes,
    )


@pytest.mark.parametrize("size", QWEN25)
def test_qwen25_candidate_counts_are_reproduced_exactly_on_the_meta_device(size):
    shape, parameters, modules = QWEN25[size]
    candidates = find_candidates_from_config(qwen25_config(shape))
    assert len(candidates) == modules
    assert sum(candidate.parameters for candidate in candidates) == parameters


def test_candidates_come_in_layer_and_type_order_with_plain_names():
    candidates = find_candidates_from_config(tiny_qwen2_config(50, layers=12))
    assert [(c.layer, c.type) for c in candidates] == [(layer, type_) for layer in range(12) for type_ in TYPES]
    assert candidates[0].name == "model.layers.0.self_attn.q_proj"
    assert candidates[0].component == "attention" and candidates[0].parameters == 32 * 32 + 32
    assert candidates[6].name == "model.layers.0.mlp.down_proj"
    assert candidates[6].component == "mlp" and candidates[6].parameters == 64 * 32
    with pytest.raises(dataclasses.FrozenInstanceError):
        candidates[0].name = "other"


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_llama_smollm_and_qwen3_are_found_by_the_same_structure(kind):
    config = kind(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    candidates = find_candidates_from_config(config)
    assert len(candidates) == 21 and {c.type for c in candidates} == set(TYPES)


def test_a_model_without_candidates_is_refused_with_what_was_looked_for():
    with pytest.raises(ConfigurationError, match=r"Sequential has no linear module named .*self_attn.*mlp"):
        find_candidates(nn.Sequential(nn.Linear(2, 2)))


def test_two_stacks_of_layers_are_refused_instead_of_mixed():
    def stack():
        layer = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
        return nn.ModuleDict({"layers": nn.ModuleList([layer])})

    with pytest.raises(ConfigurationError, match="several stacks .*text.layers, vision.layers"):
        find_candidates(nn.ModuleDict({"text": stack(), "vision": stack()}))


def test_look_alikes_that_are_not_linear_or_not_in_a_layer_are_ignored():
    layer = nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict(
                {"q_proj": nn.Linear(2, 2), "k_proj": nn.Identity(), "gate_proj": nn.Linear(2, 2)}
            ),
            "router": nn.ModuleDict({"up_proj": nn.Linear(2, 2)}),
        }
    )
    assert [c.name for c in find_candidates(nn.ModuleDict({"layers": nn.ModuleList([layer])}))] == [
        "layers.0.self_attn.q_proj"
    ]


def test_fingerprint_survives_dtype_kernel_token_ids_and_a_round_trip_through_a_folder(tiny_qwen2, tmp_path):
    in_memory = AutoModelForCausalLM.from_config(tiny_qwen2_config(AutoConfig.from_pretrained(tiny_qwen2).vocab_size))
    expected = model_fingerprint(in_memory.config)
    assert in_memory.config.architectures in (None, []) or architecture_of(in_memory.config) == "Qwen2ForCausalLM"

    loaded = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.bfloat16, attn_implementation="eager")
    assert model_fingerprint(loaded.config) == expected
    config = AutoConfig.from_pretrained(tiny_qwen2)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 7, [8, 9], 10
    config._name_or_path, config.transformers_version, config.use_cache = "elsewhere", "1.2.3", False
    assert model_fingerprint(config) == expected
    config.save_pretrained(tmp_path)
    assert model_fingerprint(AutoConfig.from_pretrained(tmp_path)) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"intermediate_size": 65},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"vocab_size": 51},
        {"tie_word_embeddings": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_changes_with_the_architecture(change):
    config, other = tiny_qwen2_config(50), tiny_qwen2_config(50)
    for name, value in change.items():
        setattr(other, name, value)
    assert model_fingerprint(config) != model_fingerprint(other)
    assert len(model_fingerprint(config)) == 64


def test_fingerprint_tells_families_of_equal_shape_apart():
    shape = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    assert model_fingerprint(LlamaConfig(**shape)) != model_fingerprint(Qwen2Config(**shape))
