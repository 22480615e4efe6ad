"""What the plan counts, against real tensors: state, activations, logits, rollout weights, sync bytes, operations."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.host_memory import asleep, engine_bytes, pinned_base
from benchmarks.sync_sizes import SHAPES, PaperModel, verl_buffer_mebibytes
from benchmarks.training_sizes import flops_per_token, sizes_of
from hybrid_lora_plugin import apply_allocation
from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.plan import activations
from hybrid_lora_plugin.plan.changes import suggest
from hybrid_lora_plugin.plan.compute import attention_flops, compute, forward_flops, update_flops
from hybrid_lora_plugin.plan.live_bytes import LiveBytes
from hybrid_lora_plugin.plan.logits import logits_bytes
from hybrid_lora_plugin.plan.model import planned_model
from hybrid_lora_plugin.plan.picture import draw_plan
from hybrid_lora_plugin.plan.planner import GIB, PARTS, Machine, chosen_sync, make_plan
from hybrid_lora_plugin.plan.rollout import asleep_bytes, cache_bytes_per_token, engine_sizes, pinned_base_bytes
from hybrid_lora_plugin.plan.run import CHUNKED, COMPILED, EAGER, FULL, HYBRID, LORA, Pass, RolloutRun, Run
from hybrid_lora_plugin.plan.sync_bytes import changed_share, sync_bytes
from hybrid_lora_plugin.plan.table import plan_text
from hybrid_lora_plugin.plan.training import gathered_bytes, state_bytes
from hybrid_lora_plugin.sync.modes import SYNC_MODES
from hybrid_lora_plugin.training.apply import trainable_groups
from hybrid_lora_plugin.training.memory import least_bytes, rank_bytes
from hybrid_lora_plugin.training.reference import BaseSnapshot
from tests.support.allocations import make_allocation
from tests.support.tiny_models import make_tiny_qwen2, tiny_qwen2_config

MACHINE = Machine(80 * GIB, 4 * GIB, None, 312, 0.4)
ROLLOUT = RolloutRun("bfloat16", 1, 0.5, 512, 2048, 32, True, 2, 64 << 20)
SMALL = dict(
    hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300, max_position_embeddings=512,
)  # fmt: skip


def a_run(training=HYBRID, **changes) -> Run:
    values = dict(
        training=training, nodes=1, gpus_per_node=2, shard_ranks=2, strategy="fsdp2", stored_dtype="bfloat16",
        held_dtype="bfloat16" if training == HYBRID else "float32", compute_dtype="bfloat16", reduce_dtype="float32",
        update=Pass(512), log_probs=Pass(512, COMPILED), reference=Pass(512), sequences=8, mini_batches=2,
        prompt_tokens=128, response_tokens=128, steps=10, rollout=ROLLOUT, lora_rank=0 if training == FULL else 4,
        lora_alpha=8, hybrid=HybridLoraConfig() if training == HYBRID else None,
    )  # fmt: skip
    if training == HYBRID:
        values["hybrid"].lora.rank = 4
    return Run(**(values | changes))


def small_config(**changes):
    return Qwen2Config(**(SMALL | dict(tie_word_embeddings=True) | changes))


def test_a_storage_is_counted_until_its_last_tensor_is_gone():
    for device in ("cpu", "meta"):
        weight = torch.zeros(4, 4, device=device, requires_grad=True)
        live = LiveBytes([weight])
        with live:
            once = weight * 2  # 64 bytes, which exp does not need backwards
            twice = once.exp()
            assert live.now() == 128
            view = twice[1:]
            del once, twice
            assert live.now() == 64, "a view of it is there"
            loss = view.sum()
            del view
            assert live.now() == 64 + 4, "exp keeps its result for the backward pass"
            kept = torch.zeros(8, device=device)
            kept.untyped_storage().resize_(0)
            assert live.now() == 64 + 4
            del loss
        assert live.now() == 0 and live.peak == 128


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_state_of_one_rank_is_what_the_real_hybrid_model_holds(tmp_path, stored, tied):
    folder = make_tiny_qwen2(tmp_path / "model", layers=2, hidden=32, on_grid=True, tie_word_embeddings=tied)
    artifact = make_allocation(folder, tmp_path / "allocation")
    from hybrid_lora_plugin import load_allocation

    real = AutoModelForCausalLM.from_pretrained(folder, dtype=stored)
    real = apply_allocation(real, load_allocation(artifact), rank=4, alpha=8)
    snapshot = BaseSnapshot(trainable_groups(real)["full"])
    name = str(stored).removeprefix("torch.")
    hybrid = HybridLoraConfig(allocation=str(artifact))
    run = a_run(held_dtype=name, hybrid=hybrid, shard_ranks=1, gpus_per_node=1)
    model = planned_model(real.config, run, str(folder))
    assert state_bytes(model, run) == rank_bytes(real, snapshot)
    assert not model.drawn and model.counts.full == sum(p.numel() for _, p in trainable_groups(real)["full"])
    if stored == torch.bfloat16:
        assert state_bytes(model, run) == least_bytes(model.counts, 1)


@pytest.mark.parametrize("training", [LORA, FULL])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_of_verls_own_ways_is_what_a_real_model_holds(training, dtype):
    from peft import LoraConfig, get_peft_model

    config, run = small_config(), a_run(training, held_dtype=dtype, shard_ranks=1)
    real = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if training == LORA:
        real = get_peft_model(real, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for parameter in real.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))  # as verl does
    held = state_bytes(planned_model(config, run, "small"), run)
    assert held == rank_bytes(real)


def test_published_measurement_of_the_real_engines_is_met():
    """The table that benchmarks/training_cost.py measured on verl's engines (docs/training-cost.md), in MB."""
    config = Qwen2Config(
        hidden_size=576, num_hidden_layers=8, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=16384, tie_word_embeddings=True,
    )  # fmt: skip
    measured = {
        (FULL, 1): (151.1, 151.1, 302.1), (FULL, 2): (75.5, 75.5, 151.1), (FULL, 4): (37.8, 37.8, 75.5),
        (LORA, 1): (156.3, 5.2, 10.4), (LORA, 2): (78.1, 2.6, 5.2), (LORA, 4): (39.1, 1.3, 2.6),
    }  # fmt: skip
    for (training, ranks), wanted in measured.items():
        run = a_run(training, lora_rank=0 if training == FULL else 16, shard_ranks=ranks)
        held = state_bytes(planned_model(config, run, "benchmark"), run)
        found = (held.frozen + held.trained, held.gradients, held.moments)
        assert [round(size / 1e6, 1) for size in found] == list(wanted), (training, ranks)


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.integers(1, 64),
    training=st.sampled_from([HYBRID, LORA, FULL]),
    strategy=st.sampled_from(["fsdp", "fsdp2"]),
)
def test_more_ranks_never_hold_more_each_and_never_less_together(ranks, training, strategy):
    model = _model(training)
    run = a_run(training, shard_ranks=ranks, strategy=strategy)
    held, more = state_bytes(model, run).total, state_bytes(model, replace(run, shard_ranks=ranks + 1)).total
    assert more <= held and held * ranks >= state_bytes(model, replace(run, shard_ranks=1)).total


