"""Engines that probe before they train, on 1 and 2 real gloo ranks: objective ``sft`` and objective ``policy``."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from omegaconf import OmegaConf  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hybrid_lora_plugin import find_candidates, load_allocation  # noqa: E402
from hybrid_lora_plugin.cli.probe import main as probe_command  # noqa: E402
from hybrid_lora_plugin.config import HybridLoraConfig  # noqa: E402
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.probing.layers import attach  # noqa: E402
from hybrid_lora_plugin.probing.measure import draw_partition  # noqa: E402
from hybrid_lora_plugin.training.merge import merge_weight  # noqa: E402
from hybrid_lora_plugin.verl_backend import preflight  # noqa: E402
from hybrid_lora_plugin.verl_backend.losses import gspo_sequence_losses  # noqa: E402
from hybrid_lora_plugin.verl_backend.probe.policy_dataset import prompt_order  # noqa: E402
from hybrid_lora_plugin.verl_backend.probe.resume import data_of_run, has_earlier_allocation  # noqa: E402
from tests.support.engine_worker import make_batch  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2, sums, write_jsonl  # noqa: E402
from tests.support.verl_processes import run_engine  # noqa: E402
from tests.test_engine import assert_rows_close, base_log_probs  # noqa: E402

WORKER = "tests/support/probe_engine_worker.py"
PARTITIONS, PER_BATCH, WARMUP = 5, 2, 3


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on-the-fly")
    return folder, make_tiny_qwen2(folder / "model", layers=2, tie_word_embeddings=False)


# ---------------------------------------------------------------------------------------------- objective sft


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def sft(request, setting):
    folder, model = setting
    rows = write_jsonl(folder / "rows.jsonl", sums(60))
    probe = {"files": [rows], "warmup_steps": 10, "partitions": 4, "batch_size": 4, "max_length": 64, "lr": 5e-3}
    alone = folder / "command"
    if not alone.exists():
        arguments = [f"probe.{name}={value}" for name, value in (probe | {"files": rows}).items()]
        status = probe_command(
            [f"model.path={model}", f"output_dir={alone}", "lora.rank=4", "budget.ratio=0.3", *arguments]
        )
        assert status == 0
    out = folder / f"sft-{request.param}"
    hybrid = {"output_dir": str(out / "allocation"), "probe": probe, "budget": {"ratio": 0.3}}
    return run_engine(out, request.param, worker=WORKER, model=model, hybrid=hybrid) | {"command": alone}


@pytest.mark.verl
def test_workers_probe_before_the_actor_as_the_command_would(sft):
    kept, wanted = load_allocation(sft["folder"] / "allocation"), load_allocation(sft["command"])
    assert sft["full"] == kept.full_names == wanted.full_names
    assert kept.probe.objective == "sft" and kept.budget == wanted.budget
    measured, alone = (
        load_file(path / "sensitivities.safetensors") for path in (sft["folder"] / "allocation", sft["command"])
    )
    torch.testing.assert_close(measured["sensitivities"], alone["sensitivities"], rtol=1e-4, atol=0)
    full = {
        name.rpartition(".")[0].removeprefix("base_model.model.") for name in sft["trainable"] if ".lora_" not in name
    }
    assert full == set(kept.full_names)


@pytest.mark.verl
def test_the_actor_starts_from_the_original_checkpoint(sft, setting):
    base = AutoModelForCausalLM.from_pretrained(setting[1]).state_dict()
    start = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): t for name, t in sft["start"].items()}
    assert all(torch.equal(start[name], tensor) for name, tensor in base.items())
    assert all(tensor.abs().max() == 0 for name, tensor in sft["start"].items() if ".lora_B." in name)


@pytest.mark.verl
def test_a_second_start_uses_the_artifact_and_refuses_other_settings(sft):
    assert sft["full_again"] == sft["full"] and sft["written_again"] == sft["written"]
    assert "hybrid_lora.budget.ratio: 0.5" in sft["refused"] and "hybrid_lora.allocation=" in sft["refused"]


@pytest.mark.verl
def test_workers_try_candidates_before_the_actor_and_a_second_start_uses_the_best(setting):
    folder, model = setting
    rows = write_jsonl(folder / "trial-rows.jsonl", sums(80))
    trial = {"portfolio": ["spread:o_proj", "spread:up_proj+down_proj"], "draws": 1, "steps": 2, "rounds": 2}
    trial |= {"held_out_rows": 10, "batch_size": 4, "full_lr": 1e-3, "lora_lr": 5e-3}
    out = folder / "trial"
    hybrid = {
        "output_dir": str(out / "allocation"), "criterion": "trial", "trial": trial, "budget": {"ratio": 0.3},
        "probe": {"files": [rows], "max_length": 64},
    }  # fmt: skip
    found = run_engine(out, 2, worker=WORKER, model=model, hybrid=hybrid)
    kept = load_allocation(out / "allocation")
    assert found["full"] == kept.full_names == found["full_again"] and found["written_again"] == found["written"]
    assert [one.name for one in kept.trial.candidates] == [*trial["portfolio"], "random:0"]
    assert kept.trial.chosen in kept.trial.alike and kept.trial.lora.losses
    assert "hybrid_lora.budget.ratio: 0.5" in found["refused"]
    start = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): t for name, t in found["start"].items()
    }
    base = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(start[name], tensor) for name, tensor in base.items())


def test_every_setting_that_decides_an_allocation_is_compared(tmp_path, tiny_qwen2):
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(40))
    probe = ["probe.warmup_steps=2", "probe.partitions=4", "probe.batch_size=4", "probe.max_length=64"]
    command = [f"model.path={tiny_qwen2}", f"probe.files={rows}", f"output_dir={tmp_path / 'a'}", "lora.rank=3"]
    assert probe_command([*command, *probe, "budget.ratio=0.3"]) == 0

    def hybrid(*changes):
        same = [*probe, "lora.rank=3", "budget.ratio=0.3", *changes]
        return OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(HybridLoraConfig), OmegaConf.from_dotlist(same))
        )

    assert has_earlier_allocation(tmp_path / "a", hybrid()) and not has_earlier_allocation(
        tmp_path / "nothing", hybrid()
    )
    assert has_earlier_allocation(tmp_path / "a", hybrid("direction=lowest")), "auto was lowest"
    for change in (
        "criterion=alpha", "direction=highest", "normalise=sqrt_dims", "lora.rank=2", "budget.mode=modules",
        "budget.overflow=skip", "budget.ratio=0.2", "probe.objective=policy", "probe.warmup_steps=3",
        "probe.partitions=2", "probe.batch_size=2", "probe.max_length=32", "probe.init=adalora", "probe.seed=1",
        "probe.lr=1e-3", "probe.partitions_per_batch=2",
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=f"hybrid_lora.{change.partition('=')[0]}: "):
            has_earlier_allocation(tmp_path / "a", hybrid(change))


def test_the_rows_of_a_run_may_be_a_pattern_or_of_the_hub_and_a_dry_run_is_no_run(tmp_path):
    hybrid = HybridLoraConfig()
    hybrid.probe.files = [str(tmp_path / "*.jsonl"), "org/name:train[:500]"]
    with pytest.raises(ConfigurationError, match="jsonl' does not exist"):
        preflight._check_probe_data(None, hybrid)
    write_jsonl(tmp_path / "rows.jsonl", sums(1))
    preflight._check_probe_data(None, hybrid)
    hybrid.probe.dry_run = True
    with pytest.raises(ConfigurationError, match="hybrid_lora.probe.dry_run: True .* so it is no run"):
        preflight._check_probe_data(None, hybrid)


def run_of(model):
    """What a run of reinforcement learning is told by, and its model."""
    return OmegaConf.create({"algorithm": {}, "actor_rollout_ref": {"model": {"path": str(model)}, "rollout": {}}})


def test_an_allocation_of_other_weights_or_rows_is_not_taken_up(tmp_path, tiny_qwen2):
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(40))
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2, model)
    settings = [
        "probe.warmup_steps=2",
        "probe.partitions=2",
        "probe.batch_size=4",
        "probe.max_length=64",
        "lora.rank=3",
    ]
    settings += ["budget.ratio=0.3", f"probe.files=[{rows}]"]
    assert probe_command([f"model.path={model}", f"output_dir={tmp_path / 'a'}", *settings]) == 0
    node = OmegaConf.merge(OmegaConf.structured(HybridLoraConfig), OmegaConf.from_dotlist(settings))
    hybrid = OmegaConf.to_object(node)
    config = run_of(model)
    assert has_earlier_allocation(tmp_path / "a", hybrid, lambda: data_of_run(config, hybrid))
    shutil.copytree(model, tmp_path / "copy")
    elsewhere = run_of(tmp_path / "copy")
    assert has_earlier_allocation(tmp_path / "a", hybrid, lambda: data_of_run(elsewhere, hybrid)), (
        "a copy is the same model"
    )
    hybrid.probe.train_on = "all"
    with pytest.raises(ConfigurationError, match="hybrid_lora.probe.train_on: "):
        has_earlier_allocation(tmp_path / "a", hybrid, lambda: data_of_run(config, hybrid))
    hybrid.probe.train_on = "last"
    write_jsonl(tmp_path / "rows.jsonl", sums(41))
    with pytest.raises(ConfigurationError, match="hybrid_lora.probe.files: "):
        has_earlier_allocation(tmp_path / "a", hybrid, lambda: data_of_run(config, hybrid))
    (tmp_path / "rows.jsonl").unlink()
    assert has_earlier_allocation(tmp_path / "a", hybrid, lambda: data_of_run(config, hybrid)), (
        "rows that are gone cannot be compared"
    )
    make_tiny_qwen2(model, seed=1)
    with pytest.raises(ConfigurationError, match="actor_rollout_ref.model.path"):
        has_earlier_allocation(tmp_path / "a", hybrid, lambda: data_of_run(config, hybrid))


# ---------------------------------------------------------------------------------------------- objective policy


@pytest.fixture(scope="module")
def policy_runs(setting):
    folder, model = setting
    runs = {}
    for ranks in (1, 2):
        out = folder / f"policy-{ranks}"
        probe = {"objective": "policy", "warmup_steps": WARMUP, "partitions": PARTITIONS, "lr": 1e-2}
        hybrid = {
            "phase": "probe",
            "output_dir": str(out / "allocation"),
            "probe": probe | {"partitions_per_batch": PER_BATCH},
            "budget": {"ratio": 0.3},
        }
        runs[ranks] = run_engine(
            out, ranks, worker=WORKER, model=model, hybrid=hybrid, mini_batches=2, micro_batch=3 - ranks,
            scoring_steps=-(-PARTITIONS // PER_BATCH),
        )  # fmt: skip
    return runs


@pytest.fixture(params=[1, 2], ids=["1-rank", "2-ranks"])
def policy(request, policy_runs):
    return policy_runs[request.param]


def parts_of(layer_name, weights):
    """A, B, e and alpha of Eq. 7; the engine's e and alpha are distances from 1."""
    return {which: weights[f"{layer_name}.{which}"] + (which in ("e", "alpha")) for which in ("A", "B", "e", "alpha")}


