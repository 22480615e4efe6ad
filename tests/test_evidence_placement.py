"""Placements as arms of ``hybrid-lora-evidence``: how a plan says them, what a run leaves frozen, and what is told."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
import yaml

from hybrid_lora_plugin.candidates import find_candidates_from_config
from hybrid_lora_plugin.cli.evidence import main
from hybrid_lora_plugin.config_selection import PLACEMENT_PRESETS
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.arms import baseline_of, matched_to, planned_arms
from hybrid_lora_plugin.evidence.placed import left_frozen
from hybrid_lora_plugin.evidence.plan_file import plan_of
from hybrid_lora_plugin.evidence.protocol import Choice, Start
from hybrid_lora_plugin.evidence.replicas import PolicyProtocol, SftProtocol
from hybrid_lora_plugin.evidence.replicas import sft as sft_module
from hybrid_lora_plugin.evidence.replicas.flops import step_flops, trainable_parameters
from hybrid_lora_plugin.evidence.replicas.forward import TYPES, module_name
from hybrid_lora_plugin.evidence.results import RunKey
from hybrid_lora_plugin.evidence.study import Prepared, Study
from tests.support.tiny_models import tiny_qwen2_config

DENSE = find_candidates_from_config(tiny_qwen2_config(50))
FALCON = find_candidates_from_config(
    transformers.FalconH1Config(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
    )
)  # fmt: skip
START = Start("narrow", "sum", 0)
PLAN = {
    "name": "placed", "protocol": "tests.support.analytic_protocol:PlacedProtocol", "bases": ["narrow"],
    "tasks": ["sum"], "steps": 20, "rank": 2, "budgets": [0.2],
    "arms": ["gradient_norm:mlp", "random", "random:mlp", "random_stratified:mlp", "lora", "lora:attention", "lora:mlp",
             "lora_matched:attention", "lora_flops:mlp", "full", "full:mlp", "dora:mlp",
             {"name": "by_hand", "placement": {"attention": "lora", "mlp": "full"}}],
    "draws": 2, "seeds": {"tune": [100], "compare": [0, 1, 2]},
    "rates": {"full": [1e-4, 1e-3], "lora": [1e-3, 1e-2]}, "match": "gradient_norm:mlp",
    "primary": [{"arm": "gradient_norm:mlp", "against": ["random:mlp", "lora:attention"]}], "resamples": 1000,
}  # fmt: skip


def arms_of(candidates, *arms, **changes):
    """The planned arms by name; the first is compared with the last."""
    names = [arm if isinstance(arm, str) else arm["name"] for arm in arms]
    primary = [{"arm": names[0], "against": [names[-1]]}]
    plan = plan_of(PLAN | {"arms": list(arms), "primary": primary, "match": None} | changes)
    return {arm.name: arm for arm in planned_arms(plan, [candidates])}


def trains(candidates, arm, full=()):
    """Names of what an arm tunes fully, adapts and freezes."""
    frozen = left_frozen(arm.kind, arm.placement, candidates, full)
    return {one.name for one in candidates} - {*full, *frozen}, set(frozen)


# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [DENSE, FALCON], ids=["dense", "falcon_h1"])
def test_every_preset_is_an_arm_for_adapters_alone_and_within_a_criterion(candidates):
    there = {one.component for one in candidates}
    for preset, components in PLACEMENT_PRESETS.items():
        names = f"lora:{preset}", f"hybrid:{preset}", "random"
        if preset != "all" and not set(components) <= there:
            with pytest.raises(ConfigurationError, match=re.escape(f"arms: lora:{preset}: placement.preset: ")):
                arms_of(candidates, *names)
            continue
        lora, hybrid, _ = arms_of(candidates, *names).values()
        adapted, frozen = trains(candidates, lora)
        for one in candidates:
            open_ = one.component in components
            assert (one.name in adapted) == (open_ and one.takes_adapter) and (one.name in frozen) != (
                one.name in adapted
            )
        assert hybrid.kind == "hybrid" and dict(hybrid.selection)["budget.ratio"] == 0.2
        assert dict(hybrid.selection).get("placement.preset", "all") == preset
        # A module that takes no adapter trains where the criterion names it.
        kernel = [one.name for one in candidates if not one.takes_adapter and one.component in components]
        assert not set(kernel[:1]) & trains(candidates, hybrid, kernel[:1])[1]


def test_an_arm_of_your_own_places_each_component():
    mixed = {"name": "mixed", "placement": {"attention": "lora", "recurrent": "frozen", "mlp": "full"}}
    within = {"name": "within", "placement": {"preset": "mlp", "attention": "lora"}, "selection": {"criterion": "snip"}}
    lora = {"name": "narrow", "kind": "lora", "placement": {"mlp": "frozen"}, "rank": 8}
    arms = arms_of(FALCON, mixed, within, lora, "random")
    options = dict(arms["mixed"].selection)
    assert options["criterion"] == "random" and arms["mixed"].budget is None, "nothing is left to it"
    assert options["placement.mlp"] == "full" and arms["within"].budget == 0.2
    full = [one.name for one in FALCON if one.component == "mlp"]
    adapted, frozen = trains(FALCON, arms["mixed"], full)
    assert {name.split(".")[3] for name in adapted} == {"self_attn"}
    assert {name.split(".")[3] for name in frozen} == {"mamba"}
    assert arms["narrow"].rank == 8 and {name.split(".")[3] for name in trains(FALCON, arms["narrow"])[1]} == {
        "feed_forward", "mamba",
    }  # fmt: skip
    # What a plan says of all selecting arms holds for them, and a placement of an arm's own comes before it.
    everywhere = arms_of(FALCON, "hybrid", "lora", "random:attention", selection={"placement.preset": "mlp"})
    placements = {name: arm.placement for name, arm in everywhere.items()}
    assert placements == {
        "hybrid": (("preset", "mlp"),), "lora": (), "random:attention": (("preset", "attention"),)
    }  # fmt: skip


def test_controls_are_of_the_same_placement_where_there_are_some():
    names = ["gradient_norm", "gradient_norm:mlp", "lora", "lora:mlp", "lora:attention", "random", "random:mlp"]
    arms = arms_of(DENSE, *names, "lora_flops:mlp", "lora_matched:attention", budgets=[0.1, 0.2])
    found = list(arms.values())
    for name, baseline in (
        ("gradient_norm@0.2", "random@0.2"), ("gradient_norm:mlp@0.2", "random:mlp@0.2"), ("lora", "random@0.1"),
        ("lora:mlp", "random:mlp@0.1"), ("lora:attention", "random@0.1"),
    ):  # fmt: skip
        assert baseline_of(found, arms[name]).name == baseline
    assert arms["lora_matched:attention@0.1"].placement == arms["lora:attention"].placement
    # Adapters in one component may be as large as adapters everywhere.
    plan = plan_of(PLAN | {"arms": ["lora", "lora_matched:mlp", "random"], "match": "lora", "budgets": [0.1, 0.2],
                           "primary": [{"arm": "lora", "against": ["random"]}]})  # fmt: skip
    arms = planned_arms(plan, [DENSE])
    assert [arm.name for arm in arms] == ["lora", "lora_matched:mlp", "random@0.1", "random@0.2"]
    assert matched_to(plan, arms, arms[1]) == arms[0]


def test_stratified_draws_stay_within_the_placement():
    arm = arms_of(DENSE, "random_stratified:attention", "random")["random_stratified:attention"]
    drawn = arm.at(START, 1, DENSE).selection
    assert drawn["criterion"] == "explicit" and drawn["placement.preset"] == "attention"
    assert drawn["control.modules"] and all("self_attn" in name for name in drawn["control.modules"])


@pytest.mark.parametrize(
    "arms, said",
    [
        (["hybrid:recurrent"], "arms: hybrid:recurrent: placement.preset: 'recurrent' names recurrent, and this model"),
        (["lora:half"], "arms: 'lora:half' is unknown"),
        (["lora_flops:mlp"], "arms: lora_flops:mlp needs lora:mlp, whose FLOPs a step it starts from; name it too"),
        (["only:up:attention"], "arms: only:up:attention: placement.mlp: is 'frozen', and spread tunes modules of it"),
        (["lora_ffn:mlp"], "arms: lora_ffn:mlp: placement.attention: is 'frozen', and lora_ffn tunes modules of it"),
        (["lora", "zeroth_order:mlp"], "arms: zeroth_order:mlp: zeroth order moves the weights under every adapter"),
        ([{"name": "x", "placement": "half"}], "arms[0].placement: 'half' is not supported; choose one of all, atte"),
        ([{"name": "x", "placement": {"attn": "lora"}}], "arms[0].placement.attn: is no field of a placement; give"),
        ([{"name": "x", "placement": {"mlp": "none"}}], "arms[0].placement.mlp: 'none' is not supported; choose one"),
        ([{"name": "x", "placement": []}], "arms[0].placement: [] is not usable; give one of all, attention,"),
        ([{"name": "x", "placement": "mlp"}], "arms[0].selection: None is not usable; give options such as {criterion:"
                                              " lookahead}, or kind: lora for adapters alone"),
        ([{"name": "x", "placement": {"mlp": "lora"}}],
         "arms: x: placement leaves attention to a criterion, and selection names none; give selection:"),
        ([{"name": "x", "placement": {"mlp": "lora", "attention": "frozen"}}], "leaves nothing to be fully tuned; "),
        ([{"name": "x", "placement": {"mlp": "full", "attention": "frozen"}}], "leaves nothing to an adapter; give"),
        ([{"name": "x", "kind": "lora", "placement": {"mlp": "full"}}], "arms: x: placement.mlp: 'full' is not what"),
        ([{"name": "x", "kind": "full", "placement": {"mlp": "lora"}}], "arms: x: placement.mlp: 'lora' is not what"),
        ([{"name": "x", "kind": "lora", "placement": {"mlp": "frozen", "attention": "frozen"}}],
         "arms: x: placement: every component is frozen, so nothing would train; leave one to be trained"),
        ([{"name": "x", "placement": "mlp", "selection": {"criterion": "snip", "placement.mlp": "auto",
                                                          "placement.attention": "lora"}}],
         "arms[0].placement: selection has placement options, too; say where the arm trains in one of the two"),
        ([{"name": "x", "placement": "mlp", "selection": {"criterion": "trial", "trial.full_lr": 1e-3}}],
         "arms: x: criterion 'trial' compares allocations in which every module trains; leave its placement out"),
        ([{"name": "x", "placement": {"mlp": "full", "attention": "lora"}, "selection": {"criterion": "snip"}}],
         "arms: x: placement leaves no component to criterion 'snip'; leave its selection out, or give auto to one"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_one_line(tmp_path, capsys, arms, said):
    names = [arm if isinstance(arm, str) else arm["name"] for arm in arms]
    plan = PLAN | {"arms": [*arms, "random"], "primary": [{"arm": names[-1], "against": ["random"]}], "match": "random",
                   "rates": PLAN["rates"] | {"zeroth": [1e-3]}, "protocol": "sft", "bases": ["tiny"],
                   "tasks": ["subtract"], "settings": SETTINGS}  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert main([f"plan={tmp_path / 'plan.yaml'}", f"output_dir={tmp_path / 'out'}", "stage=cost"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hybrid-lora-evidence: ") and said in error, error
    assert error.count("\n") == 1 and "; " in error


def test_a_protocol_that_freezes_nothing_is_not_asked_to(tmp_path, capsys):
    """One of your own from before there were placements: its runs would adapt what the arm freezes."""
    for name, changes in (
        ("arm", {"arms": ["lora:mlp", "random"]}),
        ("selection", {"arms": ["lora", "random"], "selection": {"placement.preset": "mlp"}}),
    ):
        primary = [{"arm": changes["arms"][0], "against": ["random"]}]
        plan = PLAN | {"protocol": "tests.support.analytic_protocol:AnalyticProtocol", "primary": primary,
                       "match": None} | changes  # fmt: skip
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        assert main([f"plan={tmp_path / 'plan.yaml'}", f"output_dir={tmp_path / name}"]) == 2
        assert "AnalyticProtocol leaves no module frozen, and an arm has a placement; " in capsys.readouterr().err


# -- results and the report -------------------------------------------------------------------------------------------


def test_the_report_says_what_each_arm_left_frozen(tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    out = tmp_path / "out"
    assert main([f"plan={tmp_path / 'plan.yaml'}", f"output_dir={out}"]) == 0
    text, content = (out / "report.md").read_text(), json.loads((out / "report.json").read_text())
    candidates = Prepared.read(out).candidates["narrow"]
    attention = sum(one.parameters for one in candidates if one.component == "attention")
    rows = re.findall(r"^\| (\S+) \| narrow \| ([\w ,]+) \| 12.0 of 24 \| ([\d,]+) \|$", text, re.M)
    frozen = {name: (words, int(number.replace(",", ""))) for name, words, number in rows}
    mlp = sum(one.parameters for one in candidates) - attention
    assert frozen["lora:attention"] == ("attention by the criterion, mlp frozen", mlp)
    assert frozen["gradient_norm:mlp"] == ("attention frozen, mlp by the criterion", attention)
    assert frozen.keys() == content["frozen"].keys() == {
        name for name in content["values"] if name.endswith((":mlp", ":attention"))
    }  # fmt: skip
    assert "*against random* is against `random:mlp` for `gradient_norm:mlp`, " in text
    assert "; `random` for `random_stratified:mlp`" not in text
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    # An arm that chooses as another one does shares its run.
    assert all(bool(run["frozen"]) == (run["arm"].partition("/")[0] in frozen) for run in runs)
    study = Study(plan_of(PLAN), out, Prepared.read(out))
    for arm in study.arms:
        choice = study.choice(arm, START, 0)
        kinds = {one.name: one.component for one in candidates}
        left = {kinds[name] for name in choice.frozen}
        assert left == ({"attention"} if arm.name.endswith(":mlp") else {"mlp"} if ":" in arm.name else set()), arm.name
        if arm.name == "by_hand":
            assert {kinds[name] for name in choice.full} == {"mlp"} and len(choice.full) == 12
    # Adapters in attention alone need a higher rank for the size of the arm they are matched to.
    (matched,) = (arm for arm in study.arms if arm.role == "lora_matched")
    found, choice = study.matched_rank(matched, "narrow"), study.choice(matched, START, 0)
    each = sum(one.in_features + one.out_features for one in candidates if one.component == "attention")
    assert found.parameters == found.rank * each <= found.wanted < (found.rank + 1) * each and choice.rank == found.rank
    before = (out / "report.md").read_bytes()
    assert main([f"output_dir={out}", "stage=report"]) == 0 and (out / "report.md").read_bytes() == before


def test_a_file_from_before_there_were_placements_is_read_as_one_that_freezes_nothing():
    old = {"base": "b", "task": "t", "seed": 0, "full": "x", "rank": 2, "dora": False, "full_lr": 1.0, "lora_lr": 1.0,
           "steps": 3}  # fmt: skip
    assert RunKey(**old) == RunKey(**old, zeroth_lr=0.0, frozen="")


def test_a_protocol_that_chooses_what_the_placement_freezes_is_caught(tmp_path, capsys):
    plan = PLAN | {"settings": {"ignores_placement": True}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert main([f"plan={tmp_path / 'plan.yaml'}", f"output_dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert "arm gradient_norm:mlp: placement.attention: model.layers.0.self_attn.q_proj is fully tuned by what" in said


# -- small replicas ---------------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 16, "layers": 2, "intermediate_size": 32, "heads": 2, "kv_heads": 1}
SETTINGS = {
    "bases": [{"name": "tiny", **SHAPE, "steps": 40, "batch_size": 32}], "digits": 1, "batch_size": 4, "eval_every": 3,
    "held_out": 8, "group_size": 4,
    "probe": {"warmup_steps": 2, "partitions": 2, "batch_size": 4, "lr": 4e-3, "full_lr": 4e-3},
}  # fmt: skip
REPLICA_ARMS = [
    "gradient_norm:mlp", "gradient_norm:attention", "random:attention", "random_stratified:mlp", "lora:attention",
    "lora:mlp", "lora:all", "dora:attention", "full:mlp", {"name": "by_hand", "placement": {"attention": "full", "mlp":
    "lora"}},
]  # fmt: skip


@pytest.mark.parametrize("protocol", [SftProtocol, PolicyProtocol], ids=lambda kind: kind.name)
def test_frozen_modules_of_replicas_keep_their_bits_and_the_others_train(tmp_path, monkeypatch, capsys, protocol):
    made = []

    class Kept(sft_module.Replicas):
        def __init__(self, base, runs, *rest):
            super().__init__(base, runs, *rest)
            made.append((self, list(runs)))

    monkeypatch.setattr(sft_module, "Replicas", Kept)
    more = {"answers": 4, "start_reward": 0.05, "start_lr": 3e-3} if protocol is PolicyProtocol else {}
    plan = PLAN | {"protocol": protocol.name, "settings": SETTINGS | more, "bases": ["tiny"], "tasks": ["subtract"],
                   "steps": 3, "arms": REPLICA_ARMS, "seeds": {"tune": [100], "compare": [0]}, "draws": 1,
                   "match": None, "rates": {"full": [1e-2], "lora": [1e-2]},
                   "primary": [{"arm": "lora:attention", "against": ["lora:mlp"]}]}  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert main([f"plan={tmp_path / 'plan.yaml'}", f"output_dir={tmp_path / 'out'}", "device=cpu"]) == 0
    assert "What each arm left frozen" in (tmp_path / "out/report.md").read_text()
    ours = protocol(plan["settings"], tmp_path / "out/protocol", "cpu", ["tiny"], ["subtract"])
    candidates, config = ours.candidates("tiny"), ours.model("tiny").config
    outcomes = {}
    for line in (tmp_path / "out/runs.jsonl").read_text().splitlines():
        outcomes[json.loads(line)["arm"], json.loads(line)["seed"]] = json.loads(line)["outcome"]
    seen = set()
    for replicas, runs in made:
        held = replicas.weights()
        for at, run in enumerate(runs):
            choice = run.choice
            for one in candidates:
                type_, layer = one.type, one.layer
                assert one.name == module_name(layer, type_) and type_ in TYPES
                still = torch.equal(held.matrices[type_][layer, at], replicas.base.matrices[type_][layer])
                if (type_, "bias") in replicas.trained and one.name not in choice.full:
                    assert torch.equal(held.biases[type_][layer, at], replicas.base.biases[type_][layer])
                assert still == (one.name in choice.frozen), (run.arm, one.name)
                if (type_, "B") in replicas.trained:
                    moved = replicas.trained[type_, "B"].value[layer, at].any().item()
                    assert moved == (one.name not in {*choice.full, *choice.frozen}), (run.arm, one.name)
            seen.add(run.arm.partition("/")[0])
            outcome = outcomes.get((run.arm, run.start.seed))
            if outcome:
                assert outcome["trainable_parameters"] == slow_count(candidates, choice)
                assert outcome["flops"] == 3 * ours.step_flops("tiny", choice)
    # Two arms that choose alike share a run.
    assert seen >= {"lora:attention", "lora:mlp", "lora:all", "dora:attention", "full:mlp", "by_hand"}
    assert any(arm.startswith(("gradient_norm:", "random")) for arm in seen)
    for _, runs in made:
        for run in runs:
            wanted = slow_flops(config, candidates, run.choice)
            assert step_flops(config, candidates, run.choice, rows=3, positions=5, answer_tokens=2) == wanted


def adapter(candidate, choice):
    """Whether a module has one."""
    return choice.rank > 0 and candidate.name not in choice.full and candidate.name not in choice.frozen


def slow_count(candidates, choice):
    """Numbers that get a gradient, module by module."""
    total = 0
    for one in candidates:
        if one.name in choice.full:
            total += one.parameters
        elif adapter(one, choice):
            total += choice.rank * one.in_features + choice.rank * one.out_features + choice.dora * one.out_features
    assert total == trainable_parameters(candidates, choice)
    return total


def slow_flops(config, candidates, choice, rows=3, positions=5, answers=2):
    """By the list of ``flops``, one product after the other."""
    tokens, total = rows * positions, 0
    lowest = min(one.layer for one in candidates if one.name in choice.full or adapter(one, choice))
    for layer in range(config.num_hidden_layers):
        scores = 4 * tokens * positions * config.hidden_size
        total += scores + (2 * scores if layer >= lowest else 0)
    total += 2 * (2 * rows * answers * config.hidden_size * config.vocab_size)
    for one in candidates:
        product = 2 * tokens * one.in_features * one.out_features
        total += product + (product if one.layer >= lowest else 0)
        if one.name in choice.full:
            total += product
        if adapter(one, choice):
            total += 3 * 2 * tokens * choice.rank * (one.in_features + one.out_features)
            total += choice.dora * 6 * choice.rank * one.in_features * one.out_features
    return total


def test_a_frozen_module_costs_no_gradient_of_weights():
    config = tiny_qwen2_config(50)
    mlp = tuple(one.name for one in DENSE if one.component == "mlp")
    sizes = {"rows": 3, "positions": 5, "answer_tokens": 2}
    everywhere, attention = Choice((), 4), Choice((), 4, frozen=mlp)
    saved = 6 * 15 * sum(one.lora_parameters(4) for one in DENSE if one.name in mlp)
    assert step_flops(config, DENSE, everywhere, **sizes) - step_flops(config, DENSE, attention, **sizes) == saved
    # What lies below the lowest module that trains is passed once.
    upper = tuple(one.name for one in DENSE if one.layer == 0 or one.name in mlp)
    assert step_flops(config, DENSE, Choice((), 4, frozen=upper), **sizes) < step_flops(
        config, DENSE, attention, **sizes
    )