_MODELS = {}


def _model(training):
    if training not in _MODELS:
        _MODELS[training] = planned_model(small_config(), a_run(training), "small")
    return _MODELS[training]


# -- activations and logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [HYBRID, LORA, FULL])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("dtype", "gradient"), [("bfloat16", True), ("float32", True), ("bfloat16", False)])
def test_activations_without_memory_are_those_of_a_real_model_of_more_layers(training, checkpointing, dtype, gradient):
    """Planned from models of two and three layers without memory; held by five real ones, with torch's attention."""
    config = small_config()
    run = a_run(training, checkpointing=checkpointing, compute_dtype=dtype)
    planned = activations.layer_activations(config, run, 96, gradient)
    real = _with_memory(activations.few_layers(config, 5, training, run.lora_rank), dtype)
    held = activations.measured(real, 96, checkpointing, gradient, device="cpu")
    # Under an allocation layers differ by which modules have an adapter.
    tolerance = 0.04 if training == HYBRID else 0.002
    assert planned.kept == pytest.approx(held.kept, rel=tolerance)
    assert planned.peak == pytest.approx(held.peak, rel=tolerance)


def _with_memory(model, dtype):
    """The same modules with memory, and torch's own fused attention."""
    model.to_empty(device="cpu")
    for part in (model.config, model.config.get_text_config()):
        part._attn_implementation = "sdpa"
    for name, buffer in model.named_buffers():
        buffer.fill_(1e-3) if "inv_freq" in name else None
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.to(getattr(torch, dtype))


def test_activations_grow_with_tokens_and_fall_with_checkpointing():
    config, run = small_config(), a_run()
    one, two = (activations.layer_activations(config, run, tokens, True) for tokens in (256, 512))
    assert 1.9 < two.peak / one.peak <= 2.0
    without = activations.layer_activations(config, replace(run, checkpointing=False), 256, True)
    assert one.kept < without.kept / 3 and one.peak < without.peak
    assert activations.layer_activations(config, run, 256, False).peak < one.peak


