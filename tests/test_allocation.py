"""The budget rule, and an artifact that is complete, reproducible and read strictly."""

import json
import math
import shutil
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_qwen2_config
from transformers import Qwen2Config

from hybrid_lora_plugin.allocation import AllocationError, allocate, load_allocation, save_allocation
from hybrid_lora_plugin.allocation.artifact import (
    Allocation,
    BudgetRecord,
    CriterionRecord,
    ModelIdentity,
    ModuleRecord,
    load_sensitivities,
)
from hybrid_lora_plugin.allocation.budget import budget_limit
from hybrid_lora_plugin.allocation.report import Census
from hybrid_lora_plugin.candidates import TYPE_ORDER, Candidate, find_candidates_from_config, model_fingerprint
from hybrid_lora_plugin.config import BudgetConfig
from hybrid_lora_plugin.scoring import has_signal, hybrid_score, moments


def candidates_of(parameters):
    return [
        Candidate(f"layers.{i // 7}.{TYPE_ORDER[i % 7]}", i // 7, TYPE_ORDER[i % 7], "attention", size)
        for i, size in enumerate(parameters)
    ]


def full(assignment):
    return [name for name, how in assignment.modules.items() if how == "full"]


def test_lowest_scores_are_taken_until_the_first_that_does_not_fit():
    candidates = candidates_of([10, 30, 10, 50])
    assignment = allocate(candidates, [1.0, 3.0, 2.0, 4.0], BudgetConfig(ratio=0.45))
    # Limit 45: 10, 10, then 30 does not fit and ends it, though nothing larger was tried.
    assert full(assignment) == [candidates[0].name, candidates[2].name]
    assert (assignment.total, assignment.limit, assignment.used) == (100, 45, 20)
    assert assignment.full_names + assignment.lora_names == full(assignment) + [candidates[1].name, candidates[3].name]


def test_stop_does_not_go_on_to_a_smaller_module():
    candidates = candidates_of([10, 80, 10])
    assert full(allocate(candidates, [1, 2, 3], BudgetConfig(ratio=0.5))) == [candidates[0].name]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(1e-6, 1e3)), min_size=1, max_size=21),
    st.floats(0.01, 1.0),
    st.sampled_from(["lowest", "highest"]),
)
def test_the_selection_is_a_prefix_of_the_score_order_that_fills_but_never_exceeds_the_budget(
    modules, ratio, direction
):
    candidates = candidates_of([size for size, _ in modules])
    scores = [score for _, score in modules]
    order = sorted(range(len(scores)), key=lambda i: (scores[i] if direction == "lowest" else -scores[i], i))
    limit = math.floor(Fraction(repr(ratio)) * sum(size for size, _ in modules))
    taken, used = [], 0
    for index in order:
        if used + candidates[index].parameters > limit:
            break
        taken.append(candidates[index].name)
        used += candidates[index].parameters
    if not taken:
        with pytest.raises(AllocationError, match="budget.ratio"):
            allocate(candidates, scores, BudgetConfig(ratio=ratio), direction)
        return
    assignment = allocate(candidates, scores, BudgetConfig(ratio=ratio), direction)
    assert set(full(assignment)) == set(taken)
    assert assignment.used == used <= assignment.limit == limit
    assert list(assignment.modules) == [candidate.name for candidate in candidates]


def test_the_limit_is_exact_integer_arithmetic():
    assert budget_limit(1_310_253_056, 0.1) == 131_025_305
    assert budget_limit(100, 0.29) == 29 and int(0.29 * 100) == 28
    assert budget_limit(7, 1.0) == 7


def test_ties_are_broken_by_mean_then_layer_then_type():
    candidates = candidates_of([1] * 14)
    scores = [1.0] * 14
    assert full(allocate(candidates, scores, BudgetConfig(ratio=0.15))) == [c.name for c in candidates[:2]]
    means = [2.0] * 14
    means[9] = 1.0
    assert full(allocate(candidates, scores, BudgetConfig(ratio=0.1), means=means)) == [candidates[9].name]
    # Given in another order, the same modules win.
    backwards = candidates[::-1]
    assert set(full(allocate(backwards, scores, BudgetConfig(ratio=0.15)))) == {c.name for c in candidates[:2]}


