"""The three sync modes end to end, with a Hugging Face model of its own as the rollout engine."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin import apply_allocation, load_allocation
from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.names import plain_name, split_factor
from hybrid_lora_plugin.sync.base_weights import STORAGE
from hybrid_lora_plugin.sync.hybrid_weights import original_weights
from hybrid_lora_plugin.sync.live_weight import LiveWeight
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.wire import HEADER, MANIFEST, OutgoingWeights
from hybrid_lora_plugin.training.apply import parts_of, trainable_groups
from hybrid_lora_plugin.training.arrival import Arrival, arrival_of
from hybrid_lora_plugin.training.merge import merge_weight
from hybrid_lora_plugin.training.reference import BaseSnapshot
from hybrid_lora_plugin.training.rounding import NEAREST, Rounding
from tests.support.allocations import make_allocation
from tests.support.sync_models import (
    ALPHA,
    DTYPES,
    IDS,
    MODES,
    PARTIAL,
    RANK,
    SCALING,
    Case,
    HuggingFaceRollout,
    TransferBuffer,
    deliver,
    each_case,
    each_dtype,
    each_mode,
    each_partial_mode,
    full_names,
    header_for,
    layers_of,
    outgoing,
    pair_of,
    receiver_for,
    saved_as,
    sync,
    take_all,
    tensors_of,
    tied_and_untied,
    update,
)
from tests.support.tiny_models import make_tiny_qwen2

STOCHASTIC = Rounding("stochastic", 11)

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
    merged = {f"{module}.weight" for module in parts_of(hybrid).lora_modules}
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
    assert set(parts_of(hybrid).lora_modules) == set(allocation.lora_names)
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


@each_dtype
def test_every_sync_proves_another_modules_merge_to_be_the_trainers(hybrid, tiny_qwen2, dtype):
    modules = parts_of(hybrid).lora_modules
    plan = SyncPlan(SCALING, dtype, "cpu")
    mine = [sync_mode("receiver_merge").merged_digest(hybrid, module, plan) for module in modules]
    assert [list(digest) for digest in mine] == [[f"{module}.weight"] for module in modules]
    pairs = list(tensors_of(hybrid, "receiver_merge", dtype).items())
    for merged in mine:
        take_all(
            receiver_for(hybrid, HuggingFaceRollout(tiny_qwen2, dtype), "receiver_merge", dtype, merged=merged), pairs
        )


def test_a_receiver_that_merges_to_other_bits_is_caught(hybrid, tiny_qwen2, monkeypatch):
    """As an engine would whose matrix product is not the trainer's."""
    pairs = list(tensors_of(hybrid, "receiver_merge").items())
    plan = SyncPlan(SCALING, torch.float32, "cpu")
    merged = sync_mode("receiver_merge").merged_digest(hybrid, parts_of(hybrid).lora_modules[3], plan)

    def rounded(base, lora_a, lora_b, scaling, dtype, *rest, **place):
        return merge_weight(base, lora_a.bfloat16(), lora_b.bfloat16(), scaling, dtype, *rest, **place)

    monkeypatch.setattr("hybrid_lora_plugin.sync.receiver_merge.merge_weight", rounded)
    with pytest.raises(WeightSyncError, match=f"{parts_of(hybrid).lora_modules[3]}.weight: merged here to other bits"):
        take_all(receiver_for(hybrid, HuggingFaceRollout(tiny_qwen2), "receiver_merge", merged=merged), pairs)