def test_logits_are_a_number_of_tensors_and_a_fused_head_holds_a_chunk():
    run, of, size = a_run(), Pass(1000), 1000 * 300 * 2
    assert logits_bytes(run, of, 300, 2, gradient=False) == size
    assert logits_bytes(run, of, 300, 2, gradient=True) == size
    assert logits_bytes(replace(run, fused_cross_entropy=False), of, 300, 2, gradient=True) == 3 * size
    assert logits_bytes(replace(run, unit_temperature=False), of, 300, 2, gradient=False) == 2 * size
    fused = replace(run, fused_head=True)
    assert logits_bytes(fused, of, 300, 2, gradient=False) == 2 * 4 * 512 * 300
    chunked = logits_bytes(replace(run, entropy_chunk=10), Pass(1000, CHUNKED), 300, 2, gradient=False)
    assert size < chunked < 1.1 * size < logits_bytes(run, Pass(1000, EAGER), 300, 2, gradient=False)


# -- rollout and sync -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_rollout_weights_and_sleep_copies_are_those_of_the_benchmark(name):
    run = a_run(hybrid=HybridLoraConfig(sync="receiver_merge", sync_base="pinned"), lora_rank=16, lora_alpha=32)
    model = planned_model(Qwen2Config(**SHAPES[name]), run, name)
    for workers in (1, 2):
        assert sorted(engine_sizes(model, "bfloat16", workers)) == sorted(engine_bytes(SHAPES[name], workers))
    asleep_here = asleep_bytes(model, replace(ROLLOUT, sleep_level=1))
    # In the order of the model instead of the benchmark's: small tensors share other pieces.
    assert asleep_here == pytest.approx(asleep(SHAPES[name])[1], rel=0.03)
    assert asleep_bytes(model, ROLLOUT) == 0 == asleep_bytes(model, replace(ROLLOUT, sleeps=False, sleep_level=1))
    assert 0.8 * pinned_base(SHAPES[name])[1] < pinned_base_bytes(model, run) < pinned_base(SHAPES[name])[1]


