"""Zeroth order in the engine that verl's registry gives, on 1 and 2 real gloo ranks, in float32 and bfloat16."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from transformers import AutoModelForCausalLM  # noqa: E402
from verl.trainer.ppo.core_algos import get_policy_loss_fn  # noqa: E402
from verl.workers.config import FSDPActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss, sft_loss  # noqa: E402

from hybrid_lora_plugin import load_allocation  # noqa: E402
from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.names import plain_name  # noqa: E402
from hybrid_lora_plugin.training.checkpoint import load_description, load_moves, require_same_moves  # noqa: E402
from hybrid_lora_plugin.training.export import export_checkpoint  # noqa: E402
from hybrid_lora_plugin.training.merge import merge_weight  # noqa: E402
from hybrid_lora_plugin.training.model_card import CARD  # noqa: E402
from hybrid_lora_plugin.training.zeroth_order.choice import moving_weights  # noqa: E402
from hybrid_lora_plugin.training.zeroth_order.move_log import replayed  # noqa: E402
from hybrid_lora_plugin.training.zeroth_order.signs import signs  # noqa: E402
from hybrid_lora_plugin.verl_backend.requirement_rules import SURROGATES  # noqa: E402
from hybrid_lora_plugin.verl_backend.surrogate import surrogate_of, unclipped  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.engine_worker import make_batch  # noqa: E402
from tests.support.folders import assert_same_files  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import run_engine  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.ranks]

WORKER = "tests/support/zeroth_order_engine_worker.py"
#: measures and moves nothing: even the largest slope times this is lost in float32
STILL = {"lr": 1e-30, "directions": 8}
BFLOAT16 = {"rollout_dtype": "bfloat16", "param_dtype": "bf16"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zeroth-order-engine")
    models = {"float32": make_tiny_qwen2(folder / "float32", tie_word_embeddings=False)}
    models["bfloat16"] = shutil.copytree(models["float32"], folder / "bfloat16")
    AutoModelForCausalLM.from_pretrained(models["float32"]).bfloat16().save_pretrained(models["bfloat16"])
    allocations = {dtype: make_allocation(model, folder / f"{dtype}-allocation") for dtype, model in models.items()}

    def run(name, ranks, dtype="float32", **more):
        more = {"model": str(models[dtype]), "allocation_folder": str(allocations[dtype])} | more
        return run_engine(folder / name, ranks, worker=WORKER, **more) | {"base": models[dtype], "ranks": ranks}

    return run


@pytest.fixture(scope="module")
def one(start):
    return start("one", 1, zeroth_order={}, save="trainable")


@pytest.fixture(scope="module")
def two(start):
    return start("two", 2, zeroth_order={}, save="trainable")


@pytest.fixture(scope="module")
def half(start):
    """A base held in bfloat16, bf16 autocast and rollouts, two ranks, verl's own shards; the embedding moves too."""
    moved = {"modules": ["up_proj", "o_proj", "model.embed_tokens"], "lr": 3e-3}
    return start("half", 2, "bfloat16", zeroth_order=moved, save="full", **BFLOAT16)


@pytest.fixture(scope="module", params=["one", "two", "half"], ids=["fp32-1-rank", "fp32-2-ranks", "bf16-2-ranks"])
def result(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def still(request, start):
    return start(f"still{request.param}", request.param, zeroth_order=STILL, only_steps=True)


def log_of(result):
    return load_moves(result["folder"] / "checkpoint" / "hybrid_lora")


def base_of(result):
    return AutoModelForCausalLM.from_pretrained(result["base"]).state_dict()


def held(result, when):
    """Frozen weights by plain name, as the model held them."""
    return {
        plain_name(name): tensor
        for name, tensor in result[when].items()
        if ".lora_" not in name and not name.startswith("master/")
    }


# -- the loss that slopes are measured of -----------------------------------------------------------------------------


def actor(kind, mode, **changes):
    values = dict(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=kind),
        loss_agg_mode=mode,
    )
    return FSDPActorConfig(**(values | changes))


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_surrogate_is_verls_loss_where_nothing_is_clipped(kind, mode, weighted):
    import hybrid_lora_plugin.verl_backend.registration  # noqa: F401

    generator = torch.Generator().manual_seed(3)
    old, new, weights = (torch.rand(5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 0, 5])[:, None]
    advantages = torch.randn(5, 1, generator=generator, dtype=torch.float64).expand(5, 7)
    config = actor(kind, mode, clip_ratio=1e9, clip_ratio_low=1e9, clip_ratio_high=1e9, clip_ratio_c=1e9)
    batch = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 11, "loss_scale_factor": None}
    config.global_batch_info.update(batch)
    weights = weights if weighted else None
    wanted, _ = get_policy_loss_fn(kind)(
        old_log_prob=old,
        log_prob=new,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=weights,
    )
    found = unclipped(kind, new, old, advantages, mask, weights, mode, batch)
    assert found.dtype == torch.float64 and found.item() == pytest.approx(wanted.item(), rel=1e-7)
    # What is masked may be anything.
    old = torch.where(mask, old, torch.nan)
    assert unclipped(kind, new, old, advantages, mask, weights, mode, batch).item() == pytest.approx(found.item())