def test_a_module_without_signal_is_never_selected():
    candidates = candidates_of([10, 10, 10])
    assert full(allocate(candidates, [0.0, 1.0, 2.0], BudgetConfig(ratio=0.4))) == [candidates[1].name]
    only_last = allocate(candidates, [1.0, 2.0, 3.0], BudgetConfig(ratio=1.0), signal=[False, False, True])
    assert full(only_last) == [candidates[2].name]
    with pytest.raises(AllocationError, match="no candidate has a signal"):
        allocate(candidates, [0.0, 0.0, 0.0], BudgetConfig())


def test_a_budget_below_the_first_module_is_refused_with_the_ratio_that_is_enough():
    candidates = candidates_of([50, 30, 20])
    with pytest.raises(AllocationError, match=r"0.1 allows 10 of 100 .* 50 .*smallest candidate has 20.*at least 0.5$"):
        allocate(candidates, [1.0, 2.0, 3.0], BudgetConfig(ratio=0.1))
    assert full(allocate(candidates, [1.0, 2.0, 3.0], BudgetConfig(ratio=0.5))) == [candidates[0].name]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(scores=[1.0]), "scores: 1 values for 2 candidates"),
        (dict(scores=[1.0, float("nan")]), "scores: nan for layers.0.k_proj"),
        (dict(signal=[True]), "signal: 1 values"),
        (dict(means=[1.0]), "means: 1 values"),
        (dict(direction="auto"), "direction: 'auto'"),
        (dict(budget=BudgetConfig(mode="modules")), "mode 'modules'"),
        (dict(budget=BudgetConfig(overflow="skip")), "overflow 'skip'"),
        (dict(budget=BudgetConfig(ratio=1.5)), "budget.ratio: 1.5"),
    ],
)
def test_unusable_arguments_are_named(arguments, message):
    defaults = dict(candidates=candidates_of([1, 1]), scores=[1.0, 2.0], budget=BudgetConfig(ratio=0.5))
    with pytest.raises(AllocationError, match=message):
        allocate(**(defaults | arguments))


