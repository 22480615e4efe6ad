"""The engine under every sharding that verl offers, against the same training in one process without any."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from transformers import AutoModelForCausalLM  # noqa: E402

from hybrid_lora_plugin import apply_allocation, load_allocation  # noqa: E402
from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.names import plain_name  # noqa: E402
from hybrid_lora_plugin.sync.base_weights import value_digest  # noqa: E402
from hybrid_lora_plugin.training.apply import parts_of, trainable_groups  # noqa: E402
from hybrid_lora_plugin.training.export import export_checkpoint  # noqa: E402
from hybrid_lora_plugin.training.memory import least_bytes  # noqa: E402
from hybrid_lora_plugin.training.merge import merge_weight  # noqa: E402
from hybrid_lora_plugin.training.model_card import CARD  # noqa: E402
from hybrid_lora_plugin.training.rounding import Rounding, on_grid, round_weight  # noqa: E402
from hybrid_lora_plugin.verl_backend.losses import gspo_sequence_losses  # noqa: E402
from hybrid_lora_plugin.verl_backend.requirements import check_sharding  # noqa: E402
from tests.support import host_flash_attention  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.engine_worker import make_batch  # noqa: E402
from tests.support.folders import assert_same_files  # noqa: E402
from tests.support.sharding_worker import ROWS, STEPS  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import run_engine  # noqa: E402

pytestmark = pytest.mark.verl

RANKS = (1, 2, 4)
FREQUENCIES = "model.rotary_emb.inv_freq"
SETTINGS = {
    f"{strategy}{'-offload' * offload}-{accumulation}": {
        "strategy": strategy,
        "sharding": {"param_offload": offload, "optimizer_offload": offload},
        "accumulation": accumulation,
    }
    for strategy, offload, accumulation in product(("fsdp2", "fsdp"), (False, True), (1, 4))
}
SAVED = ("fsdp2-1", "fsdp-1")
for name in SAVED:
    SETTINGS[name]["checkpoint"] = f"checkpoint-{name}"
SETTINGS["fsdp2-1"]["save_contents"] = ["hf_model"]
SETTINGS["fsdp-1"]["save_contents"] = ["model", "optimizer", "extra", "hf_model"]
#: where weights stay gathered between forward and backward, every micro-batch reduces gradients, and groups of two
#: ranks hold a copy each
OTHERS = {
    f"{strategy}-other": {
        "strategy": strategy,
        "sharding": {
            "reshard_after_forward": False,
            "use_no_sync_for_gradient_accumulation": False,
            "forward_prefetch": True,
            "fsdp_size": 2,
        },
        "accumulation": 4,
    }
    for strategy in ("fsdp2", "fsdp")
}
#: a checkpoint that a rollout engine in bfloat16 does not hold
FLOAT32 = ("fsdp2-float32", "fsdp-float32")
PACKED = {"use_remove_padding": True}
#: verl's other options of a model; those that replace a method of its class for good come last
OPTIONS = {
    name: {"strategy": name.partition("-")[0], "accumulation": 2} | setting
    for name, setting in {
        "fsdp2-checkpointing": {"gradient_checkpointing": True},
        "fsdp-checkpointing": {"gradient_checkpointing": True, "sharding": {"use_orig_params": True}},
        "fsdp2-remove-padding": {"model_options": PACKED},
        "fsdp2-ulysses": {
            "model_options": PACKED,
            "sharding": {"ulysses_sequence_parallel_size": 2},
            "attention": host_flash_attention.NAME,
        },
        "fsdp2-fused": {
            "model_options": PACKED | {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}},
        },
    }.items()
}
#: on one rank and on four: both strategies, and offload on one; two ranks run every combination
SOME = {1: (*SAVED, "fsdp2-offload-4", "fsdp-offload-4"), 2: tuple(SETTINGS), 4: SAVED}
OF_RANKS = {ranks: {name: SETTINGS[name] for name in SOME[ranks]} for ranks in RANKS}
CASES = [(ranks, name) for ranks in RANKS for name in OF_RANKS[ranks]]
CASES += [(2, name) for name in OPTIONS] + [(4, name) for name in OTHERS]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A checkpoint in bfloat16 with biases and a tied head, and an allocation for it."""
    folder = tmp_path_factory.mktemp("sharding")
    model = make_tiny_qwen2(folder / "fp32", layers=3)
    half = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    half.save_pretrained(folder / "model")
    # The same model with a head of its own: its ranks but the first build it without memory.
    half.lm_head.weight = torch.nn.Parameter(half.lm_head.weight.detach().clone())
    half.config.tie_word_embeddings = False
    half.save_pretrained(folder / "untied")
    for file in (*model.glob("*token*"), *model.glob("chat_template*")):
        for kind in ("model", "untied"):
            (folder / kind / file.name).write_bytes(file.read_bytes())
    return folder, folder / "model", make_allocation(folder / "model", folder / "allocation")