class ShardedRollout(HuggingFaceRollout):
    """One of several tensor-parallel workers: of projections whose input is sharded it holds columns, else rows."""

    def __init__(self, folder, dtype, worker, workers):
        super().__init__(folder, dtype)
        self.worker, self.workers, self.parts = worker, workers, []

    def live(self, name):
        whole = self.parameters[name].detach()
        dimension = int(name.endswith(("o_proj.weight", "down_proj.weight")))
        if ".layers." not in name or whole.dim() == 1:
            return super().live(name)
        length = whole.shape[dimension] // self.workers
        view = whole.narrow(dimension, self.worker * length, length)
        return LiveWeight(view, tuple(whole.shape), dimension, self.worker * length)

    def load_part(self, name, part):
        live = self.live(name)
        assert (part.shape, part.dtype) == (live.view.shape, live.view.dtype), name
        live.view.copy_(part)
        self.parts.append(name)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("block", [(256, 1024), (24, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tensor_parallel_worker_merges_its_part_to_the_bits_of_the_whole(cases, monkeypatch, dtype, block, workers):
    monkeypatch.setattr("hybrid_lora_plugin.training.merge.BLOCK", block)
    case = cases["tied"]
    hybrid = case.hybrid()
    modules = parts_of(hybrid).lora_modules
    wanted, pairs = (tensors_of(hybrid, mode, dtype, STOCHASTIC) for mode in ("merge", "receiver_merge"))
    plan = SyncPlan(SCALING, dtype, "cpu", STOCHASTIC)
    merged = sync_mode("receiver_merge").merged_digest(hybrid, modules[workers], plan)
    given = {"rounding_mode": STOCHASTIC.mode, "rounding_seed": STOCHASTIC.seed, "merged": merged}
    for worker in range(workers):
        rollout = ShardedRollout(case.folder, dtype, worker, workers)
        take_all(receiver_for(hybrid, rollout, "receiver_merge", dtype, **given), pairs.items())
        assert sorted(rollout.parts) == sorted(f"{module}.weight" for module in modules)
        for name in rollout.parts:
            live = rollout.live(name)
            assert torch.equal(live.view, live.part_of(wanted[name])), name


def test_a_part_that_is_merged_to_other_bits_than_the_whole_is_caught(hybrid, tiny_qwen2, monkeypatch):
    module = parts_of(hybrid).lora_modules[3]
    plan = SyncPlan(SCALING, torch.float32, "cpu")
    merged = sync_mode("receiver_merge").merged_digest(hybrid, module, plan)

    def other(*arguments, corner=(0, 0)):
        weight = merge_weight(*arguments, corner=corner)
        return weight if corner == (0, 0) else weight * (1 + 2.0**-20)

    monkeypatch.setattr("hybrid_lora_plugin.sync.receiver_merge.merge_weight", other)
    rollout, pairs = ShardedRollout(tiny_qwen2, torch.float32, 1, 2), tensors_of(hybrid, "receiver_merge").items()
    with pytest.raises(WeightSyncError, match=f"{module}.weight: merged here to other bits"):
        take_all(receiver_for(hybrid, rollout, "receiver_merge", merged=merged), pairs)


# -- 16 bits --------------------------------------------------------------------------------------------------------

SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def loaded_by(hybrid, folder, mode, dtype, rounding=STOCHASTIC):
    """What a rollout engine holds after one sync."""
    rollout = HuggingFaceRollout(folder, dtype)
    header = header_for(hybrid, mode, dtype, rounding_mode=rounding.mode, rounding_seed=rounding.seed)
    deliver(OutgoingWeights(header, outgoing(hybrid, mode, dtype, rounding)), rollout)
    return rollout.parameters


@SIXTEEN
@each_case
def test_both_ends_round_to_the_same_bits(case, dtype):
    hybrid = case.hybrid()
    here, there = (loaded_by(hybrid, case.folder, mode, dtype) for mode in ("merge", "receiver_merge"))
    nearest = loaded_by(hybrid, case.folder, "merge", dtype, NEAREST)
    differ = 0
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name]), name
        differ += not torch.equal(tensor, nearest[name])
    assert differ == len(parts_of(hybrid).lora_modules) + len(full_names(hybrid)), "what trains, and nothing else"


@SIXTEEN
def test_full_modules_are_rounded_alike_in_every_mode(hybrid, tiny_qwen2, dtype):
    streams = [tensors_of(hybrid, mode, dtype, STOCHASTIC) for mode in MODES]
    for name in full_names(hybrid):
        assert all(torch.equal(stream[name], streams[0][name]) for stream in streams), name


# With a checkpoint that the rollout engine's type does not hold, most of W0 lies between two of its values.


def moved_a_little(case, size=1e-6):
    """A hybrid model, its full modules' original values, and which of their elements have moved: every second."""
    hybrid, generator = case.hybrid(), torch.Generator().manual_seed(2)
    plain = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).state_dict()
    full = trainable_groups(hybrid)["full"]
    moved = {name: torch.rand(parameter.shape, generator=generator) < 0.5 for name, parameter in full}
    with torch.no_grad():
        for name, parameter in full:
            parameter.copy_(plain[plain_name(name)])
            parameter += size * moved[name] * torch.randn(parameter.shape, generator=generator)
    return hybrid, BaseSnapshot((name, plain[plain_name(name)]) for name, _ in full).values, moved


