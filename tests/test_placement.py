"""``placement``: which components train, in the budget, the artifact, the commands, and the model that trains."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
import transformers

from hybrid_lora_plugin import apply_allocation
from hybrid_lora_plugin.allocation import load_allocation
from hybrid_lora_plugin.allocation.placement import placement_record, places_of
from hybrid_lora_plugin.allocation.storage import allocation_text
from hybrid_lora_plugin.candidates import COMPONENTS, find_candidates, find_candidates_from_config, meta_model
from hybrid_lora_plugin.cli.allocate import main as allocate_command
from hybrid_lora_plugin.cli.probe import main as probe_command
from hybrid_lora_plugin.config import AllocateCommandConfig, BudgetConfig, ProbeCommandConfig
from hybrid_lora_plugin.config_selection import PLACEMENT_PRESETS, PlacementConfig
from hybrid_lora_plugin.errors import AllocationError, ConfigurationError
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.probing.checks import check_budget
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.training.apply import parts_of, trainable_groups
from tests.support.allocations import decide_for, draw_measurements
from tests.support.tiny_families import make_family
from tests.support.tiny_models import sums, tiny_qwen2_config, write_jsonl

DENSE = tiny_qwen2_config(50)
FALCON = transformers.FalconH1Config(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
)  # fmt: skip
QWEN35 = transformers.Qwen3_5TextConfig(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, linear_num_value_heads=8, linear_num_key_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8,
)  # fmt: skip
RANK = 4


def chosen(config, budget=None, criterion="random", control=None, **placement):
    """An allocation by a criterion that needs no probe."""
    settings = AllocateCommandConfig(
        criterion=criterion, budget=budget or BudgetConfig(ratio=0.3), placement=PlacementConfig(**placement)
    )
    if control:
        settings.control.modules = control
    return decide_for(config, {}, settings)


def by_component(allocation):
    """What is assigned in each component."""
    found = {}
    for module in allocation.modules:
        found.setdefault(module.component, set()).add(module.assignment)
    return found


@pytest.mark.parametrize("config", [DENSE, FALCON, QWEN35], ids=["dense", "falcon_h1", "qwen3_5"])
@pytest.mark.parametrize("preset", PLACEMENT_PRESETS)
def test_a_preset_leaves_its_components_to_the_criterion_and_freezes_the_others(config, preset):
    there = {candidate.component for candidate in find_candidates_from_config(config)}
    if preset != "all" and not set(PLACEMENT_PRESETS[preset]) <= there:
        with pytest.raises(
            AllocationError, match=rf"^placement.preset: '{re.escape(preset)}' names recurrent, and this"
        ):
            chosen(config, preset=preset)
        return
    allocation = chosen(config, BudgetConfig(ratio=0.5, overflow="skip"), preset=preset)
    open_ = set(PLACEMENT_PRESETS[preset]) & there
    for component, assigned in by_component(allocation).items():
        assert (assigned == {"frozen"}) is (component not in open_), (component, assigned)
    decided = [module for module in allocation.modules if module.component in open_]
    assert allocation.decided_modules == decided
    # Eq. 4, of what was left to the criterion.
    limit = sum(module.parameters for module in decided) // 2
    assert allocation.budget.limit == limit and 0 < allocation.budget.used <= limit
    assert allocation.budget.used == allocation.full_parameters
    assert (allocation.selection.placement is None) is (preset == "all" or open_ == there)


def test_a_component_may_be_placed_by_hand_outside_the_budget():
    budget = BudgetConfig(ratio=0.4, overflow="skip")
    allocation = chosen(FALCON, budget, attention="full", recurrent="lora")
    assert by_component(allocation)["attention"] == {"full"}
    # The fused kernel reads this one, so it gets no adapter where the others do.
    recurrent = {module.type: module.assignment for module in allocation.modules if module.component == "recurrent"}
    assert recurrent == {"in_proj": "lora", "out_proj": "frozen"}
    mlp = [module for module in allocation.modules if module.component == "mlp"]
    assert allocation.decided_modules == mlp
    full = [module for module in mlp if module.assignment == "full"]
    assert allocation.budget.used == sum(module.parameters for module in full)
    assert allocation.budget.limit == int(sum(module.parameters for module in mlp) * 4 // 10)
    counts = allocation.parameter_counts()
    assert counts.full == allocation.full_parameters > allocation.budget.used
    lora = [module for module in allocation.modules if module.assignment == "lora"]
    assert counts.lora == sum(RANK * (module.in_features + module.out_features) for module in lora)


def test_a_total_counts_what_is_placed_by_hand():
    total = 40_000
    allocation = chosen(FALCON, BudgetConfig(mode="total_trainable", total=total, overflow="skip"), attention="full")
    counts = allocation.parameter_counts()
    assert allocation.budget.used == counts.trainable <= total
    attention = sum(module.parameters for module in allocation.modules if module.component == "attention")
    with pytest.raises(AllocationError, match=rf"^budget.total: {attention:,}, but LoRA of rank 4 .* alone has"):
        chosen(FALCON, BudgetConfig(mode="total_trainable", total=attention), attention="full")


def test_with_nothing_left_to_it_no_budget_applies_and_nothing_is_probed():
    allocation = chosen(DENSE, attention="full", mlp="frozen")
    assert allocation.budget.mode == "fixed" and allocation.budget.used == allocation.full_parameters
    candidates = find_candidates_from_config(DENSE)
    placement = PlacementConfig(attention="full", mlp="lora")
    with pytest.raises(AllocationError, match="^placement: it leaves no component to criterion 'hybrid'"):
        check_budget(candidates, ProbeCommandConfig(placement=placement))
    check_budget(candidates, ProbeCommandConfig(placement=placement, criterion="random"))
    # Its candidates train every module.
    check_budget(candidates, ProbeCommandConfig(criterion="trial"))
    for there, other in ((candidates, PlacementConfig(preset="mlp")), (find_candidates_from_config(FALCON), None)):
        with pytest.raises(AllocationError, match="^criterion: 'trial' compares allocations in which every module"):
            check_budget(there, ProbeCommandConfig(criterion="trial", placement=other or PlacementConfig()))


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"recurrent": "lora"}, "placement.recurrent: 'lora', and this model has no such modules; .*attention, mlp"),
        ({"attention": "frozen", "mlp": "frozen"}, "placement: every component is frozen"),
        ({"attention": "lora", "mlp": "frozen"}, "placement: no component is full or auto"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(placement, message):
    with pytest.raises(AllocationError, match=f"^{message}"):
        chosen(DENSE, **placement)


def test_a_criterion_that_names_modules_must_not_name_frozen_ones():
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(AllocationError, match=rf"^placement.mlp: the criterion names {name} .* it is frozen"):
        chosen(DENSE, criterion="explicit", control=[name], preset="attention")
    assert chosen(DENSE, criterion="explicit", control=[name], preset="mlp").full_names == [name]


# -- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FALCON, QWEN35], ids=["falcon_h1", "qwen3_5"])
def test_recurrent_projections_are_candidates_of_a_component_of_their_own(config):
    candidates = find_candidates_from_config(config)
    types = {candidate.type for candidate in candidates if candidate.component == "recurrent"}
    wanted = {"in_proj", "out_proj"}
    if config is QWEN35:
        wanted = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
    assert types == wanted and {candidate.component for candidate in candidates} == set(COMPONENTS)
    linear = [name for name, module in meta_model(config).named_modules() if isinstance(module, torch.nn.Linear)]
    assert {candidate.name for candidate in candidates} == set(linear) - {"lm_head"}
    # A kernel reads Mamba's, in training alone.
    without = [candidate.type for candidate in candidates if not candidate.takes_adapter]
    assert without == (["out_proj"] * 2 if config is FALCON else [])


@pytest.mark.parametrize("config", [FALCON, QWEN35], ids=["falcon_h1", "qwen3_5"])
def test_a_kernel_of_the_family_reads_no_weight_whose_module_takes_an_adapter(config):
    """Every candidate's own forward is called, so that what stands in its place acts."""
    model, called = transformers.AutoModelForCausalLM.from_config(config), set()
    for candidate in find_candidates(model):
        hook = lambda *_, name=candidate.name: called.add(name)  # noqa: E731
        model.get_submodule(candidate.name).register_forward_hook(hook)
    model.eval()(torch.arange(12)[None])
    assert called == {candidate.name for candidate in find_candidates(model)}