@pytest.fixture(scope="module")
def runs(setting):
    folder, model, allocation = setting
    plain = {"strategy": "fsdp2", "accumulation": 1}
    own = {
        1: {},
        2: {
            "untied": plain
            | {"model": folder / "untied", "allocation": make_allocation(folder / "untied", folder / "own")},
            "bf16": plain | {"param_dtype": "bf16"},
        }
        | {
            name: plain
            | {"strategy": name.partition("-")[0], "model": folder / "fp32"}
            | {"allocation": make_allocation(folder / "fp32", folder / f"{name}-own")}
            for name in FLOAT32
        }
        | OPTIONS,
        4: OTHERS,
    }
    return {
        ranks: run_engine(
            folder / f"ranks-{ranks}",
            ranks,
            worker="tests/support/sharding_worker.py",
            model=model,
            allocation=allocation,
            settings=OF_RANKS[ranks] | own[ranks],
        )
        for ranks in RANKS
    }


@pytest.fixture(scope="module", params=CASES, ids=lambda value: f"{value[0]}-{value[1]}")
def run(request, runs):
    ranks, name = request.param
    ours = runs[ranks]
    tensors = {
        kind: ours[f"{name}-{kind}"]
        for kind in (
            *("start", "end", "synced-merge", "synced-receiver_merge", "synced-bf16"),
            *("synced-sparse", "synced-moved"),
        )
    }
    return {"name": name, "shares": 2 if name in OTHERS else ranks} | tensors | ours[name]


def log_probs(model, ids, response):
    values = model(ids[None]).logits[0, -len(response) - 1 : -1].float().log_softmax(-1)
    return values.gather(1, response[:, None])[:, 0]


@pytest.fixture(scope="module")
def expected(setting, runs):
    """The same steps in plain PyTorch: one process, fp32, no FSDP, no verl."""
    _, folder, allocation = setting
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = apply_allocation(model, load_allocation(allocation), rank=4, alpha=8)
    start = runs[1]["fsdp2-1-start"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    groups = trainable_groups(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in groups["lora"]], "lr": 1e-2},
            {"params": [p for _, p in groups["full"]], "lr": 1e-3},
        ],
        betas=(0.9, 0.999),
        weight_decay=0.0,
    )
    batch, steps = make_batch(1, ROWS), []
    rows = [batch[name].unbind() for name in ("input_ids", "responses", "old_log_probs", "advantages")]
    for _ in range(STEPS):
        losses = []
        for ids, response, old, advantage in zip(*rows, strict=True):
            row = (log_probs(model, ids, response)[None], old[None], advantage[None], torch.ones(1, len(response)))
            losses.append(gspo_sequence_losses(*row, 0.2, 0.2)[0])
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        step = {"loss": loss.item()}
        trained = {kind: [p for _, p in groups[kind]] for kind in groups}
        before = {kind: [p.detach().clone() for p in trained[kind]] for kind in groups}
        for kind in groups:
            step[f"grad_norm_{kind}"] = torch.nn.utils.get_total_norm([p.grad for p in trained[kind]]).item()
        step["grad_norm"] = torch.nn.utils.clip_grad_norm_([*trained["lora"], *trained["full"]], 1.0).item()
        optimizer.step()
        for kind in groups:
            moved = [p.detach() - old for p, old in zip(trained[kind], before[kind], strict=True)]
            step[f"update_norm_{kind}"] = torch.nn.utils.get_total_norm(moved).item()
        steps.append(step)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        reference = [log_probs(base, ids, response) for ids, response in zip(rows[0], rows[1], strict=True)]
    return {
        "steps": steps,
        "weights": dict(model.named_parameters()),
        "reference": reference,
        "counts": parts_of(model).counts,
    }