@each_mode
@SIXTEEN
def test_where_training_left_a_full_module_alone_it_is_what_the_engine_loaded(cases, mode, dtype):
    hybrid, originals, moved = moved_a_little(cases["tied"])
    sent = dict(sync_mode(mode).outgoing(hybrid, SyncPlan(SCALING, dtype, "cpu", STOCHASTIC, originals=originals)))
    for name, original in originals.items():
        assert not torch.equal(original, original.to(dtype).float()), "or this shows nothing"
        still = ~moved[name]
        assert torch.equal(sent[plain_name(name)][still], original.to(dtype)[still]), name


def test_the_update_of_a_full_module_arrives_with_no_noise_of_its_original(cases):
    """A step of 1e-6 beside steps of bfloat16 of 1e-4: the rounding of the original would be fifty times the update."""
    hybrid, originals, _ = moved_a_little(cases["tied"])
    arrival = Arrival(sampled=None)
    for seed in range(24):
        plan = SyncPlan(SCALING, torch.bfloat16, "cpu", Rounding("stochastic", seed), arrival, originals)
        for _ in sync_mode("merge").outgoing(hybrid, plan):
            pass
    sums = arrival.sums()["full"]
    arrived, noise = arrival_of(sums)
    assert noise < 20
    # The larger an update, the larger its error: so the mean's is twice what it were if the two had nothing in common.
    assert arrived == pytest.approx(1, abs=4 * 2 * noise / sums[3] ** 0.5)
    assert 8 * noise / sums[3] ** 0.5 < 0.25


@SIXTEEN
def test_originals_change_nothing_where_the_engine_s_type_holds_them(cases, dtype):
    hybrid, originals, _ = moved_a_little(cases["bf16"])
    held = {name: value for name, value in originals.items() if torch.equal(value.to(dtype).float(), value.float())}
    assert len(held) == len(originals) or dtype == torch.float16
    plans = [SyncPlan(SCALING, dtype, "cpu", STOCHASTIC, originals=given) for given in ({}, held)]
    without, with_them = (dict(sync_mode("merge").outgoing(hybrid, plan)) for plan in plans)
    assert all(torch.equal(tensor, with_them[name]) for name, tensor in without.items())


@each_mode
def test_a_weight_that_float16_cannot_hold_is_refused_by_name(hybrid, mode):
    """Trained or not, factor or weight."""
    name, parameter = trainable_groups(hybrid)["full"][0]
    with torch.no_grad():
        parameter[0] += 70000
    with pytest.raises(WeightSyncError, match=f"^{plain_name(name)}: .*float16"):
        tensors_of(hybrid, mode, torch.float16, STOCHASTIC)


@pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("kind", ["full", "lora"])
@each_mode
def test_a_weight_that_is_no_number_is_refused_by_name_in_bfloat16(hybrid, tiny_qwen2, mode, kind, value, rounding):
    name, parameter = trainable_groups(hybrid)[kind][1]
    with torch.no_grad():
        parameter.view(-1)[3] = value
    module = plain_name(name).split(".lora_")[0]
    with pytest.raises(WeightSyncError, match=f"^{module}.*(no number|does not fit)"):
        loaded_by(hybrid, tiny_qwen2, mode, torch.bfloat16, rounding)


def test_a_frozen_weight_that_float16_cannot_hold_is_refused_by_name(hybrid):
    with torch.no_grad():
        hybrid.get_input_embeddings().weight[3, 3] = -70000
    with pytest.raises(WeightSyncError, match=r"^model\.embed_tokens\.weight: .*float16"):
        tensors_of(hybrid, "merge", torch.float16, STOCHASTIC)


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
