"""The engine that verl's registry gives, on 1 and 2 real gloo ranks, against plain single-process references."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hybrid_lora_plugin import load_allocation  # noqa: E402
from hybrid_lora_plugin.base_identity import weight_digests  # noqa: E402
from hybrid_lora_plugin.names import plain_name  # noqa: E402
from hybrid_lora_plugin.sync.base_weights import base_digests  # noqa: E402
from hybrid_lora_plugin.training.export import apply_delta, export_checkpoint  # noqa: E402
from hybrid_lora_plugin.training.merge import merge_weight  # noqa: E402
from hybrid_lora_plugin.training.model_card import CARD  # noqa: E402
from hybrid_lora_plugin.training.recorded_base import read_base_weights  # noqa: E402
from hybrid_lora_plugin.verl_backend.losses import gspo_sequence_losses  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.engine_worker import make_batch  # noqa: E402
from tests.support.folders import assert_same_files  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import run_engine  # noqa: E402

pytestmark = pytest.mark.verl


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    model = make_tiny_qwen2(folder / "model", layers=2, tie_word_embeddings=False)
    make_allocation(model, folder / "other_allocation", seed=5)
    return folder, model, make_allocation(model, folder / "allocation")


@pytest.fixture(scope="module")
def one(setting):
    folder, model, allocation = setting
    return run_engine(
        folder / "one",
        1,
        model=model,
        allocation=allocation,
        micro_batch=2,
        other_allocation=folder / "other_allocation",
    )


@pytest.fixture(scope="module")
def two(setting):
    """Two ranks, one row a micro-batch, and verl's default gradient checkpointing."""
    folder, model, allocation = setting
    return run_engine(
        folder / "two",
        2,
        model=model,
        allocation=allocation,
        micro_batch=1,
        gradient_checkpointing=True,
        other_allocation=folder / "other_allocation",
    )


@pytest.fixture(scope="module")
def fsdp1(setting):
    """verl's own default strategy, on two ranks."""
    folder, model, allocation = setting
    return run_engine(
        folder / "fsdp1",
        2,
        model=model,
        allocation=allocation,
        micro_batch=2,
        strategy="fsdp",
        other_allocation=folder / "other_allocation",
    )


@pytest.fixture(scope="module", params=["one", "two", "fsdp1"], ids=["1-rank", "2-ranks", "fsdp1-2-ranks"])
def result(request):
    return request.getfixturevalue(request.param)


def base_log_probs(folder):
    """Log-probabilities of the response tokens under a plain Hugging Face model, row by row."""
    model, batch = AutoModelForCausalLM.from_pretrained(folder).eval(), make_batch(1)
    rows = []
    with torch.no_grad():
        for ids, response in zip(batch["input_ids"].unbind(), batch["responses"].unbind(), strict=True):
            log_probs = model(ids[None]).logits[0, -len(response) - 1 : -1].log_softmax(-1)
            rows.append(log_probs.gather(1, response[:, None])[:, 0])
    return rows


def assert_rows_close(rows, expected, atol):
    for row, wanted in zip(rows, expected, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.as_tensor(wanted), rtol=0, atol=atol)


def test_registry_gives_our_engine_to_a_hybrid_model(result):
    assert result["engine"] == "hybrid_lora_plugin.verl_backend.engine.HybridLoraEngine"


def test_trainables_are_fp32_and_exactly_the_allocations(result, setting):
    allocation = load_allocation(setting[2])
    assert set(result["trainable"].values()) == {"torch.float32"}
    names = {plain_name(name) for name in result["trainable"]}
    full = {name.rpartition(".")[0] for name in names if ".lora_" not in name}
    assert full == set(allocation.full_names)
    assert {name.partition(".lora_")[0] for name in names if ".lora_" in name} == set(allocation.lora_names)


def test_actor_starts_as_the_base_model(result, setting):
    assert_rows_close(result["actor_before"], base_log_probs(setting[1]), atol=1e-5)


