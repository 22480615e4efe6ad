"""Damaged syncs at the receiver: what comes twice, not at all, or of the wrong shape is named."""

from __future__ import annotations

import pytest
import torch

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.training.apply import parts_of
from tests.support.sync_models import (
    RANK,
    HuggingFaceRollout,
    each_mode,
    each_partial_mode,
    factor_names,
    receiver_for,
    sync,
    take_all,
    tensors_of,
    without,
)


@pytest.fixture
def faulty(hybrid, tiny_qwen2):
    """Feeds a changed stream to a receiver and returns the error and the rollout model."""

    def run(mode, change):
        rollout = HuggingFaceRollout(tiny_qwen2)
        pairs = change(list(tensors_of(hybrid, mode).items()))
        with pytest.raises(WeightSyncError) as caught:
            take_all(receiver_for(hybrid, rollout, mode), pairs)
        # Half an adapter is not used.
        assert rollout.adapters == 0
        return str(caught.value)

    return run


@each_partial_mode
@pytest.mark.parametrize("kinds", ["A", "B", "AB"])
@pytest.mark.parametrize("index", [0, -1])
def test_missing_factors_are_named(hybrid, faulty, mode, kinds, index):
    missing = [f"{parts_of(hybrid).lora_modules[index]}.lora_{kind}.weight" for kind in kinds]
    error = faulty(mode, lambda pairs: without(pairs, *missing))
    assert missing[0] in error and "missing" in error


@each_partial_mode
def test_a_sync_of_full_modules_only_lacks_every_factor(hybrid, faulty, mode):
    error = faulty(mode, lambda pairs: without(pairs, *factor_names(hybrid)))
    assert any(name in error for name in factor_names(hybrid)) and "missing" in error


@each_partial_mode
@pytest.mark.parametrize("kind", "AB")
@pytest.mark.parametrize("when", ["at once", "at the end"])
def test_a_factor_received_twice_is_named(hybrid, faulty, mode, kind, when):
    twice = f"{parts_of(hybrid).lora_modules[1]}.lora_{kind}.weight"

    def change(pairs):
        names = [name for name, _ in pairs]
        place = names.index(twice)
        return [*pairs[: place + 1], pairs[place], *pairs[place + 1 :]] if when == "at once" else [*pairs, pairs[place]]

    error = faulty(mode, change)
    assert twice in error and "twice" in error


@each_partial_mode
def test_a_pair_received_twice_is_named(hybrid, faulty, mode):
    twice = [f"{parts_of(hybrid).lora_modules[1]}.lora_{kind}.weight" for kind in "AB"]
    error = faulty(mode, lambda pairs: pairs + [pair for pair in pairs if pair[0] in twice])
    assert any(name in error for name in twice) and "twice" in error


@each_partial_mode
@pytest.mark.parametrize("where", ["a full module", "a module of no model"])
def test_a_factor_of_a_module_without_adapter_is_named(cases, faulty, mode, where):
    module = cases["tied"].allocation.full_names[0] if where == "a full module" else "model.layers.7.mlp.up_proj"
    name = f"{module}.lora_A.weight"
    error = faulty(mode, lambda pairs: [(name, torch.ones(RANK, 32)), *pairs])
    assert name in error and "no adapter" in error


@each_partial_mode
@pytest.mark.parametrize("when", ["first", "last"])
def test_a_weight_beside_its_adapter_is_named(hybrid, faulty, mode, when):
    # Whichever is loaded last would undo the other.
    name = f"{parts_of(hybrid).lora_modules[0]}.weight"
    sent = [(name, torch.ones(32, 32))]
    error = faulty(mode, lambda pairs: sent + pairs if when == "first" else pairs + sent)
    assert name in error and "has an adapter" in error


@each_partial_mode
@pytest.mark.parametrize("kind", "AB")
@pytest.mark.parametrize("rank", [RANK - 1, RANK + 1, 2 * RANK])
def test_a_factor_of_another_rank_is_named(hybrid, faulty, mode, kind, rank):
    name = f"{parts_of(hybrid).lora_modules[0]}.lora_{kind}.weight"

    def resized(tensor):
        shape = (rank, tensor.shape[1]) if kind == "A" else (tensor.shape[0], rank)
        return torch.ones(shape, dtype=tensor.dtype)

    error = faulty(mode, lambda pairs: [(n, resized(t) if n == name else t) for n, t in pairs])
    assert name in error and "another rank" in error


@each_partial_mode
@pytest.mark.parametrize("kind", "AB")
def test_an_adapter_of_another_rank_altogether_is_named(hybrid, tiny_qwen2, mode, kind):
    # Trainer and header disagree, every factor is consistent with every other.
    rollout = HuggingFaceRollout(tiny_qwen2)
    pairs = tensors_of(hybrid, mode).items()
    first = f"{parts_of(hybrid).lora_modules[0]}.lora_{kind}.weight"
    ordered = sorted(pairs, key=lambda pair: pair[0] != first)
    with pytest.raises(WeightSyncError, match=f"{first}.*another rank"):
        take_all(receiver_for(hybrid, rollout, mode, lora_rank=2 * RANK), ordered)
    assert rollout.adapters == 0 and rollout.loaded == []


@each_partial_mode
@pytest.mark.parametrize("kind", "AB")
@pytest.mark.parametrize("axis", [0, 1])
def test_a_shard_of_a_factor_is_named(hybrid, faulty, mode, kind, axis):
    # A worker of two would have taken its own half for the whole.
    name = f"{parts_of(hybrid).lora_modules[-1]}.lora_{kind}.weight"
    error = faulty(mode, lambda pairs: [(n, t.chunk(2, axis)[0] if n == name else t) for n, t in pairs])
    assert name in error and "shard" in error


@each_partial_mode
def test_a_transposed_factor_is_named(hybrid, faulty, mode):
    name = f"{parts_of(hybrid).lora_modules[0]}.lora_A.weight"
    assert name in faulty(mode, lambda pairs: [(n, t.t() if n == name else t) for n, t in pairs])


@each_partial_mode
def test_an_incomplete_sync_keeps_the_adapter_that_was_there(hybrid, tiny_qwen2, mode):
    rollout = HuggingFaceRollout(tiny_qwen2)
    sync(hybrid, rollout, mode)
    adapters = rollout.adapters
    missing = f"{parts_of(hybrid).lora_modules[-1]}.lora_B.weight"
    pairs = without(list(tensors_of(hybrid, mode).items()), missing)
    with pytest.raises(WeightSyncError, match=missing):
        take_all(receiver_for(hybrid, rollout, mode, number=2), pairs)
    assert rollout.adapters == adapters


@each_mode
def test_a_tensor_of_another_type_is_named(hybrid, faulty, mode):
    """Also where the trainer lists it so: the header says what the engine computes in."""
    name = next(reversed(tensors_of(hybrid, mode)))
    message = faulty(mode, lambda pairs: [(n, t.half() if n == name else t) for n, t in pairs])
    reference = "[docs/troubleshooting.md#tensor-of-another-shape-or-dtype]"
    assert message == f"{name}: received as float16, wanted float32 {reference}"