# -- the artifact -----------------------------------------------------------------------------------------------------


def test_the_artifact_says_the_placement_and_one_without_is_written_as_before(tmp_path):
    plain, placed = chosen(DENSE), chosen(DENSE, preset="mlp")
    assert "placement" not in json.loads(allocation_text(plain))["selection"]
    record = {"attention": "frozen", "mlp": "auto"}
    assert json.loads(allocation_text(placed))["selection"]["placement"] == record
    save_allocation(tmp_path / "placed", placed, {})
    assert load_allocation(tmp_path / "placed") == placed
    report = (tmp_path / "placed" / "report.md").read_text()
    frozen = sum(module.parameters for module in placed.modules if module.component == "attention")
    assert f"and 8 with {frozen:,} parameters stay frozen" in report
    assert "Placement: attention frozen, mlp by the criterion." in report


@pytest.mark.parametrize(
    ("module", "assignment", "wanted"),
    [("self_attn.q_proj", "lora", "'frozen' is wanted"), ("mlp.up_proj", "frozen", "'full' or 'lora' is wanted")],
)
def test_an_artifact_that_contradicts_its_placement_is_refused(tmp_path, module, assignment, wanted):
    payload = json.loads(allocation_text(chosen(DENSE, preset="mlp")))
    (entry,) = (one for one in payload["modules"] if one["name"] == f"model.layers.0.{module}")
    entry["assignment"] = assignment
    (tmp_path / "allocation.json").write_text(json.dumps(payload))
    with pytest.raises(AllocationError, match=f"assignment: '{assignment}' .*{wanted}"):
        load_allocation(tmp_path)
    payload["selection"]["placement"]["mlp"] = "half"
    (tmp_path / "allocation.json").write_text(json.dumps(payload))
    with pytest.raises(AllocationError, match=r"selection.placement.mlp: 'half'"):
        load_allocation(tmp_path)