@pytest.mark.verl
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_bytes_of_a_cached_token_are_vllms_own(workers):
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config = Qwen2Config(**SHAPES["Qwen2.5-7B"])
    spec = FullAttentionSpec(block_size=16, num_kv_heads=max(1, 4 // workers), head_size=128, dtype=torch.bfloat16)
    per_token = spec.page_size_bytes / 16 * config.num_hidden_layers
    assert cache_bytes_per_token(config, "bfloat16", workers) == per_token


@pytest.mark.parametrize("name", ["Qwen2.5-1.5B", "Qwen2.5-7B"])
def test_bytes_of_a_sync_are_those_that_the_plugins_sender_streams(name):
    # Four layers: the benchmark goes through every operation of a sync.
    config = Qwen2Config(**SHAPES[name] | {"num_hidden_layers": 4})
    rollout = replace(ROLLOUT, bucket_bytes=verl_buffer_mebibytes() << 20)
    run = a_run(hybrid=HybridLoraConfig(), lora_rank=16, lora_alpha=32, rollout=rollout)
    model, paper = planned_model(config, run, name), PaperModel(name, config)
    assert model.counts == paper.counts and model.drawn
    for mode in SYNC_MODES:
        planned = sync_bytes(model, run, mode)
        if mode == "sparse_merge":
            share = changed_share("bfloat16", run.mini_batches)
            assert planned.sent == paper.changed_elements_bytes(share)[0]
            continue
        sent = paper.sync(mode)
        assert planned.sent == planned.first == sent.sent, mode
        assert planned.buffer == sent.buffer
        assert planned.trainer == pytest.approx(sent.trainer, rel=0.1)
    assert changed_share("bfloat16", 1) == 0.010 and changed_share("bfloat16", 4) == pytest.approx(0.032)


def test_bytes_of_verls_own_syncs_are_those_of_the_benchmark():
    config = Qwen2Config(**SHAPES["Qwen2.5-1.5B"])
    paper = PaperModel("1.5B", config)
    run = a_run(
        LORA, lora_rank=16, lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    model = planned_model(config, run, "1.5B")
    assert chosen_sync(make_plan(model, run, MACHINE, "x").syncs, run).sent == paper.verl_merge_bytes()
    adapter = replace(run, rollout=replace(ROLLOUT, adapter=True))
    assert make_plan(model, adapter, MACHINE, "x").syncs[0].sent == paper.verl_adapter_bytes()


# -- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_operations_are_those_of_the_benchmark(name):
    sizes = sizes_of(name, SHAPES[name], rank=16, ratio=0.1, seed=0)
    said = flops_per_token(sizes)
    assert update_flops(sizes.counts, sizes.embedding, sizes.head, True) == said["hybrid"]


def test_operations_of_a_forward_pass_with_attention_are_those_that_torch_counts():
    config = small_config(num_hidden_layers=3, _attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(5, 69)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    planned = _counts(config)
    # Eager attention computes both halves of each [tokens, tokens].
    said = planned + 2 * attention_flops(config, 64)
    assert counter.get_total_flops() / 64 == pytest.approx(said, rel=0.03)


def _counts(config):
    run = a_run(FULL)
    model = planned_model(config, run, "x")
    return forward_flops(model.counts, model.embedding, model.head)


def test_probe_costs_what_its_options_say_and_nothing_where_none_runs():
    model, run = _model(HYBRID), a_run()
    work = compute(model, run)
    probe = run.hybrid.probe
    assert work.probe_tokens == (probe.warmup_steps + probe.partitions) * probe.batch_size * probe.max_length
    assert work.probe_share == pytest.approx(work.probe_in_steps / 10)
    longer = replace(run, hybrid=replace(run.hybrid, probe=replace(probe, warmup_steps=2 * probe.warmup_steps)))
    assert 1.8 < compute(model, longer).probe / work.probe < 2
    random = replace(run, hybrid=replace(run.hybrid, criterion="random"))
    assert compute(planned_model(small_config(), random, "x"), random).probe == 0
    assert compute(_model(FULL), a_run(FULL)).probe == 0


# -- whole plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [HYBRID, LORA, FULL])
def test_parts_are_known_and_phases_are_those_of_the_run(training):
    run = a_run(training, reference_model=training == FULL)
    plan = make_plan(_model(training), run, MACHINE, "small")
    assert [phase.name for phase in plan.phases] == [
        "rollout", "weight sync", "log-probabilities", "reference", "update"
    ]  # fmt: skip
    for phase in plan.phases:
        assert set(phase.parts) <= set(PARTS) and all(size >= 0 for size in phase.parts.values())
        assert phase.total == sum(phase.parts.values())
    assert plan.fits and plan.fullest.total == max(phase.total for phase in plan.phases)
    assert ("reference model" in plan.host) == (training == FULL)
    without = make_plan(_model(training), replace(run, rollout=None, log_probs=None, reference=None), MACHINE, "x")
    assert [phase.name for phase in without.phases] == ["update"] and not without.syncs


def test_what_is_offloaded_leaves_the_gpu_for_the_host():
    run = a_run()
    plan = make_plan(_model(HYBRID), run, MACHINE, "x")
    away = make_plan(_model(HYBRID), replace(run, param_offload=True, optimizer_offload=True), MACHINE, "x")
    state = plan.state
    moved = state.frozen + state.trained + state.reference + state.moments
    assert plan.phases[0].total - away.phases[0].total == pytest.approx(moved)
    assert sum(away.host.values()) - sum(plan.host.values()) == pytest.approx(run.gpus_per_node * moved)
    assert away.phases[-1].total == plan.phases[-1].total, "an update needs all of it"


def test_an_engine_that_does_not_sleep_stays_in_every_phase():
    run = a_run(rollout=replace(ROLLOUT, sleeps=False))
    for phase in make_plan(_model(HYBRID), run, MACHINE, "x").phases:
        assert phase.parts["engine"] > 0 and phase.parts["cache"] > 0
    asleep_ = make_plan(_model(HYBRID), a_run(), MACHINE, "x")
    assert [bool(phase.parts.get("cache")) for phase in asleep_.phases] == [True, False, False, False, False]
    share = asleep_.phases[0].parts
    assert share["engine"] + share["working"] + share["cache"] == pytest.approx(0.5 * MACHINE.gpu_bytes)


@settings(max_examples=15, deadline=None)
@given(gpus=st.sampled_from([1, 2, 4, 8, 16]), training=st.sampled_from([HYBRID, LORA, FULL]), offload=st.booleans())
def test_more_gpus_never_need_more_of_each(gpus, training, offload):
    def plan(count):
        run = a_run(training, gpus_per_node=count, shard_ranks=count, param_offload=offload)
        return make_plan(_model(training), run, MACHINE, "x")

    for few, many in zip(plan(gpus).phases, plan(2 * gpus).phases, strict=True):
        assert many.total <= few.total


def test_changes_give_what_they_promise_and_stop_when_it_fits():
    """On a run whose overrides are fields of it, so that each is planned anew."""
    names = {
        "update tokens": "tokens", "checkpointing": "checkpointing", "optimizer offload": "optimizer_offload",
        "param offload": "param_offload", "nodes": "nodes",
    }  # fmt: skip
    start = a_run(FULL, checkpointing=False, update=Pass(4096), log_probs=None, reference=None, rollout=None)

    def again(overrides):
        run = start
        for override in overrides:
            name, _, value = override.partition("=")
            if name == "nodes":
                raise ConfigurationError("there are no more")
            if name == "tokens":
                run = replace(run, update=Pass(int(value)))
            else:
                run = replace(run, **{name: value == "true"})
        settings_ = {
            what: (name, run.update.tokens if name == "tokens" else getattr(run, name)) for what, name in names.items()
        }
        return make_plan(_model(FULL), replace(run, settings=settings_), machine, "x")

    machine = replace(MACHINE, reserve_bytes=0)
    machine = replace(machine, gpu_bytes=0.3 * again([]).fullest.total)
    plan = again([])
    changes, after = suggest(plan, again)
    assert not plan.fits and after.fits and changes[0].overrides == ("checkpointing=true",)
    total, given_ = plan.fullest.total, []
    for change in changes:
        given_ += change.overrides
        now = again(given_).fullest.total
        assert (total - now, now) == (pytest.approx(change.saves), pytest.approx(change.total))
        total = now
    text = plan_text(plan, changes, after)
    assert "It does not fit" in text and "With all of them it fits" in text and "checkpointing=true" in text
    unable = replace(machine, gpu_bytes=1.0)
    machine = unable
    changes, after = suggest(again([]), again)
    assert not after.fits and "That is not enough" in plan_text(again([]), changes, after)


def test_no_room_for_a_sequence_and_a_full_host_are_said():
    run = a_run(rollout=replace(ROLLOUT, memory_share=1e-6), optimizer_offload=True)
    plan = make_plan(_model(HYBRID), run, replace(MACHINE, host_bytes=1.0), "x")
    assert any("vLLM does not start" in line for line in plan.problems)
    assert any(line.startswith("host: ") for line in plan.problems)
    short = make_plan(_model(HYBRID), a_run(update=Pass(100)), MACHINE, "x")
    assert short.problems == ["update: micro-batches of 100 tokens cannot hold one sequence of 256"]


def test_text_has_every_figure_and_the_picture_is_drawn_twice_alike(tmp_path):
    plan = make_plan(_model(HYBRID), a_run(notes=("something",)), MACHINE, "models/small")
    text = plan_text(plan)
    for phase in plan.phases:
        assert f"{phase.total / GIB:.2f}" in text and phase.name in text
    for sync in plan.syncs:
        assert f"{sync.sent:,}" in text
    assert "Not planned: something" in text and "It fits" in text and str(plan.counts) in text
    for name in ("a.png", "b.png"):
        draw_plan(plan, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert plan.as_json()["phases"][0]["total"] == plan.phases[0].total


def test_gathered_layers_are_two_and_the_head():
    model, run = _model(HYBRID), a_run()
    layer = max(
        sum(math.prod(shape) for name, shape, _ in model.parameters() if f"layers.{index}." in name)
        for index in range(5)
    )
    assert gathered_bytes(model, run).weights == 2 * (2 * layer + 300 * 64)
    assert gathered_bytes(model, replace(run, keeps_gathered=True)).weights == 2 * model.counts.total


def test_explicit_choice_is_planned_as_it_is():
    config = tiny_qwen2_config(100, layers=2, hidden=32)
    hybrid = HybridLoraConfig(criterion="explicit")
    hybrid.control.modules = ["model.layers.0.self_attn.k_proj"]
    model = planned_model(config, a_run(hybrid=hybrid), "x")
    assert model.allocation.full_names == hybrid.control.modules and not model.drawn


def test_without_verl_one_line_says_so(monkeypatch, capsys):
    from hybrid_lora_plugin.cli.plan import main

    monkeypatch.setitem(sys.modules, "verl", None)
    assert main(["--", "python", "-m", "verl.trainer.main_ppo"]) == 2
    error = capsys.readouterr().err.strip()
    assert "verl is not installed here" in error and "\n" not in error
