"""The computed page on what training costs, against operations and bytes that are counted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.training_sizes import (
    GPUS,
    Machine,
    Sizes,
    flops_per_token,
    gathered_bytes,
    main,
    seconds_per_step,
    sizes_of,
    state_bytes,
)
from hybrid_lora_plugin import apply_allocation, load_allocation
from hybrid_lora_plugin.training.apply import parts_of
from tests.support.allocations import make_allocation
from tests.support.tiny_models import make_tiny_qwen2

IDS = torch.arange(5, 17)[None]
SHAPE = dict(
    hidden_size=64, num_hidden_layers=3, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300,
)  # fmt: skip


def counted_products(model) -> int:
    """Operations of all products of a weight, forward and backward; attention's own are batched ones."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=IDS, labels=IDS).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(function, 0) for function in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_an_update_are_those_that_torch_counts(tmp_path, tied):
    folder = make_tiny_qwen2(tmp_path / "model", layers=3, hidden=64, tie_word_embeddings=tied)
    allocation = load_allocation(make_allocation(folder, tmp_path / "allocation", ratio=0.2))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    head = plain.lm_head.weight.numel()
    full = counted_products(plain)
    hybrid = AutoModelForCausalLM.from_pretrained(folder)
    hybrid.enable_input_require_grads()
    hybrid = apply_allocation(hybrid, allocation, rank=4, alpha=8)
    sizes = Sizes(parts_of(hybrid).counts, head if tied else 2 * head, head, 0, 3)
    said = flops_per_token(sizes, checkpointing=False)
    # The formula takes norms and biases for products, and they are few.
    assert full / IDS.numel() == pytest.approx(said["full"], rel=0.03)
    assert counted_products(hybrid) / IDS.numel() == pytest.approx(said["hybrid"], rel=0.03)


def test_memory_falls_with_the_gpus_and_lies_below_both_others():
    sizes = sizes_of("a model", SHAPE | {"tie_word_embeddings": False}, rank=4, ratio=0.1, seed=0)
    for gpus in GPUS:
        held = state_bytes(sizes, gpus)
        assert held["hybrid"] < held["lora"] < held["full"] and held["hybrid"] < held["full"] * 0.4
        assert held["hybrid"] == pytest.approx(state_bytes(sizes, 1)["hybrid"] / gpus)
    count = sizes.counts
    assert state_bytes(sizes, 1)["hybrid"] == 2 * count.frozen + 18 * count.full + 16 * count.lora


def test_time_is_the_longer_of_computing_and_gathering():
    sizes = sizes_of("a model", SHAPE | {"tie_word_embeddings": True}, rank=4, ratio=0.1, seed=0)
    fast, slow = Machine(1e-3, 0.5, 1e9), Machine(1e9, 0.5, 1e-3)
    assert seconds_per_step(sizes, 1000, 8, 1, fast) == pytest.approx(flops_per_token(sizes)["hybrid"] * 125 / 5e8)
    assert seconds_per_step(sizes, 1000, 8, 3, slow) == pytest.approx(3 * gathered_bytes(sizes) / 1e6)


def test_page_is_what_the_command_computes(tmp_path):
    page = tmp_path / "page.md"
    from tests.test_docs import ROOT

    page.write_text((ROOT / "docs/training-cost.md").read_text())
    assert main(["--write", str(page)]) == 0
    assert page.read_text() == (ROOT / "docs/training-cost.md").read_text()