def test_reference_is_base_model_after_full_weights_moved(result, setting):
    moved = [n for n in result["trained"] if not torch.equal(result["trained"][n], result["start"][n])]
    assert set(moved) == set(result["trainable"]), "every trainable weight moved, and nothing else"
    assert_rows_close(result["reference_after"], base_log_probs(setting[1]), atol=1e-5)
    far = max(
        abs(a - b)
        for x, y in zip(result["actor_after"], result["reference_after"], strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert far > 0.05, "the actor itself has gone somewhere else"


def test_reference_of_a_resumed_run_is_still_the_base_model(result, setting):
    assert_rows_close(result["reference_resumed"], base_log_probs(setting[1]), atol=1e-5)


def test_actor_is_bit_equal_again_after_the_reference_pass_and_after_one_that_failed(result):
    assert result["actor_again"] == result["actor_after"] == result["actor_after_error"]


def test_synced_weights_are_the_fp32_merge_of_the_untouched_base(result, setting):
    allocation, trained, synced = load_allocation(setting[2]), result["trained"], result["synced"]
    base = AutoModelForCausalLM.from_pretrained(setting[1]).state_dict()
    assert result["peft_config"] is None and set(synced) == set(base)
    for name in base:
        module = name.removesuffix(".weight")
        prefix = f"base_model.model.{module}"
        if module in allocation.lora_names:
            factors = (trained[f"{prefix}.lora_{kind}.default.weight"] for kind in "AB")
            expected = merge_weight(base[name], *factors, 8 / 4, torch.float32)
            assert not torch.equal(expected, base[name])
        elif name.rpartition(".")[0] in allocation.full_names:
            expected = trained[f"base_model.model.{name}"]
        else:
            expected = base[name]
        assert torch.equal(synced[name], expected), name


@pytest.mark.parametrize("mode", ["adapter", "receiver_merge"])
def test_partial_syncs_send_what_training_changed_and_nothing_else(result, mode):
    sent = result[f"synced_{mode}"]
    trained = {
        plain_name(n).replace(".default.", "."): t for n, t in result["trained"].items() if n in result["trainable"]
    }
    assert set(sent) == set(trained)
    assert all(torch.equal(sent[name], trained[name]) for name in sent)


def test_headers_number_the_syncs_of_one_run_and_prove_the_base(result, setting):
    headers, base = result["headers"], AutoModelForCausalLM.from_pretrained(setting[1]).state_dict()
    assert [header["mode"] for header in headers] == ["merge", "adapter", "receiver_merge", "receiver_merge"]
    assert len({header["run"] for header in headers}) == 1
    numbers = [header["number"] for header in headers]
    assert numbers == list(range(numbers[0], numbers[0] + 4))
    assert headers[0]["base"] == {}, "a full sync needs nothing of the engine's checkpoint"
    full = set(load_allocation(setting[2]).full_names)
    wanted = {name: tensor for name, tensor in base.items() if name.rpartition(".")[0] not in full}
    assert headers[1]["base"] == headers[2]["base"] == base_digests(wanted.items())
    for header, sent in zip(headers[:3], ("synced", "synced_adapter", "synced_receiver_merge"), strict=True):
        assert header["payload_bytes"] == sum(tensor.nbytes for tensor in result[sent].values())


def test_fixed_prompts_have_the_log_probabilities_of_the_trained_model_and_of_the_base(result, setting, tmp_path):
    prompt = result["headers"][-1]["fixed_prompt"]
    exported = export_checkpoint(result["folder"] / "checkpoint", tmp_path / "out").folder
    assert prompt["limit"] == 1e-4 and prompt["policy_limit"] == 0.25 and prompt["trainer_rounds"] is False
    assert sum(len(tokens) - 1 for tokens in prompt["tokens"]) > 400
    for folder, name in ((exported, "log_probs"), (setting[1], "base_log_probs")):
        model, wanted = AutoModelForCausalLM.from_pretrained(folder), []
        for tokens in map(torch.tensor, prompt["tokens"]):
            with torch.no_grad():
                log_probs = model(tokens[None]).logits.log_softmax(-1)[0, :-1]
            wanted.append(log_probs.gather(1, tokens[1:, None])[:, 0].tolist())
        assert_rows_close(prompt[name], wanted, atol=1e-5)


def test_exported_checkpoint_is_bit_equal_to_what_was_synced(result, tmp_path):
    exported = AutoModelForCausalLM.from_pretrained(
        export_checkpoint(result["folder"] / "checkpoint", tmp_path / "out").folder
    )
    assert all(torch.equal(tensor, result["synced"][name]) for name, tensor in exported.state_dict().items())


@pytest.mark.parametrize("saved", ["checkpoint", "bfloat16"])
def test_hf_model_in_a_checkpoint_is_what_the_export_writes(result, saved, tmp_path):
    """For a rollout in float32, and in bfloat16 from a float32 base, where full modules are rounded from its values."""
    exported = export_checkpoint(result["folder"] / saved, tmp_path / "out").folder
    (exported / CARD).unlink()
    assert_same_files(result["folder"] / saved / "huggingface", exported)
    model, loading = AutoModelForCausalLM.from_pretrained(
        result["folder"] / saved / "huggingface", output_loading_info=True
    )
    assert not any(loading.values()) and str(model.dtype) == "torch." + saved.replace("checkpoint", "float32")


@pytest.mark.parametrize("saved", ["checkpoint", "bfloat16"])
def test_adapter_and_delta_hold_the_merged_model(result, setting, saved, tmp_path):
    checkpoint = result["folder"] / saved
    merged = export_checkpoint(checkpoint, tmp_path / "merged").folder
    card = (merged / CARD).read_text()
    assert "0.001 for full modules, 0.01 for LoRA" in card and "| trainer | reinforcement learning |" in card
    delta = export_checkpoint(checkpoint, tmp_path / "delta", format="delta").folder
    again = apply_delta(delta, tmp_path / "again").folder
    for folder in (merged, again):
        (folder / CARD).unlink()
    assert_same_files(again, merged)
    adapter = export_checkpoint(checkpoint, tmp_path / "adapter", format="adapter", dtype="float32").folder
    model = AutoModelForCausalLM.from_pretrained(setting[1], dtype=torch.float32)
    model.load_state_dict(load_file(adapter / "full_weights.safetensors"), strict=False)
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    exact = AutoModelForCausalLM.from_pretrained(
        export_checkpoint(checkpoint, tmp_path / "exact", dtype="float32").folder
    )
    for name, tensor in exact.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6)


@pytest.fixture
def merge_by_verl(one, tmp_path):
    """verl's merger on a checkpoint of ours, with what it reads as the number of ranks."""
    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    def merge(world_size=None):
        checkpoint = tmp_path / "actor"
        shutil.copytree(one["folder"] / "checkpoint", checkpoint)
        if world_size is not None:
            (checkpoint / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world_size}))
        (tmp_path / "merged").mkdir()
        config = ModelMergerConfig(
            operation="merge",
            backend="fsdp",
            local_dir=str(checkpoint),
            target_dir=str(tmp_path / "merged"),
            hf_model_config_path=str(checkpoint / "huggingface"),
        )
        FSDPModelMerger(config).merge_and_save()
        return tmp_path / "merged"

    return merge