def test_losses_are_those_of_one_process_without_sharding(run, expected):
    assert len(run["steps"]) == STEPS
    for step, wanted in zip(run["steps"], expected["steps"], strict=True):
        assert step["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def test_norms_by_kind_are_those_of_one_process(run, expected):
    for step, wanted in zip(run["steps"], expected["steps"], strict=True):
        assert math.hypot(step["grad_norm_lora"], step["grad_norm_full"]) == pytest.approx(step["grad_norm"], rel=1e-5)
        for kind in ("lora", "full"):
            assert step[f"grad_norm_{kind}"] == pytest.approx(wanted[f"grad_norm_{kind}"], rel=1e-4)
            assert step[f"update_norm_{kind}"] == pytest.approx(wanted[f"update_norm_{kind}"], rel=1e-3)


def test_adapters_share_products_where_their_factors_are_gathered_together(run, expected):
    assert bool(run["shared_products"]) is run["name"].startswith("fsdp2")


def test_trained_weights_are_those_of_one_process(run, expected):
    assert set(run["end"]) == set(expected["weights"])
    for name, wanted in expected["weights"].items():
        # Adam's first steps are signs: an element whose gradient is nearly nothing may go either way.
        apart, way = (run["end"][name] - wanted.detach()).norm(), (wanted.detach() - run["start"][name]).norm()
        assert apart <= 1e-2 * way, name


def test_all_settings_start_from_the_same_weights(run, runs):
    start = runs[1]["fsdp2-1-start"]
    assert all(torch.equal(tensor, start[name]) for name, tensor in run["start"].items())


def test_frozen_weights_are_the_checkpoints_bit_for_bit_after_training(run, setting):
    base = AutoModelForCausalLM.from_pretrained(setting[1], dtype=torch.bfloat16).state_dict()
    allocation = load_allocation(setting[2])
    frozen = 0
    for name, tensor in run["end"].items():
        if ".lora_" in name or plain_name(name).rpartition(".")[0] in allocation.full_names:
            continue
        frozen += 1
        assert torch.equal(tensor, base[plain_name(name)].float()), name
    assert frozen > len(allocation.lora_names)


def test_reference_is_the_base_model(run, expected):
    for row, wanted in zip(run["reference"], expected["reference"], strict=True):
        torch.testing.assert_close(torch.tensor(row), wanted, rtol=0, atol=1e-5)


def test_fixed_prompt_of_a_sync_is_the_same_under_every_option(run, runs):
    wanted = runs[1]["fsdp2-1"]["fixed_prompt"]
    assert run["fixed_prompt"]["tokens"] == wanted["tokens"]
    for name in ("base_log_probs", "log_probs"):
        for row, expected in zip(run["fixed_prompt"][name], wanted[name], strict=True):
            assert row == pytest.approx(expected, abs=2e-3)


def test_a_model_with_a_head_of_its_own_trains_alike(runs, setting, expected):
    run, end = runs[2]["untied"], runs[2]["untied-end"]
    assert [step["loss"] for step in run["steps"]] == pytest.approx([s["loss"] for s in expected["steps"]], abs=1e-5)
    assert run["trained_dtypes"] == ["torch.float32"] and run["frozen_dtypes"] == ["torch.bfloat16"]
    head, embedding = (end[f"base_model.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(head, embedding) and torch.equal(
        head, expected["weights"]["base_model.model.model.embed_tokens.weight"]
    )


def test_computing_in_bf16_trains_in_fp32(runs, expected):
    run, end = runs[2]["bf16"], runs[2]["bf16-end"]
    for step, wanted in zip(run["steps"], expected["steps"], strict=True):
        assert step["loss"] == pytest.approx(wanted["loss"], abs=2e-2)
        assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.1)
        assert math.hypot(step["grad_norm_lora"], step["grad_norm_full"]) == pytest.approx(step["grad_norm"], rel=1e-5)
    assert run["trained_dtypes"] == ["torch.float32"] and run["frozen_dtypes"] == ["torch.bfloat16"]
    trained = [tensor for name, tensor in end.items() if expected["weights"][name].requires_grad]
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained)


