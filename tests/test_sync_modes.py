"""The three sync modes end to end, with a Hugging Face model of its own as the rollout engine."""

from __future__ import annotations

import copy
import json
import math
import resource
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import pytest
import torch
from allocations import make_allocation
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_qwen2
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin import apply_allocation, load_allocation
from hybrid_lora_plugin.allocation import Allocation
from hybrid_lora_plugin.sync.base_check import base_digests, check_base, value_digest
from hybrid_lora_plugin.sync.checkpoint_weights import STORAGE, CheckpointWeights
from hybrid_lora_plugin.sync.errors import WeightSyncError
from hybrid_lora_plugin.sync.hybrid_weights import lora_modules, original_weights
from hybrid_lora_plugin.sync.modes import split_factor, sync_mode
from hybrid_lora_plugin.sync.receiver_merge import merged_digest
from hybrid_lora_plugin.sync.wire import HEADER, MANIFEST, OutgoingWeights, ReceivedWeights, SyncHeader, read_header
from hybrid_lora_plugin.training.apply import census, plain_name, trainable_groups
from hybrid_lora_plugin.training.merge import merge_weight

IDS = torch.tensor([[5, 6, 7, 8, 9, 40, 41, 2, 3], [90, 80, 70, 60, 50, 40, 30, 20, 10]])
MODES = ["merge", "adapter", "receiver_merge"]
PARTIAL = ["adapter", "receiver_merge"]
DTYPES = [torch.float32, torch.bfloat16]
# A scaling that no binary fraction holds, so that the order of operations shows.
RANK, ALPHA = 6, 8
SCALING = ALPHA / RANK

each_mode = pytest.mark.parametrize("mode", MODES)
each_partial_mode = pytest.mark.parametrize("mode", PARTIAL)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# -- the trainer's side ---------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A checkpoint, an allocation for it, and its hybrid model after some training, which is copied for each test."""

    folder: Path
    allocation: Allocation

    @cached_property
    def _trained(self):
        return hybrid_of(self.folder, self.allocation)

    def hybrid(self):
        return copy.deepcopy(self._trained)


def saved_as(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def cases(tiny_qwen2, tmp_path_factory):
    root = tmp_path_factory.mktemp("cases")
    untied = make_tiny_qwen2(root / "untied", tie_word_embeddings=False)
    half = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.bfloat16)
    allocation = load_allocation(make_allocation(tiny_qwen2, root / "tied-allocation"))
    return {
        "tied": Case(tiny_qwen2, allocation),
        "untied": Case(untied, load_allocation(make_allocation(untied, root / "untied-allocation"))),
        "bf16": Case(saved_as(half, root / "bf16"), allocation),
    }


@pytest.fixture
def case(cases, request):
    return cases[request.param]


each_case = pytest.mark.parametrize("case", ["tied", "untied", "bf16"], indirect=True)
tied_and_untied = pytest.mark.parametrize("case", ["tied", "untied"], indirect=True)


def hybrid_of(folder, allocation):
    """The trainer's model, fp32 as in training, with adapters and full weights that have moved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = apply_allocation(model, allocation, rank=RANK, alpha=ALPHA).eval()
    update(model, torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def hybrid(cases):
    return cases["tied"].hybrid()


@torch.no_grad()
def update(model, generator, size=0.05):
    """A training step's worth of change to everything that trains, biases too."""
    for group in trainable_groups(model).values():
        for _, parameter in group:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def outgoing(model, mode, dtype=torch.float32):
    return sync_mode(mode).outgoing(model, SCALING, dtype, "cpu")