def test_another_loss_is_refused_by_name():
    from functools import partial

    assert surrogate_of(partial(ppo_loss, config=actor("vanilla", "token-mean")))
    with pytest.raises(ConfigurationError, match=r"loss_mode: 'gpg' does not work .* give one of vanilla, gspo"):
        surrogate_of(partial(ppo_loss, config=actor("gpg", "token-mean")))
    for other in (partial(sft_loss, config=actor("vanilla", "token-mean")), lambda **_: None):
        with pytest.raises(ConfigurationError, match="hybrid_lora.zeroth_order.enabled: True, but this run trains"):
            surrogate_of(other)


def projections(result) -> list[float]:
    """The exact float64 gradient of the surrogate, without clipping, along the direction of each move."""
    allocation, batch, found = load_allocation(result["folder"].parent / "float32-allocation"), make_batch(1), []
    names = [f"{name}.weight" for name in allocation.lora_names]
    for step in range(2):
        model = AutoModelForCausalLM.from_pretrained(result["base"], dtype=torch.float64).eval()
        weights = {name: tensor.double() for name, tensor in held(result, f"step{step}").items()}
        for module in allocation.lora_names:
            factors = [result[f"step{step}"][f"base_model.model.{module}.lora_{k}.default.weight"] for k in "BA"]
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + 2 * factors[0].double() @ factors[1].double()
        model.load_state_dict(weights)
        losses = []
        columns = (batch[name].unbind() for name in ("input_ids", "responses", "old_log_probs", "advantages"))
        for ids, response, old, advantage in zip(*columns, strict=True):
            log_probs = model(ids[None]).logits[0, -len(response) - 1 : -1].log_softmax(-1)
            log_probs = log_probs.gather(1, response[:, None])[:, 0]
            losses.append(-advantage[0].double() * (log_probs - old.double()).mean().exp())
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(torch.stack(losses).mean(), [parameters[name] for name in names])
        for _, seed, _, _ in (move for move in result["moves"] if move[0] == step):
            pairs = zip(names, gradients, strict=True)
            found.append(sum((signs(seed, n, 0, g.numel()).double() @ g.flatten()).item() for n, g in pairs))
    return found


def test_c_is_the_projection_of_the_exact_gradient_of_the_surrogate(still):
    slopes = torch.tensor([slope for _, _, slope, _ in still["moves"]], dtype=torch.float64)
    exact = torch.tensor(projections(still), dtype=torch.float64)
    assert len(slopes) == 16
    found = torch.corrcoef(torch.stack([slopes, exact]))[0, 1].item()
    regression = (slopes @ exact / exact.square().sum()).item()
    print(f"{still['ranks']} ranks: correlation {found:.6f}, slope {regression:.4f}")
    assert found >= 0.999 and abs(regression - 1) < 0.02


def test_measuring_changes_nothing_else_of_the_training_and_is_off_by_default(start, still):
    if still["ranks"] == 1:
        pytest.skip("two ranks are compared")
    plain = start("plain", 2, only_steps=True)
    assert not any(name.startswith("zeroth") for step in plain["steps"] for name in step)
    for found, wanted in zip(still["steps"], plain["steps"], strict=True):
        assert {name: value for name, value in found.items() if not name.startswith("zeroth")} == wanted
    for step in ("step0", "step1"):
        assert all(torch.equal(still[step][name], tensor) for name, tensor in plain[step].items())