def test_lora_on_a_weight_that_a_kernel_reads_is_refused_where_it_is_read_and_where_it_is_applied(tmp_path):
    allocation = chosen(FALCON)
    name = "model.layers.0.mamba.out_proj"
    modules = [
        dataclasses.replace(module, assignment="lora") if module.name == name else module
        for module in allocation.modules
    ]
    changed = dataclasses.replace(allocation, modules=modules)
    (tmp_path / "allocation.json").write_text(allocation_text(changed))
    with pytest.raises(AllocationError, match="'lora' for .*mamba.out_proj, 'full' or 'frozen' is wanted"):
        load_allocation(tmp_path)
    with pytest.raises(ConfigurationError, match=rf"^allocation: LoRA on {name}, whose weight a fused kernel reads"):
        apply_allocation(meta_model(FALCON), changed)


# -- the commands -----------------------------------------------------------------------------------------------------


def test_a_probe_measures_every_component_so_that_another_placement_needs_none(tmp_path, capsys):
    model = make_family("falcon_h1", tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(24))
    probe = ["probe.warmup_steps=2", "probe.partitions=2", "probe.batch_size=2", "probe.max_length=64"]
    common = [f"lora.rank={RANK}", "budget.ratio=0.5", "budget.overflow=skip"]
    command = [f"model.path={model}", f"probe.files=[{rows}]", f"output_dir={tmp_path / 'a'}", *probe, *common]
    assert probe_command([*command, "placement.preset=attention+mlp"]) == 0
    said = capsys.readouterr().out
    assert "placement: attention by the criterion, recurrent frozen, mlp by the criterion" in said
    assert re.search(r"full fine-tuning: \d+ of 18 modules, LoRA on \d+; 4 stay frozen, [\d,]+ parameters", said)
    first = load_allocation(tmp_path / "a")
    assert all(module.signal for module in first.modules), "also of what stays frozen"
    again = [f"artifact={tmp_path / 'a'}", f"output_dir={tmp_path / 'b'}", "placement.recurrent=full"]
    assert allocate_command([*again, "placement.attention=lora", "budget.ratio=0.5"]) == 0
    second = load_allocation(tmp_path / "b")
    assert by_component(second)["recurrent"] == {"full"} and by_component(second)["attention"] == {"lora"}
    changed = sum(a.assignment != b.assignment for a, b in zip(first.modules, second.modules, strict=True))
    assert f"{changed} of 18 modules changed their assignment" in capsys.readouterr().out
    everything = [f"artifact={tmp_path / 'a'}", f"output_dir={tmp_path / 'd'}", "budget.ratio=0.5"]
    assert allocate_command(everything) == 0 and (tmp_path / "d" / "scores.png").exists()
    assert by_component(load_allocation(tmp_path / "d"))["attention"] <= {"full", "lora"}
    refused = [f"model.path={model}", f"output_dir={tmp_path / 'c'}", "criterion=random", "placement.preset=half"]
    assert probe_command(refused) == 2 and "placement.preset: 'half'" in capsys.readouterr().err