def test_what_trains_is_fp32_and_what_is_frozen_keeps_the_checkpoints_type(run):
    assert run["trained_dtypes"] == ["torch.float32"] and run["frozen_dtypes"] == ["torch.bfloat16"]


def test_only_what_trains_has_optimizer_state(run, expected):
    assert run["moments"] == run["bytes"]["moments"] == 2 * run["bytes"]["trained"]
    assert run["gradients"] == [run["bytes"]["gradients"]]
    assert run["groups"] == ["lora", "full"]


def test_bytes_of_a_rank_are_near_the_floor(run, expected):
    floor = least_bytes(expected["counts"], run["shares"])
    # Padding: tensors of 32 rows cut in four, and FSDP1's flat parameters.
    assert floor.total <= run["bytes"]["total"] * 1.001
    assert run["bytes"]["total"] <= 1.05 * floor.total


def test_a_decoder_layer_is_one_unit_under_fsdp2(run):
    assert run["units_per_layer"] == 1 if run["name"].startswith("fsdp2") else run["units_per_layer"] > 1


def test_frequencies_of_rope_are_those_of_a_model_in_fp32(run, setting):
    wanted = AutoModelForCausalLM.from_pretrained(setting[1], dtype=torch.float32).get_buffer(FREQUENCIES)
    assert run["buffers"] and run["buffer_dtypes"] == ["torch.float32"]
    assert all(torch.equal(torch.tensor(buffer), wanted) for buffer in run["buffers"].values())


def test_rollout_gets_what_was_trained(run, setting):
    allocation = load_allocation(setting[2])
    base = AutoModelForCausalLM.from_pretrained(setting[1], dtype=torch.bfloat16).state_dict()
    merged, partial, end = run["synced-merge"], run["synced-receiver_merge"], run["end"]
    assert set(merged) == set(base) - {"lm_head.weight"}
    for name, tensor in merged.items():
        module = name.rpartition(".")[0]
        if module in allocation.lora_names and name.endswith(".weight"):
            factors = [end[f"base_model.model.{module}.lora_{kind}.default.weight"] for kind in "AB"]
            assert torch.equal(tensor, merge_weight(base[name], *factors, 2.0, torch.float32)), name
            for kind, factor in zip("AB", factors, strict=True):
                assert torch.equal(partial[f"{module}.lora_{kind}.weight"], factor), name
        elif module in allocation.full_names:
            trained = end[f"base_model.model.{name}"]
            assert torch.equal(tensor, trained) and torch.equal(partial[name], trained), name
        else:
            assert torch.equal(tensor, base[name].float()) and name not in partial, name


def test_ranks_share_the_digests_of_the_base_and_each_has_all_of_them(run, setting):
    """Between the ranks that hold one copy, each weight is hashed once."""
    _, model, allocation = setting
    trained = {f"{name}.{kind}" for name in load_allocation(allocation).full_names for kind in ("weight", "bias")}
    weights = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    wanted = {name: value_digest(weight) for name, weight in weights.items() if name not in trained}
    digests, counts = zip(*run["base"], strict=True)
    assert all(digest == wanted for digest in digests)
    assert sum(counts) == len(counts) // run["shares"] * len(wanted) and min(counts) > 0


def test_thresholds_do_not_depend_on_the_sharding(run, setting):
    """Every sharding sends the bits that one process without any would round its weights to."""
    allocation, how = load_allocation(setting[2]), Rounding("stochastic", 0)
    base = AutoModelForCausalLM.from_pretrained(setting[1], dtype=torch.bfloat16).state_dict()
    for name, tensor in run["synced-bf16"].items():
        module = name.rpartition(".")[0]
        if module in allocation.lora_names and name.endswith(".weight"):
            factors = [run["end"][f"base_model.model.{module}.lora_{kind}.default.weight"] for kind in "AB"]
            wanted = merge_weight(base[name], *factors, 2.0, torch.bfloat16, how, name)
        elif module in allocation.full_names:
            wanted = round_weight(name, run["end"][f"base_model.model.{name}"], torch.bfloat16, how)
            # So small a step would be lost to nearest.
            assert not torch.equal(wanted, base[name]), name
        else:
            wanted = base[name]
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("name", FLOAT32)
def test_thresholds_round_the_update_alone_in_a_float32_checkpoint(runs, setting, name):
    """Full modules begin at what nearest makes of their original, wherever FSDP1 or FSDP2 cut them."""
    ours, allocation, how = runs[2], load_allocation(setting[2]), Rounding("stochastic", 0)
    base = AutoModelForCausalLM.from_pretrained(setting[0] / "fp32", dtype=torch.float32).state_dict()
    differ = 0
    for weight, tensor in ours[f"{name}-synced-bf16"].items():
        module = weight.rpartition(".")[0]
        if module in allocation.full_names:
            trained = ours[f"{name}-end"][f"base_model.model.{weight}"]
            wanted = round_weight(weight, on_grid(trained, base[weight], torch.bfloat16), torch.bfloat16, how)
            differ += not torch.equal(wanted, round_weight(weight, trained, torch.bfloat16, how))
            assert torch.equal(tensor, wanted), weight
    assert differ
    for weight, tensor in ours[f"{name}-synced-moved"].items():
        assert torch.equal(ours[f"{name}-synced-sparse"][weight], tensor), weight