def test_two_ranks_measure_what_one_does(one, two):
    assert [move[1] for move in one["moves"]] == [move[1] for move in two["moves"]]
    slopes = ([move[2] for move in result["moves"]] for result in (one, two))
    assert next(slopes) == pytest.approx(next(slopes), rel=1e-2, abs=2e-3)


# -- what moves, and what does not ------------------------------------------------------------------------------------


def test_only_the_named_frozen_weights_move_and_a_replay_of_the_log_gives_them(result):
    log, base, full = log_of(result), base_of(result), load_allocation(result["folder"] / "checkpoint/hybrid_lora")
    assert len(log.moves) == len(result["saved_moves"]) == 4 and log.steps == 2
    expected = replayed(log, {name: base[name] for name in log.shapes})
    before, after = held(result, "start"), held(result, "trained")
    for name in before:
        if name in log.shapes:
            assert torch.equal(result["trained"][f"master/{name}"], expected[name].view(before[name].shape)), name
            assert torch.equal(after[name], expected[name].to(base[name].dtype).float()), name
            assert not torch.equal(after[name], before[name]), name
        elif name.rpartition(".")[0] not in full.full_names:
            assert torch.equal(after[name], before[name]), name
    assert set(log.dtypes.values()) == {next(iter(base.values())).dtype}


def test_the_reference_keeps_the_whole_base_bit_for_bit(result):
    assert result["reference_after"] == result["reference_before"]
    assert result["actor"] != result["reference_after"] and result["actor"] == result["actor_again"]
    assert all(torch.equal(result["after_error"][name], tensor) for name, tensor in result["trained"].items())


def test_metrics_say_what_a_step_found_and_cost(result):
    for step, number in zip(result["steps"], range(2), strict=True):
        slopes = [slope for of_step, _, slope, _ in result["moves"] if of_step == number]
        assert step["zeroth_order/slope"] == pytest.approx(sum(slopes) / 2)
        assert step["zeroth_order/slope_spread"] == pytest.approx((sum(s * s for s in slopes) / 2) ** 0.5)
        assert step["zeroth_order/skipped"] == 0 and step["zeroth_order/seconds"] > 0
        # Masters in float32, and base values in bfloat16 where that loses nothing.
        elements = sum(torch.Size(shape).numel() for shape in log_of(result).shapes.values())
        wide = 4 if log_of(result).dtypes.popitem()[1] == torch.float32 else 2
        assert step["zeroth_order/bytes"] * result["ranks"] == pytest.approx((4 + wide) * elements, rel=0.05)


# -- sync, checkpoints, export ----------------------------------------------------------------------------------------


def test_a_sync_sends_what_moved_with_the_adapters_on_it(one):
    allocation, synced, after = load_allocation(one["folder"] / "checkpoint/hybrid_lora"), one["synced"], one["trained"]
    assert [header["mode"] for header in one["headers"]] == ["merge"]
    for module in allocation.lora_names:
        prefix = f"base_model.model.{module}"
        factors = (after[f"{prefix}.lora_{kind}.default.weight"] for kind in "AB")
        wanted = merge_weight(after[f"{prefix}.base_layer.weight"], *factors, 2.0, torch.float32)
        assert torch.equal(synced[f"{module}.weight"], wanted), module


def test_an_export_and_hf_model_are_what_the_rollout_engine_got(result, tmp_path):
    checkpoint = result["folder"] / "checkpoint"
    done = export_checkpoint(checkpoint, tmp_path / "out")
    assert any("4 moves of" in note for note in done.notes)
    exported = AutoModelForCausalLM.from_pretrained(done.folder)
    assert all(torch.equal(tensor, result["synced"][name]) for name, tensor in exported.state_dict().items())
    (done.folder / CARD).unlink()
    assert_same_files(checkpoint / "huggingface", done.folder)