# -- the model that trains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_components_get_neither_an_adapter_nor_a_gradient(dtype):
    allocation = chosen(FALCON, BudgetConfig(ratio=0.4, overflow="skip"), recurrent="full", attention="frozen")
    torch.manual_seed(0)
    model = apply_allocation(
        transformers.AutoModelForCausalLM.from_config(FALCON, dtype=dtype), allocation, rank=RANK, alpha=8
    )
    groups = trainable_groups(model)
    full = {plain_name(name).rpartition(".")[0] for name, _ in groups["full"]}
    lora = {plain_name(name).partition(".lora_")[0] for name, _ in groups["lora"]}
    assert full == set(allocation.full_names) and lora == set(allocation.lora_names)
    assert any("mamba.out_proj" in name for name in full) and not any("self_attn" in name for name in full | lora)
    assert parts_of(model).counts == allocation.parameter_counts()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(torch.arange(24).reshape(2, 12), labels=torch.arange(24).reshape(2, 12)).loss
    loss.backward()
    optimizer = torch.optim.AdamW([parameter for group in groups.values() for _, parameter in group], lr=1e-3)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    # Weight decay moves what has no gradient yet, A as long as B is 0.
    assert moved == parts_of(model).trained


def test_every_component_has_a_place_for_every_candidate():
    candidates = find_candidates_from_config(FALCON)
    record = placement_record(PlacementConfig(preset="recurrent", mlp="lora"), candidates)
    assert record == {"attention": "frozen", "recurrent": "auto", "mlp": "lora"}
    assert len(places_of(record, candidates)) == len(candidates)
    measured = draw_measurements(len(candidates))
    settings = AllocateCommandConfig(budget=BudgetConfig(ratio=0.5), placement=PlacementConfig(preset="recurrent"))
    scored = decide_for(FALCON, measured, settings)
    # The draws of the bootstrap follow it, too.
    assert scored.stability is not None
    shares = dict(zip((module.component for module in scored.modules), scored.stability.shares, strict=True))
    assert shares["attention"] == shares["mlp"] == 0