def make_allocation(config=None, name="models/tiny", ratio=0.3, batches=4):
    """A consistent allocation of a tiny Qwen2 with random sensitivities, and those."""
    config = config or tiny_qwen2_config(50)
    candidates = find_candidates_from_config(config)
    sensitivities = torch.rand(
        batches, len(candidates), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    sensitivities[:, 3] = 0
    scores = hybrid_score(sensitivities)
    (mean, std), signal = moments(sensitivities), has_signal(scores)
    assignment = allocate(candidates, scores, BudgetConfig(ratio=ratio), means=mean)
    modules = [
        ModuleRecord(
            **vars(c),
            mean=float(mean[i]),
            std=float(std[i]),
            score=float(scores[i]),
            signal=bool(signal[i]),
            assignment=assignment.modules[c.name],
        )
        for i, c in enumerate(candidates)
    ]
    allocation = Allocation(
        model=ModelIdentity(
            name, "Qwen2ForCausalLM", model_fingerprint(config), config.num_hidden_layers, assignment.total
        ),
        criterion=CriterionRecord(
            "hybrid",
            "lowest",
            "none",
            "sft",
            16,
            "default",
            500,
            2.5e-5,
            batches,
            8,
            2048,
            "float32",
            0,
            {"files": [{"name": "rows.jsonl", "rows": 100, "sha256": "0" * 64}]},
        ),
        budget=BudgetRecord("parameters", ratio, "stop", assignment.limit, assignment.used),
        modules=modules,
        environment={"torch": "2"},
    )
    return allocation, sensitivities


CENSUS = Census(frozen=1000, full=200, lora=30)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Written once: drawing the heat map is the slow part."""
    return save_allocation(tmp_path_factory.mktemp("pristine") / "artifact", *make_allocation(), CENSUS)


@pytest.fixture
def artifact(pristine, tmp_path):
    """A copy that the test may damage."""
    return shutil.copytree(pristine, tmp_path / "artifact")


def test_what_is_saved_is_what_is_loaded_by_folder_or_by_file(artifact):
    allocation, sensitivities = make_allocation()
    assert load_allocation(artifact) == load_allocation(str(artifact / "allocation.json")) == allocation
    assert torch.equal(load_sensitivities(artifact, allocation), sensitivities)
    assert sorted(allocation.full_names + allocation.lora_names) == sorted(m.name for m in allocation.modules)
    assert allocation.budget.used == sum(m.parameters for m in allocation.modules if m.name in allocation.full_names)


def test_the_same_decision_gives_the_same_bytes_in_every_file(artifact, tmp_path):
    allocation, sensitivities = make_allocation()
    again = save_allocation(tmp_path / "again", allocation, sensitivities, CENSUS)
    files = sorted(file.name for file in artifact.iterdir())
    assert files == ["allocation.json", "heatmap.png", "report.md", "sensitivities.safetensors"]
    for file in files:
        assert (artifact / file).read_bytes() == (again / file).read_bytes(), file


def test_an_existing_artifact_or_a_folder_in_use_is_never_overwritten(artifact, tmp_path):
    allocation, sensitivities = make_allocation()
    before = (artifact / "allocation.json").read_bytes()
    with pytest.raises(AllocationError, match="holds an allocation already"):
        save_allocation(artifact, allocation, sensitivities, CENSUS)
    assert (artifact / "allocation.json").read_bytes() == before
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("precious")
    with pytest.raises(AllocationError, match="not an empty folder"):
        save_allocation(tmp_path / "used", allocation, sensitivities, CENSUS)


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path):
    allocation, sensitivities = make_allocation()
    with pytest.raises(AttributeError):
        save_allocation(tmp_path / "artifact", allocation, sensitivities, census=None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AllocationError, match="a column a module"):
        save_allocation(tmp_path / "artifact", allocation, sensitivities[:, :3], CENSUS)
    assert list(tmp_path.iterdir()) == []


def test_the_report_states_budget_census_modules_doubt_and_use(artifact):
    allocation, _ = make_allocation()
    report = (artifact / "report.md").read_text()
    for wanted in (
        f"| limit | {allocation.budget.limit:,} |",
        f"| used | {allocation.budget.used:,} |",
        "| frozen | 1,000 |",
        "| full fine-tuning | 200 |",
        "| LoRA (rank 16) | 30 |",
        "unproven",
        "worse than choosing",
        "+hybrid_lora=enabled hybrid_lora.allocation=PATH",
        "No signal",
        *(f"`{name}`" for name in allocation.full_names),
    ):
        assert wanted in report, wanted


def change(path, value):
    """A change of one field of the parsed JSON, given by its path; a callable value computes the new one."""

    def apply(payload):
        *parents, last = path
        for key in parents:
            payload = payload[key]
        payload[last] = value(payload[last]) if callable(value) else value

    return apply


def give_more(payload):
    for module in payload["modules"]:
        if module["assignment"] == "lora":
            module["assignment"] = "full"
            payload["budget"]["used"] += module["parameters"]


DAMAGE = {
    "unknown version": (change(["schema_version"], 2), "schema_version: 2, 1 is wanted"),
    "version of another type": (change(["schema_version"], True), "schema_version: True"),
    "no version": (lambda p: p.pop("schema_version"), "schema_version: None"),
    "unknown key": (change(["color"], "red"), "unknown key 'color'"),
    "unknown inner key": (change(["budget", "colour"], 1), "budget: unknown key 'colour'"),
    "missing key": (lambda p: p["modules"][1].pop("score"), r"modules\[1\]: missing key 'score'"),
    "missing block": (lambda p: p.pop("budget"), "missing key 'budget'"),
    "wrong type": (change(["modules", 0, "layer"], "0"), r"modules\[0\].layer: '0', a value of type int"),
    "bool as number": (change(["budget", "used"], True), "budget.used: True, a value of type int"),
    "list as object": (change(["model"], []), r"model: \[\], an object is wanted"),
    "object as list": (change(["modules"], {}), "modules: {}, a list is wanted"),
    "no modules": (change(["modules"], []), "modules: empty"),
    "duplicate module": (
        lambda p: p["modules"].append(p["modules"][0]),
        r"modules\[14\]: duplicate module 'model.layers.0.self_attn.q_proj'",
    ),
    "bad assignment": (change(["modules", 0, "assignment"], "frozen"), r"modules\[0\].assignment: 'frozen' for model"),
    "bad type": (change(["modules", 0, "type"], "x_proj"), r"modules\[0\].type: 'x_proj'"),
    "bad component": (change(["modules", 0, "component"], "mlp"), r"modules\[0\].component: 'mlp'"),
    "bad layer": (change(["modules", 0, "layer"], 9), r"modules\[0\].layer: 9"),
    "no parameters": (change(["modules", 0, "parameters"], 0), r"modules\[0\].parameters: 0"),
    "wrong total": (change(["model", "candidate_parameters"], 5), "model.candidate_parameters: 5"),
    "wrong used": (change(["budget", "used"], lambda used: used + 1), "budget.used: .* add up to"),
    "wrong limit": (change(["budget", "limit"], lambda limit: limit + 1), "budget.limit: "),
    "wrong ratio": (change(["budget", "ratio"], 0.0), "budget.ratio: 0.0"),
    "exceeded": (give_more, "budget.used: .* exceeds the limit"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_allocation_is_refused_with_the_field_named(artifact, damage):
    spoil, message = DAMAGE[damage]
    file = artifact / "allocation.json"
    payload = json.loads(file.read_text())
    spoil(payload)
    file.write_text(json.dumps(payload))
    with pytest.raises(AllocationError, match=message) as caught:
        load_allocation(artifact)
    assert "\n" not in str(caught.value) and "hybrid-lora-probe" in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[1]", "schema_version: None"),
        ('{"schema_version": 1, "schema_version": 1}', "duplicate key"),
        ('{"schema_version": NaN}', "NaN is not a number"),
        ("\0", "not valid JSON"),
    ],
)
def test_a_file_that_is_not_such_json_is_refused(artifact, text, message):
    (artifact / "allocation.json").write_text(text)
    with pytest.raises(AllocationError, match=message):
        load_allocation(artifact)


def test_a_missing_file_or_folder_is_refused_with_the_way_out(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "allocation.json"):
        with pytest.raises(AllocationError, match="hybrid_lora.allocation: .*cannot be read.*hybrid-lora-probe wrote"):
            load_allocation(path)


def test_sensitivities_that_are_missing_damaged_or_of_other_modules_are_refused(artifact, tmp_path):
    allocation, sensitivities = make_allocation()
    with pytest.raises(AllocationError, match="does not list the modules"):
        load_sensitivities(artifact, replace(allocation, modules=allocation.modules[1:]))
    (artifact / "sensitivities.safetensors").write_bytes(b"x")
    with pytest.raises(AllocationError, match="cannot be read"):
        load_sensitivities(artifact, allocation)
    with pytest.raises(AllocationError, match="cannot be read"):
        load_sensitivities(tmp_path, allocation)


def test_the_model_that_was_probed_is_accepted(artifact):
    config = tiny_qwen2_config(50, pad_token_id=3, dtype="bfloat16")
    load_allocation(artifact).check_model(config, find_candidates_from_config(config))


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(layers=3), "14 modules against 21"),
        (dict(hidden=64), "q_proj has 1,056 parameters against 4,160"),
        (dict(vocab_size=51), "config_sha256"),
    ],
    ids=["depth", "width", "vocabulary"],
)
def test_another_model_is_refused_with_both_named(artifact, other, message):
    config = tiny_qwen2_config(**({"vocab_size": 50} | other))
    config._name_or_path = "models/other"
    with pytest.raises(AllocationError, match=f"another model.*'models/tiny'.*'models/other'.*{message}"):
        load_allocation(artifact).check_model(config, find_candidates_from_config(config))


def test_another_architecture_is_refused(artifact):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.raises(AllocationError, match="Qwen2ForCausalLM against LlamaForCausalLM"):
        load_allocation(artifact).check_model(config, find_candidates_from_config(config))


@pytest.mark.parametrize("layers", [28, 80])
def test_the_heat_map_grows_with_depth(tmp_path, layers):
    allocation, sensitivities = make_allocation(tiny_qwen2_config(50, layers=layers), ratio=0.1)
    folder = save_allocation(tmp_path / "artifact", allocation, sensitivities, CENSUS)
    png = (folder / "heatmap.png").read_bytes()
    assert png.startswith(b"\x89PNG") and b"Software" not in png
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    assert width >= layers * 30 and 300 < height < 700


def test_qwen25_7b_at_ten_percent_stays_under_its_limit():
    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    )
    candidates = find_candidates_from_config(config)
    assignment = allocate(candidates, torch.rand(196, generator=torch.Generator().manual_seed(1)) + 1, BudgetConfig())
    assert assignment.limit == 652_541_747 and 0 < assignment.used <= assignment.limit