@pytest.mark.parametrize("format", ["adapter", "delta"])
def test_formats_that_leave_the_base_as_it_is_are_refused(one, format, tmp_path):
    with pytest.raises(ConfigurationError, match=rf"format: '{format}' leaves the base model as it is.*format=merged"):
        export_checkpoint(one["folder"] / "checkpoint", tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_an_export_in_fewer_bits_says_what_becomes_of_small_moves(one, tmp_path):
    notes = export_checkpoint(one["folder"] / "checkpoint", tmp_path / "out", dtype="bfloat16").notes
    assert any("rounded to nearest in bfloat16" in note and "dtype=float32" in note for note in notes)


def test_the_base_model_of_a_run_is_known_while_it_moves(one, two):
    assert one["identity"] == two["identity"]


def test_a_checkpoint_loaded_by_the_same_engine_gives_back_all_of_it(result):
    assert any(not torch.equal(result["end"][name], tensor) for name, tensor in result["trained"].items())
    assert all(torch.equal(result["again"][name], tensor) for name, tensor in result["trained"].items())


@pytest.mark.parametrize(("saved", "ranks"), [("one", 2), ("two", 1), ("half", 2)])
def test_another_process_goes_on_from_the_same_weights_bit_for_bit(start, request, saved, ranks):
    before = request.getfixturevalue(saved)
    more = {"zeroth_order": {}, "save": "trainable"}
    if saved == "half":
        moved = {"modules": ["up_proj", "o_proj", "model.embed_tokens"], "lr": 3e-3}
        more = {"dtype": "bfloat16", "zeroth_order": moved, **BFLOAT16}
    wrong = str(request.getfixturevalue("two" if saved == "one" else "one")["folder"] / "other modules")
    more |= {"resume": str(before["folder"] / "checkpoint"), "wrong": wrong}
    after = start(f"{saved}-to-{ranks}", ranks, **more)
    assert after["said"] == "accepted"
    assert ("not the base model" if saved == "half" else "give the model and the modules of the run") in after[
        "refused"
    ]
    assert all(torch.equal(after["resumed"][name], tensor) for name, tensor in before["trained"].items())
    assert after["moves"][:4] == before["saved_moves"]
    assert [move[:2] for move in after["moves"]] == [move[:2] for move in before["moves"]], "the same directions"
    if ranks == before["ranks"]:
        assert after["moves"] == before["moves"]
        assert all(torch.equal(after["end"][name], tensor) for name, tensor in before["end"].items())


def test_moved_weights_are_refused_where_they_would_be_taken_for_the_base(one, tmp_path):
    kept = one["folder"] / "checkpoint" / "hybrid_lora"
    assert load_description(kept).schema_version == 4, "older readers know no moves"
    require_same_moves(kept, enabled=True)
    with pytest.raises(ConfigurationError, match="zeroth_order.enabled: False, and the frozen weights of the check"):
        require_same_moves(kept, enabled=False)
    shutil.copytree(one["folder"] / "checkpoint", tmp_path / "lost")
    (tmp_path / "lost/hybrid_lora/zeroth_order.json").unlink()
    for read in (lambda: load_moves(tmp_path / "lost/hybrid_lora"), lambda: export_checkpoint(tmp_path / "lost", "x")):
        with pytest.raises(ConfigurationError, match="zeroth_order.json.* cannot be read"):
            read()


# -- which modules ----------------------------------------------------------------------------------------------------


def test_names_of_modules_are_resolved_and_those_that_match_nothing_refused(one):
    model = AutoModelForCausalLM.from_pretrained(one["base"])
    candidates = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"]

    def chosen(names, full=()):
        return [name for name, _ in moving_weights(model, names, candidates, full, "option")]

    assert chosen([]) == [f"{name}.weight" for name in (candidates[2], *candidates[:2])]
    assert chosen(["up_proj"], [candidates[0]]) == [f"{candidates[1]}.weight"]
    assert chosen(["model.norm", "up_proj"])[-1] == "model.norm.weight"
    for names, said in ((["up"], "option: 'up' matches no module"), (["model.layers.0"], "matches no module")):
        with pytest.raises(ConfigurationError, match=said):
            chosen(names)
    with pytest.raises(ConfigurationError, match="option: 'up_proj' is fully tuned under this allocation"):
        chosen(["up_proj"], candidates[:2])