def tensors_of(model, mode, dtype=torch.float32):
    """One sync's tensors by name, in memory of their own."""
    pairs = [(name, tensor.clone()) for name, tensor in outgoing(model, mode, dtype)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def header_for(model, mode, dtype=torch.float32, number=1, **changes):
    fields = dict(
        run="r1",
        number=number,
        mode=mode,
        dtype=str(dtype).removeprefix("torch."),
        digests=True,
        lora_rank=RANK,
        lora_alpha=float(ALPHA),
        lora_modules=lora_modules(model),
        payload_bytes=sync_mode(mode).payload_bytes(census(model), dtype),
    )
    return SyncHeader(**(fields | changes))


def full_names(model):
    """Plain names of every trained weight and bias of a full module."""
    return [plain_name(name) for name, _ in trainable_groups(model)["full"]]


def factor_names(model):
    return [f"{module}.lora_{kind}.weight" for module in lora_modules(model) for kind in "AB"]


def pair_of(layer):
    """Factors of a PEFT layer."""
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def layers_of(model):
    return {module: model.get_submodule(f"base_model.model.{module}") for module in lora_modules(model)}


# -- the rollout engine's side --------------------------------------------------------------------------------------


class HuggingFaceRollout:
    """A ``RolloutModel`` that is a plain Hugging Face model of its own, loaded from a checkpoint.

    The adapter is PEFT's: a new one is put on the plain model each time, after the old one was taken off.
    """

    device = torch.device("cpu")

    def __init__(self, folder, dtype=torch.float32, storage="memory_map"):
        self.checkpoint = CheckpointWeights(folder, storage)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        # From before PEFT renames them; the tied head is its embedding.
        self.parameters = dict(self.model.named_parameters())
        self.loaded: list[str] = []
        self.adapters = 0

    @torch.no_grad()
    def load(self, weights):
        for name, tensor in weights:
            live = self.parameters[name]
            assert (tensor.shape, tensor.dtype) == (live.shape, live.dtype), name
            live.copy_(tensor)
            self.loaded.append(name)

    @torch.no_grad()
    def replace_adapter(self, factors, header):
        if self.adapters:
            self.model = self.model.unload()
        config = LoraConfig(r=header.lora_rank, lora_alpha=header.lora_alpha, target_modules=sorted(factors))
        self.model = get_peft_model(self.model, config).eval()
        for module, factors_of_it in factors.items():
            layer = self.model.get_submodule(f"base_model.model.{module}")
            for live, factor in zip(pair_of(layer), factors_of_it, strict=True):
                live.copy_(factor)
        self.adapters += 1

    @torch.no_grad()
    def logits(self):
        return self.model(IDS).logits


class TransferBuffer:
    """Hands tensors out as views of one buffer that is overwritten before the next ones, as verl's transport does."""

    def __init__(self, size=1 << 20):
        self.bytes = torch.empty(size, dtype=torch.uint8)

    def buckets(self, pairs, at_once):
        pairs = iter(pairs)
        while bucket := list(islice(pairs, at_once)):
            views, end = [], 0
            for name, tensor in bucket:
                # Aligned to the element, no more: verl does the same.
                start = math.ceil(end / tensor.itemsize) * tensor.itemsize
                end = start + tensor.nbytes
                view = self.bytes[start:end].view(tensor.dtype).view(tensor.shape)
                views.append((name, view.copy_(tensor)))
            yield views
            self.bytes[:end] = 0xA5


def deliver(stream, rollout, number=1, at_once=5):
    """The receiver's part of a sync."""
    buckets = TransferBuffer().buckets(stream, at_once)
    (first, *rest) = next(buckets)
    header = read_header(*first)
    received = ReceivedWeights(header, "r1", number)
    receiver = sync_mode(header.mode).receiver(header, rollout)

    def take(bucket):
        receiver.take([pair for pair in bucket if received.take(*pair) is not None])

    take(rest)
    for bucket in buckets:
        take(bucket)
    entries = received.finish()
    receiver.finish()
    return entries


def sync(model, rollout, mode, dtype=torch.float32, number=1, at_once=5):
    stream = OutgoingWeights(header_for(model, mode, dtype, number), outgoing(model, mode, dtype))
    deliver(stream, rollout, number, at_once)
    return stream


def receiver_for(model, rollout, mode, dtype=torch.float32, **changes):
    header = header_for(model, mode, dtype, **changes)
    return sync_mode(mode).receiver(header, rollout)


# -- equal models ---------------------------------------------------------------------------------------------------


@each_mode
@tied_and_untied
def test_rollout_computes_what_the_trained_model_computes_after_every_sync(mode, case):
    folder, hybrid = case.folder, case.hybrid()
    rollout = HuggingFaceRollout(folder)
    generator = torch.Generator().manual_seed(2)
    # Otherwise a forgotten bias would not show.
    assert any(name.endswith(".bias") for name in full_names(hybrid))
    # Buckets of one tensor and of many: the two factors of a module come together or apart.
    for number, at_once in enumerate((5, 1, 2, 1000), 1):
        before = rollout.logits()
        sync(hybrid, rollout, mode, number=number, at_once=at_once)
        with torch.no_grad():
            expected = hybrid(IDS).logits
        torch.testing.assert_close(rollout.logits(), expected, rtol=0, atol=1e-5)
        assert (before - expected).abs().max() > 1e-2, "the update changed nothing that could be seen"
        update(hybrid, generator)


@each_mode
def test_outgoing_leaves_the_trainer_bit_unchanged(hybrid, mode):
    before = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    for dtype in DTYPES:
        for _name, tensor in outgoing(hybrid, mode, dtype):
            assert not tensor.requires_grad
            # The generator waits inside its no_grad; training goes on outside of it.
            assert torch.is_grad_enabled()
    after = hybrid.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert {name for name, p in hybrid.named_parameters() if p.requires_grad} == {
        name for group in trainable_groups(hybrid).values() for name, _ in group
    }


@each_mode
def test_a_whole_sync_leaves_the_trainer_and_the_checkpoint_bit_unchanged(hybrid, tiny_qwen2, mode):
    before = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    file = (tiny_qwen2 / "model.safetensors").read_bytes()
    rollout = HuggingFaceRollout(tiny_qwen2, storage="pinned")
    for number in (1, 2):
        sync(hybrid, rollout, mode, number=number)
    assert all(torch.equal(tensor, before[name]) for name, tensor in hybrid.state_dict().items())
    original = load_file(tiny_qwen2 / "model.safetensors")
    assert all(torch.equal(rollout.checkpoint[name], tensor) for name, tensor in original.items())
    assert (tiny_qwen2 / "model.safetensors").read_bytes() == file


def test_partial_modes_leave_everything_else_in_the_rollout_alone(hybrid, tiny_qwen2):
    original = load_file(tiny_qwen2 / "model.safetensors")
    merged = {f"{module}.weight" for module in lora_modules(hybrid)}
    for mode, touched in (("adapter", set()), ("receiver_merge", merged)):
        rollout = HuggingFaceRollout(tiny_qwen2)
        sync(hybrid, rollout, mode)
        assert set(rollout.loaded) == touched | set(full_names(hybrid))
        assert len(rollout.loaded) == len(set(rollout.loaded))
        for name, tensor in rollout.parameters.items():
            assert torch.equal(tensor, original[name]) == (name not in rollout.loaded), name
        assert rollout.adapters == (mode == "adapter")


def test_modes_are_found_by_their_names():
    for mode in MODES:
        assert sync_mode(mode).name == mode
    assert [mode for mode in MODES if sync_mode(mode).partial] == PARTIAL
    assert [mode for mode in MODES if sync_mode(mode).engine_adapter] == ["adapter"]


# -- merged values --------------------------------------------------------------------------------------------------


@each_dtype
def test_merge_streams_the_exact_weights_rounded_once(hybrid, tiny_qwen2, dtype):
    original = load_file(tiny_qwen2 / "model.safetensors")
    streamed = tensors_of(hybrid, "merge", dtype)
    state = {plain_name(name): tensor for name, tensor in hybrid.state_dict().items()}
    for module, layer in layers_of(hybrid).items():
        base = original[f"{module}.weight"].double()
        lora_a, lora_b = (factor.double() for factor in pair_of(layer))
        exact = torch.zeros_like(base)
        for row in range(base.shape[0]):
            for term in range(RANK):
                exact[row] += lora_b[row, term] * lora_a[term]
        size = base.abs() + SCALING * (lora_b.abs() @ lora_a.abs())
        exact = base + SCALING * exact
        # fp32 arithmetic may be off by an fp32 rounding for each of its terms; what is rounded lies in between.
        noise = (RANK + 2) * 2**-24 * size
        low, high = ((exact + side * noise).to(dtype) for side in (-1, 1))
        merged = streamed[f"{module}.weight"]
        assert merged.dtype == dtype and ((low <= merged) & (merged <= high)).all(), module
        if dtype == torch.bfloat16:
            # Nearly everywhere only one bf16 value is in between: a second rounding would show.
            assert (low == high).float().mean() > 0.99
    for name, tensor in streamed.items():
        if name.removesuffix(".weight") not in layers_of(hybrid):
            assert torch.equal(tensor, state[name].to(dtype)), name


@pytest.mark.parametrize(
    "case, dtype",
    [("tied", torch.float32), ("tied", torch.bfloat16), ("bf16", torch.bfloat16)],
    ids=["fp32", "bf16-of-fp32", "bf16-of-bf16"],
    indirect=["case"],
)
def test_receiver_merge_is_the_trainers_merge_bit_for_bit_over_200_updates(case, dtype):
    folder, hybrid, generator = case.folder, case.hybrid(), torch.Generator().manual_seed(3)
    rollouts = [HuggingFaceRollout(folder, dtype, storage) for storage in STORAGE]
    buffer = TransferBuffer()
    for step in range(200):
        merged = tensors_of(hybrid, "merge", dtype)
        for rollout in rollouts:
            receiver = receiver_for(hybrid, rollout, "receiver_merge", dtype)
            for bucket in buffer.buckets(outgoing(hybrid, "receiver_merge", dtype), at_once=7):
                receiver.take(bucket)
            receiver.finish()
            assert rollout.parameters.keys() == merged.keys()
            wrong = [name for name, tensor in merged.items() if not torch.equal(rollout.parameters[name], tensor)]
            assert wrong == [], (step, rollout.checkpoint.storage)
        # From tiny changes, which bf16 swallows, to changes as large as the weights.
        update(hybrid, generator, size=10 ** -(step % 5))


def test_bf16_factors_would_not_be_the_trainers_merge(hybrid, tiny_qwen2):
    # Why receiver_merge sends fp32 factors although everything else travels in bf16.
    merged, original = tensors_of(hybrid, "merge", torch.bfloat16), load_file(tiny_qwen2 / "model.safetensors")
    different = total = 0
    for module, layer in layers_of(hybrid).items():
        lora_a, lora_b = (factor.bfloat16().float() for factor in pair_of(layer))
        weight = (original[f"{module}.weight"] + SCALING * (lora_b @ lora_a)).bfloat16()
        different += (weight != merged[f"{module}.weight"]).sum().item()
        total += weight.numel()
    assert different / total > 0.1


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """Checkpoint in bf16 and allocation of a model of one narrow layer."""
    folder = tmp_path_factory.mktemp("smallest")
    fp32 = make_tiny_qwen2(folder / "fp32", layers=1, hidden=16, heads=2, kv_heads=1)
    bf16 = saved_as(AutoModelForCausalLM.from_pretrained(fp32, dtype=torch.bfloat16), folder / "bf16")
    return Case(bf16, load_allocation(make_allocation(bf16, folder / "allocation", ratio=0.7)))


def test_a_thousand_syncs_in_bf16_do_not_drift_and_merging_in_place_does(smallest):
    folder, allocation, hybrid = smallest.folder, smallest.allocation, smallest.hybrid()
    rollout = HuggingFaceRollout(folder, torch.bfloat16)
    module, layer = next(iter(layers_of(hybrid).items()))
    name = f"{module}.weight"
    original = load_file(folder / "model.safetensors")[name]
    # The contrast: PEFT's own merge and unmerge on a bf16 model, with the same factors.
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    in_place = apply_allocation(plain, allocation, rank=RANK, alpha=ALPHA).get_submodule(f"base_model.model.{module}")
    assert original.dtype == in_place.get_base_layer().weight.dtype == torch.bfloat16

    generator, buffer, last = torch.Generator().manual_seed(4), TransferBuffer(), None
    for cycle in range(1000):
        update(hybrid, generator, size=0.01)
        lora_a, lora_b = pair_of(layer)
        fresh = (original.float() + SCALING * (lora_b @ lora_a)).bfloat16()
        assert last is None or not torch.equal(fresh, last)
        last = fresh
        merged = dict(outgoing(hybrid, "merge", torch.bfloat16))
        assert torch.equal(merged[name], fresh), cycle
        receiver = receiver_for(hybrid, rollout, "receiver_merge", torch.bfloat16)
        for bucket in buffer.buckets(outgoing(hybrid, "receiver_merge", torch.bfloat16), at_once=3):
            receiver.take(bucket)
        receiver.finish()
        assert torch.equal(rollout.parameters[name], fresh), cycle
        with torch.no_grad():
            for live, factor in zip(pair_of(in_place), (lora_a, lora_b), strict=True):
                live.copy_(factor)
        in_place.merge()
        in_place.unmerge()
    assert torch.equal(dict(original_weights(hybrid, "cpu"))[name], original.float())
    drifted = (in_place.get_base_layer().weight != original).float().mean()
    assert drifted > 0.3, f"{drifted:.0%} of the base changed"


# -- what travels ---------------------------------------------------------------------------------------------------


@each_mode
@each_dtype
@tied_and_untied
def test_payload_bytes_are_those_of_the_tensors_that_travel(mode, dtype, case):
    folder, hybrid = case.folder, case.hybrid()
    header = header_for(hybrid, mode, dtype)
    stream = OutgoingWeights(header, outgoing(hybrid, mode, dtype))
    sizes = {name: tensor.nbytes for name, tensor in stream}
    payload = sum(sizes.values()) - sizes[HEADER] - sizes[MANIFEST]
    assert payload == header.payload_bytes == stream.bytes - sizes[HEADER] - sizes[MANIFEST]
    groups = trainable_groups(hybrid)
    full, lora = (sum(p.numel() for _, p in groups[kind]) for kind in ("full", "lora"))
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert (
        payload
        == {
            "merge": base * dtype.itemsize,
            "adapter": (full + lora) * dtype.itemsize,
            "receiver_merge": full * dtype.itemsize + 4 * lora,
        }[mode]
    )


@each_mode
@each_dtype
@tied_and_untied
def test_exactly_the_right_names_travel_each_once_and_in_its_type(mode, dtype, case):
    folder, allocation, hybrid = case.folder, case.allocation, case.hybrid()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    everything = dict(plain.named_parameters())
    tied = plain.config.tie_word_embeddings
    assert ("lm_head.weight" in plain.state_dict()) and ("lm_head.weight" in everything) == (not tied)

    names = [name for name, _ in outgoing(hybrid, mode, dtype)]
    assert len(names) == len(set(names))
    full = [name for name in everything if name.rpartition(".")[0] in allocation.full_names]
    factors = [f"{module}.lora_{kind}.weight" for module in allocation.lora_names for kind in "AB"]
    assert set(names) == (set(everything) if mode == "merge" else {*full, *factors})
    assert set(lora_modules(hybrid)) == set(allocation.lora_names)
    assert ("lm_head.weight" in names) == (mode == "merge" and not tied)

    for name, tensor in outgoing(hybrid, mode, dtype):
        factor = split_factor(name)
        assert tensor.dtype == (torch.float32 if factor and mode == "receiver_merge" else dtype), name
        if factor is None:
            assert tensor.shape == everything[name].shape
        else:
            module, kind = factor
            out_features, in_features = everything[f"{module}.weight"].shape
            assert tensor.shape == ((RANK, in_features) if kind == "A" else (out_features, RANK))


def test_factors_names_are_taken_apart():
    assert split_factor("model.layers.0.mlp.up_proj.lora_A.weight") == ("model.layers.0.mlp.up_proj", "A")
    assert split_factor("model.layers.0.mlp.up_proj.lora_B.weight") == ("model.layers.0.mlp.up_proj", "B")
    for name in ("model.norm.weight", "lora_A.weight", "m.lora_C.weight", "m.lora_A.bias", "m.lora_A.default.weight"):
        assert split_factor(name) is None


@each_partial_mode
def test_an_order_of_any_kind_arrives_the_same(hybrid, tiny_qwen2, mode):
    # B before A, and halves of a pair at both ends of the stream.
    expected, rollout = HuggingFaceRollout(tiny_qwen2), HuggingFaceRollout(tiny_qwen2)
    sync(hybrid, expected, mode)
    pairs = sorted(tensors_of(hybrid, mode).items(), key=lambda pair: pair[0][::-1])
    for order in (pairs, pairs[::-1]):
        receiver = receiver_for(hybrid, rollout, mode)
        for bucket in TransferBuffer().buckets(order, 4):
            receiver.take(bucket)
        receiver.finish()
        assert torch.equal(rollout.logits(), expected.logits())


@each_partial_mode
def test_receivers_copy_what_they_keep(hybrid, tiny_qwen2, mode):
    expected, rollout = HuggingFaceRollout(tiny_qwen2), HuggingFaceRollout(tiny_qwen2)
    sync(hybrid, expected, mode)
    receiver = receiver_for(hybrid, rollout, mode)
    passed = []
    for name, tensor in tensors_of(hybrid, mode).items():
        receiver.take([(name, tensor)])
        passed.append(tensor)
        # The next bucket comes into the same memory.
        for earlier in passed:
            earlier.fill_(math.nan)
    receiver.finish()
    assert torch.equal(rollout.logits(), expected.logits())
    assert rollout.logits().isfinite().all()


# -- faults at the receiver -----------------------------------------------------------------------------------------


def take_all(receiver, pairs):
    for pair in pairs:
        receiver.take([pair])
    receiver.finish()


def without(pairs, *names):
    assert set(names) <= {name for name, _ in pairs}
    return [pair for pair in pairs if pair[0] not in names]


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
    missing = [f"{lora_modules(hybrid)[index]}.lora_{kind}.weight" for kind in kinds]
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
    twice = f"{lora_modules(hybrid)[1]}.lora_{kind}.weight"

    def change(pairs):
        names = [name for name, _ in pairs]
        place = names.index(twice)
        return [*pairs[: place + 1], pairs[place], *pairs[place + 1 :]] if when == "at once" else [*pairs, pairs[place]]

    error = faulty(mode, change)
    assert twice in error and "twice" in error


@each_partial_mode
def test_a_pair_received_twice_is_named(hybrid, faulty, mode):
    twice = [f"{lora_modules(hybrid)[1]}.lora_{kind}.weight" for kind in "AB"]
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
@pytest.mark.parametrize("kind", "AB")
@pytest.mark.parametrize("rank", [RANK - 1, RANK + 1, 2 * RANK])
def test_a_factor_of_another_rank_is_named(hybrid, faulty, mode, kind, rank):
    name = f"{lora_modules(hybrid)[0]}.lora_{kind}.weight"

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
    first = f"{lora_modules(hybrid)[0]}.lora_{kind}.weight"
    ordered = sorted(pairs, key=lambda pair: pair[0] != first)
    with pytest.raises(WeightSyncError, match=f"{first}.*another rank"):
        take_all(receiver_for(hybrid, rollout, mode, lora_rank=2 * RANK), ordered)
    assert rollout.adapters == 0 and rollout.loaded == []


@each_partial_mode
@pytest.mark.parametrize("kind", "AB")
@pytest.mark.parametrize("axis", [0, 1])
def test_a_shard_of_a_factor_is_named(hybrid, faulty, mode, kind, axis):
    # A worker of two would have taken its own half for the whole.
    name = f"{lora_modules(hybrid)[-1]}.lora_{kind}.weight"
    error = faulty(mode, lambda pairs: [(n, t.chunk(2, axis)[0] if n == name else t) for n, t in pairs])
    assert name in error and "shard" in error


@each_partial_mode
def test_a_transposed_factor_is_named(hybrid, faulty, mode):
    name = f"{lora_modules(hybrid)[0]}.lora_A.weight"
    assert name in faulty(mode, lambda pairs: [(n, t.t() if n == name else t) for n, t in pairs])


@each_partial_mode
def test_an_incomplete_sync_keeps_the_adapter_that_was_there(hybrid, tiny_qwen2, mode):
    rollout = HuggingFaceRollout(tiny_qwen2)
    sync(hybrid, rollout, mode)
    adapters = rollout.adapters
    missing = f"{lora_modules(hybrid)[-1]}.lora_B.weight"
    pairs = without(list(tensors_of(hybrid, mode).items()), missing)
    with pytest.raises(WeightSyncError, match=missing):
        take_all(receiver_for(hybrid, rollout, mode, number=2), pairs)
    assert rollout.adapters == adapters


# -- the checkpoint beside the engine -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded_qwen2(tiny_qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "qwen2"
    saved_as(AutoModelForCausalLM.from_pretrained(tiny_qwen2), folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2 and not (folder / "model.safetensors").exists()
    return folder


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("which", ["tied", "untied", "bf16", "sharded"])
def test_checkpoint_weights_are_those_of_the_model(cases, sharded_qwen2, which, storage):
    folder = sharded_qwen2 if which == "sharded" else cases[which].folder
    weights = CheckpointWeights(folder, storage)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, parameter in model.named_parameters():
        for _ in range(2):
            assert torch.equal(weights[name], parameter) and weights[name].dtype == parameter.dtype
        assert weights.shape(name) == tuple(parameter.shape) and name in weights
    assert ("lm_head.weight" in weights) == (which == "untied")


def test_a_weight_that_the_checkpoint_lacks_is_a_key_error(tiny_qwen2, sharded_qwen2):
    for folder in (tiny_qwen2, sharded_qwen2):
        weights = CheckpointWeights(folder)
        assert "lm_head.weight" not in weights
        with pytest.raises(KeyError, match="lm_head.weight"):
            weights["lm_head.weight"]
        with pytest.raises(KeyError, match="lm_head.weight"):
            weights.shape("lm_head.weight")


def test_pinned_storage_keeps_one_copy_and_memory_map_reads_again(tiny_qwen2, tmp_path):
    folder = shutil.copytree(tiny_qwen2, tmp_path / "copy")
    pinned, mapped = (CheckpointWeights(folder, storage) for storage in ("pinned", "memory_map"))
    name = "model.norm.weight"
    assert pinned[name] is pinned[name]
    assert mapped[name] is not mapped[name]
    # Its own memory: what happens to the file is nothing to it.
    kept = pinned[name].clone()
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        (header,) = struct.unpack("<Q", (file.seek(0), file.read(8))[1])
        file.seek(8 + header)
        file.write(b"\0" * (size - 8 - header))
    assert torch.equal(pinned[name], kept) and kept.any()


@pytest.mark.parametrize("storage", STORAGE)
def test_writing_to_a_weight_that_was_read_never_reaches_the_file(tiny_qwen2, tmp_path, storage):
    folder = shutil.copytree(tiny_qwen2, tmp_path / "copy")
    before = (folder / "model.safetensors").read_bytes()
    CheckpointWeights(folder, storage)["model.norm.weight"].zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_folder_without_safetensors_is_named(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"not these")
    with pytest.raises(WeightSyncError, match=f"{tmp_path}: no safetensors"):
        CheckpointWeights(tmp_path)
    with pytest.raises(WeightSyncError, match=f"{tmp_path / 'nowhere'}: no safetensors"):
        CheckpointWeights(tmp_path / "nowhere")


@pytest.mark.parametrize("storage", STORAGE)
def test_shape_is_told_without_reading_the_tensor(tmp_path, storage):
    # A sparse file of one tensor of 4 GiB, of which hardly a page may come into memory.
    size = 4 << 30
    header = {"huge": {"dtype": "F32", "shape": [1 << 20, 1 << 10], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert CheckpointWeights(tmp_path, storage).shape("huge") == (1 << 20, 1 << 10)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


# -- one base -------------------------------------------------------------------------------------------------------


def test_values_have_one_digest_in_whatever_type_they_are_held(cases):
    checkpoint = CheckpointWeights(cases["bf16"].folder)
    trainer = AutoModelForCausalLM.from_pretrained(cases["bf16"].folder, dtype=torch.float32)
    for name, parameter in trainer.named_parameters():
        assert checkpoint[name].dtype == torch.bfloat16 and parameter.dtype == torch.float32
        assert value_digest(checkpoint[name]) == value_digest(parameter)
    weight = torch.randn(7, 5)
    assert value_digest(weight.t()) == value_digest(weight.t().contiguous()) != value_digest(weight)
    assert value_digest(weight.half()) == value_digest(weight.half().float()) != value_digest(weight)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3e38])
    assert value_digest(special.bfloat16()) == value_digest(special.bfloat16().float())
    assert value_digest(torch.tensor([1e38])) != value_digest(torch.tensor([3.4e38]))


@pytest.mark.parametrize("bit", [0, 1, 15, 16, 22, 23, 30, 31])
def test_a_changed_bit_of_an_fp32_weight_changes_its_value_digest(bit):
    # Of a weight that bf16 holds exactly, too: bits below its last are the ones that a look at bf16 alone would miss.
    for weight in (torch.randn(6, 5), torch.randn(6, 5).bfloat16().float()):
        changed = weight.clone()
        changed.view(torch.int32)[3, 2] ^= -(2**31) if bit == 31 else 1 << bit
        assert value_digest(changed) != value_digest(weight)


@each_case
def test_trainer_and_rollout_of_one_checkpoint_have_one_base(case):
    folder, hybrid = case.folder, case.hybrid()
    before = base_digests(original_weights(hybrid, "cpu"))
    check_base(before, CheckpointWeights(folder).__getitem__, str(folder))
    # Training changes nothing of it.
    update(hybrid, torch.Generator().manual_seed(5))
    assert base_digests(original_weights(hybrid, "cpu")) == before


@tied_and_untied
def test_original_weights_are_exactly_what_training_leaves_alone(case):
    folder, allocation, hybrid = case.folder, case.allocation, case.hybrid()
    everything = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    pairs = list(original_weights(hybrid, "cpu"))
    original = dict(pairs)
    assert len(original) == len(pairs)
    trained = {name for name in everything if name.rpartition(".")[0] in allocation.full_names}
    assert original.keys() == everything.keys() - trained
    assert all(torch.equal(tensor, everything[name]) for name, tensor in original.items())
    assert {f"{module}.weight" for module in allocation.lora_names} <= original.keys()
    # Biases of adapted modules do not train.
    assert any(f"{module}.bias" in original for module in allocation.lora_names)
    # Nothing is both kept and sent.
    sent = {name for name, _ in outgoing(hybrid, "adapter")}
    assert not sent & original.keys()


def test_digests_leave_out_what_has_no_values_to_compare():
    weights = {"w": torch.ones(2), "positions": torch.arange(4)}
    assert base_digests(weights.items()) == {"w": value_digest(torch.ones(2))}


def other_checkpoint(folder, target, change):
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return CheckpointWeights(target)


def nudge(tensors, name):
    """The smallest change there is, to one element."""
    flat = tensors[name].view(-1)
    flat[3] = torch.nextafter(flat[3], torch.tensor(math.inf))


@pytest.mark.parametrize("which", ["the base of an adapter", "a bias of it", "a norm", "the embedding"])
def test_a_differing_base_weight_is_named(hybrid, tiny_qwen2, tmp_path, which):
    biased = next(m for m in lora_modules(hybrid) if m.endswith(("q_proj", "k_proj", "v_proj")))
    name = {
        "the base of an adapter": f"{lora_modules(hybrid)[-1]}.weight",
        "a bias of it": f"{biased}.bias",
        "a norm": "model.layers.1.input_layernorm.weight",
        "the embedding": "model.embed_tokens.weight",
    }[which]
    wanted = base_digests(original_weights(hybrid, "cpu"))
    other = other_checkpoint(tiny_qwen2, tmp_path / "other", lambda tensors: nudge(tensors, name))
    with pytest.raises(WeightSyncError, match=f"{name}: .*{other.folder} holds other values"):
        check_base(wanted, other.__getitem__, str(other.folder))


def test_a_differing_full_weight_is_no_matter(hybrid, tiny_qwen2, tmp_path):
    # The first sync replaces it.
    wanted = base_digests(original_weights(hybrid, "cpu"))
    other = other_checkpoint(tiny_qwen2, tmp_path / "other", lambda tensors: nudge(tensors, full_names(hybrid)[0]))
    check_base(wanted, other.__getitem__, str(other.folder))


def test_a_missing_base_weight_is_named(hybrid, tiny_qwen2, tmp_path):
    name = f"{lora_modules(hybrid)[2]}.weight"
    wanted = base_digests(original_weights(hybrid, "cpu"))
    other = other_checkpoint(tiny_qwen2, tmp_path / "other", lambda tensors: tensors.pop(name))
    with pytest.raises(WeightSyncError, match=f"{name}: .*{other.folder}, has not"):
        check_base(wanted, other.__getitem__, str(other.folder))


def test_a_trainer_that_rounded_its_base_is_told(cases):
    # Loaded in bf16 from an fp32 checkpoint, which the rollout engine would merge into unrounded.
    folder = cases["tied"].folder
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    hybrid = apply_allocation(rounded, cases["tied"].allocation, rank=RANK, alpha=ALPHA)
    wanted = base_digests(original_weights(hybrid, "cpu"))
    with pytest.raises(WeightSyncError, match="embed_tokens.weight: .* holds other values"):
        check_base(wanted, CheckpointWeights(folder).__getitem__, str(folder))


@each_dtype
def test_every_sync_proves_another_modules_merge_to_be_the_trainers(hybrid, tiny_qwen2, dtype):
    modules = lora_modules(hybrid)
    mine = [merged_digest(hybrid, number, SCALING, dtype, "cpu") for number in range(len(modules))]
    assert [list(digest) for digest in mine] == [[f"{module}.weight"] for module in modules]
    pairs = list(tensors_of(hybrid, "receiver_merge", dtype).items())
    for merged in mine:
        take_all(
            receiver_for(hybrid, HuggingFaceRollout(tiny_qwen2, dtype), "receiver_merge", dtype, merged=merged), pairs
        )


def test_a_receiver_that_merges_to_other_bits_is_caught(hybrid, tiny_qwen2, monkeypatch):
    """As an engine would whose matrix product is not the trainer's."""
    pairs = list(tensors_of(hybrid, "receiver_merge").items())
    merged = merged_digest(hybrid, 3, SCALING, torch.float32, "cpu")

    def rounded(base, lora_a, lora_b, scaling, dtype):
        return merge_weight(base, lora_a.bfloat16(), lora_b.bfloat16(), scaling, dtype)

    monkeypatch.setattr("hybrid_lora_plugin.sync.receiver_merge.merge_weight", rounded)
    with pytest.raises(WeightSyncError, match=f"{lora_modules(hybrid)[3]}.weight: merged here to other bits"):
        take_all(receiver_for(hybrid, HuggingFaceRollout(tiny_qwen2), "receiver_merge", merged=merged), pairs)


@each_partial_mode
def test_wider_types_travel_first_so_that_a_bucket_without_gaps_is_aligned(hybrid, mode):
    sizes = [tensor.element_size() for tensor in tensors_of(hybrid, mode, torch.bfloat16).values()]
    assert sizes == sorted(sizes, reverse=True)


def test_merging_works_where_torchs_newer_precision_setting_is_in_use():
    """In a process of its own: the older and the newer setting must not both be used in one."""
    code = (
        "import torch; from hybrid_lora_plugin.training.merge import merge_weight\n"
        "torch.manual_seed(0); w, a, b = torch.randn(8, 6), torch.randn(2, 6), torch.randn(8, 2)\n"
        "wanted = w + 0.5 * (b @ a)\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "assert torch.equal(merge_weight(w, a, b, 0.5, torch.float32), wanted)\n"
        "assert torch.backends.cuda.matmul.fp32_precision == 'tf32'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@each_mode
def test_a_tensor_of_another_type_is_named(hybrid, faulty, mode):
    """Also where the trainer lists it so: the header says what the engine computes in."""
    name = next(reversed(tensors_of(hybrid, mode)))
    message = faulty(mode, lambda pairs: [(n, t.half() if n == name else t) for n, t in pairs])
    assert message == f"{name}: received as float16, wanted float32"