def test_changed_elements_make_the_bits_of_merge_under_every_sharding(run):
    """Each rank compares its own rows, and all put the list together."""
    seen = run["sparse"]
    assert seen["base_number"] == seen["first"] and seen["lists"] > 0 and 0 < seen["share"] < 0.2
    assert set(run["synced-sparse"]) == set(run["synced-moved"])
    for name, tensor in run["synced-moved"].items():
        assert torch.equal(run["synced-sparse"][name], tensor), name


def test_a_rank_keeps_its_share_of_what_was_sent(run):
    # Rows are shared out whole.
    assert 2 * run["sparse"]["trains"] / run["shares"] <= run["sparse"]["kept"]
    assert run["sparse"]["kept"] <= 1.1 * 2 * run["sparse"]["trains"] / run["shares"]
    # What it prints at the start; in the other modes it keeps nothing.
    assert run["sparse"]["said"] == run["sparse"]["kept"] and run["bytes"]["sent"] == 0


def test_update_that_arrived_is_measured(run, setting):
    """All rows of these small weights are looked at, so the metric is that of whole matrices."""
    allocation = load_allocation(setting[2])
    base = AutoModelForCausalLM.from_pretrained(setting[1], dtype=torch.bfloat16).state_dict()
    sums = {"lora": [0.0, 0.0], "full": [0.0, 0.0]}
    for name, tensor in run["synced-bf16"].items():
        module, moved = name.rpartition(".")[0], tensor.double() - base[name].double()
        if module in allocation.lora_names and name.endswith(".weight"):
            a, b = (run["end"][f"base_model.model.{module}.lora_{kind}.default.weight"].double() for kind in "AB")
            kind, exact = "lora", 2.0 * b @ a
        elif module in allocation.full_names:
            kind, exact = "full", run["end"][f"base_model.model.{name}"].double() - base[name].double()
        else:
            continue
        sums[kind][0] += (moved * exact).sum().item()
        sums[kind][1] += exact.square().sum().item()
    assert run["arrival"]["update_arrived_lora"] == pytest.approx(sums["lora"][0] / sums["lora"][1], rel=1e-3)
    assert run["arrival"]["update_arrived_full"] == pytest.approx(sums["full"][0] / sums["full"][1], rel=1e-3)


@pytest.mark.parametrize("ranks, name", list(product(RANKS, SAVED)))
def test_exported_checkpoint_is_what_the_rollout_gets_rounded_once(runs, tmp_path, ranks, name):
    ours = runs[ranks]
    folder = export_checkpoint(ours["folder"] / SETTINGS[name]["checkpoint"], tmp_path / "out").folder
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    for weight, tensor in ours[f"{name}-synced-merge"].items():
        assert torch.equal(exported[weight], tensor.bfloat16()), weight
    (folder / CARD).unlink()
    assert_same_files(ours["folder"] / SETTINGS[name]["checkpoint"] / "huggingface", folder)


def test_two_ranks_in_groups_of_one_are_refused_under_fsdp1():
    check_sharding("fsdp2", 1, 2), check_sharding("fsdp", 1, 1), check_sharding("fsdp", -1, 2)
    with pytest.raises(ConfigurationError, match="fsdp_size: 1 with strategy=fsdp on 2 ranks"):
        check_sharding("fsdp", 1, 2)