def test_verls_merger_ends_with_a_line_that_names_the_export(merge_by_verl, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"leave the adapters out: run hybrid-lora-export instead.+rank_0.pt"):
        merge_by_verl()
    assert list((tmp_path / "merged").iterdir()) == []


def test_verls_merger_would_leave_the_adapters_out(merge_by_verl, setting):
    """Why it must end: what it writes loads without a word, and is another model than the trained one."""
    merged, loading = AutoModelForCausalLM.from_pretrained(merge_by_verl(world_size=1), output_loading_info=True)
    assert not any(loading.values())
    state, base = merged.state_dict(), AutoModelForCausalLM.from_pretrained(setting[1]).state_dict()
    for module in load_allocation(setting[2]).lora_names:
        assert torch.equal(state[f"{module}.weight"].float(), base[f"{module}.weight"].bfloat16().float())


def test_each_kind_of_module_has_its_own_learning_rate_and_gradient_norm(result):
    for step in result["steps"]:
        assert (step["lr_lora"], step["lr_full"]) == (1e-2, 1e-3)
        assert step["grad_norm"] == pytest.approx(math.hypot(step["grad_norm_lora"], step["grad_norm_full"]), rel=1e-5)


def test_loss_of_the_first_step_is_the_float64_reference(result, setting):
    batch, losses = make_batch(1), []
    columns = base_log_probs(setting[1]), batch["old_log_probs"].unbind(), batch["advantages"].unbind()
    for row in zip(*columns, strict=True):
        log_probs, old, advantage = (tensor[None].double() for tensor in row)
        losses.append(gspo_sequence_losses(log_probs, old, advantage, torch.ones_like(old), 0.2, 0.2)[0].item())
    assert result["steps"][0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("other", ["two", "fsdp1"])
def test_two_ranks_train_as_one_rank_does(request, one, other):
    two = request.getfixturevalue(other)
    for first, second in zip(one["steps"] + one["steps_on"], two["steps"] + two["steps_on"], strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)
    for name, tensor in one["trained_on"].items():
        torch.testing.assert_close(two["trained_on"][name], tensor, rtol=1e-3, atol=2e-5)


def test_a_checkpoint_records_what_tells_its_base_from_others(result, setting):
    assert read_base_weights(result["folder"] / "checkpoint" / "hybrid_lora") == weight_digests(setting[1])


def test_resumed_run_continues_bit_for_bit(result):
    assert result["steps_resumed"] == result["steps_on"]
    assert all(torch.equal(tensor, result["trained_on"][name]) for name, tensor in result["resumed"].items())


@pytest.mark.parametrize(
    "case, words",
    [
        ("allocation", ["hybrid_lora.allocation", "resume with"]),
        ("alpha", ["alpha 64", "hybrid_lora.lora.alpha=8"]),
        ("base model", ["actor_rollout_ref.model.path", "model.layers.1."]),
        ("nothing wrong", ["accepted"]),
    ],
)
def test_resume_is_refused_where_it_would_make_another_model(result, case, words):
    assert all(word in result["refused"][case] for word in words), result["refused"][case]


@pytest.mark.parametrize(
    "case, words",
    [
        ("float32", []),
        ("float32, another seed", ["sync_seed is 7 and was 0 in", "float32 rollouts stay", "hybrid_lora.sync_seed=0"]),
        ("bfloat16 after float32", ["dtype is bfloat16 and was float32 in", "rollouts differ", "dtype=float32"]),
        ("bfloat16", []),
        (
            "bfloat16, another seed",
            ["refused", "with sync_seed 7 rounds bfloat16", "hybrid_lora.sync_seed=0"],
        ),
        ("bfloat16, another rounding", ["refused", "sync_rounding: nearest", "hybrid_lora.sync_rounding=stochastic"]),
    ],
)
def test_resume_is_refused_or_says_where_rollouts_will_be_rounded_otherwise(result, case, words):
    """Another type changes no weight that trains, and float32 is not rounded: that is said."""
    lines = result["said"][case]
    assert len(lines) == bool(words), lines
    words = words if "refused" in words else ["hybrid_lora: WARNING", *words]
    assert all(word in line for line in lines for word in ["checkpoint", *words]), lines