@pytest.mark.verl
def test_warm_up_trains_the_probe_alone_and_the_reference_stays_the_base(policy, setting):
    assert policy["engine"] == "PolicyProbeEngine"
    base = base_log_probs(setting[1])
    assert_rows_close(policy["actor_before"], base, atol=1e-5)
    assert_rows_close(policy["reference_warm"], base, atol=1e-5)
    moved = max(
        abs(a - float(b)) for x, y in zip(policy["actor_warm"], base, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert moved > 0.01
    weights = AutoModelForCausalLM.from_pretrained(setting[1]).state_dict()
    for name, tensor in policy["warm"].items():
        if name.rpartition(".")[2] not in ("A", "B", "e", "alpha"):
            assert torch.equal(tensor, weights[name.replace(".base.", ".")]), name


@pytest.mark.verl
def test_rollouts_of_the_probe_sample_from_base_plus_update(policy, setting):
    base, warm = AutoModelForCausalLM.from_pretrained(setting[1]), policy["warm"]
    candidates = {candidate.name for candidate in find_candidates(base)}
    assert set(policy["synced"]) == set(base.state_dict())
    for name, weight in base.state_dict().items():
        module = name.removesuffix(".weight")
        if module in candidates:
            part = parts_of(module, warm)
            weight = merge_weight(
                weight, part["A"].T, (part["B"] * (part["alpha"] * part["e"])[:, None]).T, 1.0, torch.float32
            )
            assert not torch.equal(weight, base.state_dict()[name])
        assert torch.equal(policy["synced"][name], weight), name


@pytest.mark.verl
def test_scores_are_the_masked_gradients_of_the_policy_loss(policy, setting):
    """Against plain autograd on an unsharded model, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(setting[1]).eval()
    candidates = find_candidates(model)
    layers = attach(model, candidates, 4, seed=0)
    for name, layer in layers.items():
        for which, value in parts_of(name, policy["warm"]).items():
            getattr(layer, which).data.copy_(value)
            getattr(layer, which).requires_grad_(which == "e")
    batch = make_batch(1)
    for row in range(PARTITIONS):
        bucket_a = draw_partition(0, row, len(layers))
        for active in (~bucket_a, bucket_a):
            for layer, on in zip(layers.values(), active.tolist(), strict=True):
                layer.active = on
            losses = []
            columns = (batch[name].unbind() for name in ("input_ids", "responses", "old_log_probs", "advantages"))
            for ids, response, old, advantage in zip(*columns, strict=True):
                log_probs = model(ids[None]).logits[0, -len(response) - 1 : -1].log_softmax(-1)
                taken = log_probs.gather(1, response[:, None])[None, :, 0].double()
                mask = torch.ones_like(taken)
                losses.append(
                    gspo_sequence_losses(taken, old[None].double(), advantage[None].double(), mask, 0.2, 0.2)[0]
                )
            (torch.stack(losses).sum() / len(losses)).backward()
        want = [float((layer.e.detach() * layer.e.grad).abs().mean()) for layer in layers.values()]
        for layer in layers.values():
            layer.e.grad = None
        assert policy["rows"]["sensitivities"][row].tolist() == pytest.approx(want, rel=2e-4, abs=1e-9)


@pytest.mark.verl
def test_scoring_moves_nothing_and_writes_the_artifact(policy):
    assert all(torch.equal(tensor, policy["warm"][name]) for name, tensor in policy["scored"].items())
    assert policy["gradients_left"] == []
    allocation = load_allocation(policy["folder"] / "allocation")
    assert allocation.probe.objective == "policy" and allocation.full_names
    measured = load_file(policy["folder"] / "allocation" / "sensitivities.safetensors")
    assert set(measured) == {"sensitivities", "alpha", "delta_norm"}
    assert torch.equal(measured["sensitivities"], policy["rows"]["sensitivities"])


def losses_of(model):
    """The policy loss of the batch, as the sum that autograd goes back from."""
    batch, losses = make_batch(1), []
    columns = (batch[name].unbind() for name in ("input_ids", "responses", "old_log_probs", "advantages"))
    for ids, response, old, advantage in zip(*columns, strict=True):
        log_probs = model(ids[None]).logits[0, -len(response) - 1 : -1].log_softmax(-1)
        taken = log_probs.gather(1, response[:, None])[None, :, 0].double()
        mask = torch.ones_like(taken)
        losses.append(gspo_sequence_losses(taken, old[None].double(), advantage[None].double(), mask, 0.2, 0.2)[0])
    return torch.stack(losses).sum() / len(losses)


@pytest.mark.verl
def test_gradients_of_the_weights_are_those_of_the_policy_loss(policy, setting):
    """Against plain autograd; modules this small are their own sketches."""
    model = AutoModelForCausalLM.from_pretrained(setting[1]).eval()
    candidates = find_candidates(model)
    losses_of(model).backward()
    want = [float(model.get_submodule(one.name).weight.grad.double().square().sum()) for one in candidates]
    folder = policy["folder"]
    for criterion in ("signal_to_noise", "residual_gradient"):
        measured = load_file(folder / f"allocation-{criterion}" / "sensitivities.safetensors")
        assert {"gradient_signal", "gradient_energy", "sign_agreement"} <= set(measured)
        for row in measured["gradient_energy"]:
            assert row.tolist() == pytest.approx(want, rel=1e-3, abs=1e-12)
        # Every step has the same batch: nothing in it is noise.
        torch.testing.assert_close(measured["gradient_signal"], measured["gradient_energy"], rtol=1e-3, atol=1e-12)
        record = load_allocation(folder / f"allocation-{criterion}").probe
        assert record.method == "weight_gradient" and record.objective == "policy"
        assert record.warmup_steps == (0 if criterion == "signal_to_noise" else 2)
    residual = measured["residual_signal"]
    measured = load_file(folder / "allocation-gradient_norm" / "sensitivities.safetensors")
    assert set(measured) == {"gradient_norm", "alpha", "delta_norm"}
    layers = attach(model, candidates, 4, seed=0)
    assert measured["gradient_norm"].shape[1] == len(layers) and (measured["gradient_norm"] > 0).all()
    # Both of the policy that the same warm-up moved: what the adapters cannot follow is a part of the gradient.
    assert (residual > 0).all() and (residual < measured["gradient_norm"].square()).all()
    norms = torch.tensor(want, dtype=torch.float64).sqrt()
    assert not torch.allclose(measured["gradient_norm"][0], norms, rtol=1e-2)


@pytest.mark.verl
def test_a_policy_probe_finds_its_own_length_also_if_it_was_interrupted(policy):
    stages, record = policy["stages"], load_allocation(policy["folder"] / "allocation-auto").probe
    warm_ups = [number for stage, number in stages if stage == "warm-up"]
    assert warm_ups == list(range(record.warmup_steps)), "the steps of a warm-up are counted without its checks"
    assert stages[:6] == [["warm-up", 0], ["warm-up", 1], ["check", 0], ["check", 1], ["warm-up", 2], ["warm-up", 3]]
    assert policy["stopped"] == 3
    first = [stage for stage, _ in stages].index("scoring")
    assert int(policy["note"]) == first, "where the dataset goes on with held-out prompts"
    assert record.warmup_auto.limit == 7 and record.warmup_auto.every == 2
    assert len(record.warmup_auto.checks) == record.warmup_steps // 2 - 1
    scored = len(stages) - first
    assert record.partitions == min(20, scored * PER_BATCH) and record.partitions_auto.limit == 20
    assert len(record.partitions_auto.checks) == record.partitions // 8
    measured = load_file(policy["folder"] / "allocation-auto" / "sensitivities.safetensors")
    assert len(measured["sensitivities"]) == record.partitions


@pytest.mark.verl
def test_an_interrupted_policy_probe_continues_from_verls_checkpoint(policy):
    assert policy["losses_resumed"] == policy["losses"]
    assert torch.equal(policy["rows_resumed"]["sensitivities"], policy["rows"]["sensitivities"])
    assert (policy["folder"] / "allocation-resumed" / "allocation.json").read_text() == (
        policy["folder"] / "allocation" / "allocation.json"
    ).read_text()


@pytest.mark.verl
def test_two_ranks_score_as_one_rank_does(policy_runs):
    one, two = policy_runs[1], policy_runs[2]
    torch.testing.assert_close(two["rows"]["sensitivities"], one["rows"]["sensitivities"], rtol=1e-3, atol=1e-9)
    names = [load_allocation(run["folder"] / "allocation").full_names for run in (one, two)]
    assert names[0] == names[1]


# ---------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("rows, warmup, scoring", [(40, 3, 2), (40, 25, 5), (12, 1, 2)])
def test_held_out_prompts_come_last_and_are_never_trained_on(rows, warmup, scoring):
    order = prompt_order(rows, 4, warmup, scoring, seed=3)
    trained, held_out = order[: warmup * 4], order[warmup * 4 :]
    assert len(held_out) == len(set(held_out)) == scoring * 4 and not set(trained) & set(held_out)
    assert len(trained) == warmup * 4 and set(order) <= set(range(rows))
    counts = [trained.count(row) for row in set(trained)]
    assert max(counts) - min(counts) <= 1 and order == prompt_order(rows, 4, warmup, scoring, seed=3)


def test_too_few_prompts_are_refused():
    with pytest.raises(ConfigurationError, match="data.train_files: 10 prompts.*hybrid_lora.probe.partitions"):
        prompt_order(10, 4, 5, 2, seed=0)
