"""An artifact that is complete, reproducible and read strictly."""

import dataclasses
import json
import shutil

import pytest
import torch

from hybrid_lora_plugin.allocation import AllocationError, load_allocation, load_measurements
from hybrid_lora_plugin.candidates import Candidate, find_candidates_from_config
from hybrid_lora_plugin.config import AllocateCommandConfig, BudgetConfig, ControlConfig
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.scoring import hybrid_score, moments
from tests.support.allocations import decide_for, draw_measurements
from tests.support.tiny_models import tiny_qwen2_config


def make_allocation(config=None, ratio=0.3, **settings):
    """An allocation of a tiny Qwen2 decided from drawn measurements, with a silent module, and those."""
    config = config or tiny_qwen2_config(50)
    measurements = draw_measurements(len(find_candidates_from_config(config)))
    measurements["sensitivities"][:, 3] = 0
    settings = AllocateCommandConfig(**{"budget": BudgetConfig(ratio=ratio), **settings})
    return decide_for(config, measurements, settings), measurements


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Written once: drawing the heat map is the slow part."""
    return save_allocation(tmp_path_factory.mktemp("pristine") / "artifact", *make_allocation())


@pytest.fixture
def artifact(pristine, tmp_path):
    """A copy that the test may damage."""
    return shutil.copytree(pristine, tmp_path / "artifact")


def test_what_is_saved_is_what_is_loaded_by_folder_or_by_file(artifact):
    allocation, measurements = make_allocation()
    assert load_allocation(artifact) == load_allocation(str(artifact / "allocation.json")) == allocation
    loaded = load_measurements(artifact, allocation)
    assert list(loaded) == sorted(measurements) and loaded["sensitivities"].dtype == torch.float64
    assert all(torch.equal(loaded[name], tensor) for name, tensor in measurements.items())
    assert sorted(allocation.full_names + allocation.lora_names) == sorted(m.name for m in allocation.modules)
    assert allocation.budget.used == sum(m.parameters for m in allocation.modules if m.name in allocation.full_names)


def test_the_same_decision_gives_the_same_bytes_in_every_file(artifact, tmp_path):
    allocation, measurements = make_allocation()
    # The order in which measurements are given must not show.
    again = save_allocation(tmp_path / "again", allocation, dict(reversed(measurements.items())))
    files = sorted(file.name for file in artifact.iterdir())
    assert files == ["allocation.json", "heatmap.png", "report.md", "scores.png", "sensitivities.safetensors"]
    for file in files:
        assert (artifact / file).read_bytes() == (again / file).read_bytes(), file


def test_an_existing_artifact_or_a_folder_in_use_is_never_overwritten(artifact, tmp_path):
    allocation, measurements = make_allocation()
    before = (artifact / "allocation.json").read_bytes()
    with pytest.raises(AllocationError, match="holds an allocation already"):
        save_allocation(artifact, allocation, measurements)
    assert (artifact / "allocation.json").read_bytes() == before
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("precious")
    with pytest.raises(AllocationError, match="not an empty folder"):
        save_allocation(tmp_path / "used", allocation, measurements)


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    from hybrid_lora_plugin.report import artifact

    allocation, measurements = make_allocation()
    with pytest.raises(AllocationError, match=r"sensitivities: shape \[4, 3\]; give \[T, 14\] or \[14\]"):
        save_allocation(tmp_path / "artifact", allocation, {"sensitivities": measurements["sensitivities"][:, :3]})
    monkeypatch.setattr(artifact, "write_report", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_allocation(tmp_path / "artifact", allocation, measurements)
    assert list(tmp_path.iterdir()) == []


def test_without_measurements_there_is_no_file_and_none_are_loaded(tmp_path):
    settings = dict(criterion="random", control=ControlConfig(seed=3))
    allocation, _ = make_allocation(**settings)
    folder = save_allocation(tmp_path / "artifact", allocation, {})
    assert not (folder / "sensitivities.safetensors").exists()
    assert load_measurements(folder, load_allocation(folder)) == {}


def test_measurements_that_share_memory_or_precision_are_written_as_float64(tmp_path):
    allocation, _ = make_allocation()
    table = torch.rand(4, 14, dtype=torch.float32)
    folder = save_allocation(tmp_path / "artifact", allocation, {"snip": table, "alpha": table[0]})
    loaded = load_measurements(folder, allocation)
    assert torch.equal(loaded["snip"], table.double()) and torch.equal(loaded["alpha"], table[0].double())


@pytest.mark.parametrize(
    "settings, mode",
    [
        (dict(budget=BudgetConfig(mode="modules", ratio=0.3, overflow="skip")), "modules"),
        (dict(budget=BudgetConfig(mode="total_trainable", total=10_000, overflow="skip")), "total_trainable"),
        (dict(criterion="lora_ffn"), "fixed"),
        (dict(criterion="spread", normalise="none"), "parameters"),
    ],
)
def test_every_kind_of_budget_is_written_and_read_back(tmp_path, settings, mode):
    allocation, measurements = make_allocation(**settings)
    loaded = load_allocation(save_allocation(tmp_path / "artifact", allocation, measurements))
    assert loaded == allocation and loaded.budget.mode == mode
    assert 0 < len(loaded.full_names) < 14


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("ratio", 0.5, "budget.ratio: 0.5 but the full modules are"),
        ("limit", 5_000, "budget.used: .* exceeds the limit of 5,000"),
        ("used", 9_000, "budget.used: 9,000 but"),
    ],
)
def test_a_damaged_total_of_trainable_parameters_is_refused(tmp_path, field, value, message):
    allocation, measurements = make_allocation(budget=BudgetConfig(mode="total_trainable", total=10_000))
    folder = save_allocation(tmp_path / "artifact", allocation, measurements)
    payload = json.loads((folder / "allocation.json").read_text())
    payload["budget"][field] = value
    (folder / "allocation.json").write_text(json.dumps(payload))
    with pytest.raises(AllocationError, match=message):
        load_allocation(folder)


def test_an_artifact_written_before_dimensions_and_options_were_recorded_still_loads(artifact):
    file = artifact / "allocation.json"
    payload = json.loads(file.read_text())
    del payload["model"]["parameters"], payload["selection"]["options"], payload["probe"]["options"]
    for module in payload["modules"]:
        del module["in_features"], module["out_features"]
    file.write_text(json.dumps(payload))
    old, new = load_allocation(artifact), make_allocation()[0]
    assert old.full_names == new.full_names and (old.selection, old.probe) == (new.selection, new.probe)
    assert old.model.parameters == 0 and {c.in_features for c in old.modules} == {0}
    with pytest.raises(AllocationError, match="^model.parameters: .*not recorded.*probe again"):
        old.parameter_counts()


def test_the_decision_records_moments_scores_signal_and_the_settings_that_made_them():
    allocation, measurements = make_allocation()
    series = measurements["sensitivities"]
    scores, (means, stds) = hybrid_score(series), moments(series)
    assert [m.score for m in allocation.modules] == scores.tolist()
    assert [(m.mean, m.std) for m in allocation.modules] == list(zip(means.tolist(), stds.tolist(), strict=True))
    assert [m.name for m in allocation.modules if not m.signal] == [allocation.modules[3].name]
    assert allocation.modules[3].assignment == "lora"
    selection = allocation.selection
    assert (selection.criterion, selection.direction, selection.normalise) == ("hybrid", "lowest", "none")
    fields = [field.name for field in dataclasses.fields(Candidate)]
    candidates = find_candidates_from_config(tiny_qwen2_config(50))
    assert [[getattr(m, f) for f in fields] for m in allocation.modules] == [
        [getattr(c, f) for f in fields] for c in candidates
    ]
    highest, _ = make_allocation(direction="highest")
    assert highest.selection.direction == "highest"
    assert max(allocation.modules, key=lambda m: m.score).name in highest.full_names
    assert min((m for m in allocation.modules if m.signal), key=lambda m: m.score).name in allocation.full_names


def test_the_options_a_criterion_read_are_recorded_and_those_of_another_are_not():
    control = ControlConfig(seed=7, type="k_proj", modules=["model.layers.1.mlp.up_proj"])
    options = {}
    for name in ("random", "spread", "explicit", "hybrid"):
        options[name] = make_allocation(criterion=name, control=control)[0].selection.options
    assert options == {
        "random": {"seed": 7},
        "spread": {"type": "k_proj", "depth": "all"},
        "explicit": {"modules": ["model.layers.1.mlp.up_proj"]},
        "hybrid": {},
    }


def test_the_record_of_the_probe_stays_when_another_criterion_is_read_off():
    from hybrid_lora_plugin.allocation.select import select_modules

    allocation, measurements = make_allocation()
    recorded = dataclasses.replace(allocation.probe, partitions_per_batch=2, options={"adalora": {"beta": 0.5}})
    settings = AllocateCommandConfig(criterion="spread", budget=BudgetConfig(ratio=0.3))
    again = select_modules(
        settings, allocation.model, allocation.modules, measurements, lora_rank=4, probe=recorded, environment={}
    )
    assert again.probe == recorded and again.selection.options == {"type": "o_proj", "depth": "all"}


def test_what_was_not_probed_has_no_record_of_a_probe_in_memory_and_on_disk(tmp_path):
    allocation, measurements = make_allocation(criterion="random")
    unprobed = dataclasses.replace(allocation, probe=None)
    folder = save_allocation(tmp_path / "artifact", unprobed, measurements)
    payload = json.loads((folder / "allocation.json").read_text())
    assert "probe" not in payload and load_allocation(folder) == unprobed
    payload["probe"] = None
    (folder / "allocation.json").write_text(json.dumps(payload))
    with pytest.raises(AllocationError, match="probe: None, an object is wanted"):
        load_allocation(folder)


def test_a_direction_is_refused_where_the_criterion_names_its_modules():
    with pytest.raises(AllocationError, match="direction: 'highest' has no effect on criterion 'lora_ffn'"):
        make_allocation(criterion="lora_ffn", direction="highest")


def test_the_counts_are_of_frozen_full_and_adapter_parameters():
    allocation, _ = make_allocation()
    counts = allocation.parameter_counts()
    by_name = {c.name: c for c in allocation.modules}
    full = sum(by_name[name].parameters for name in allocation.full_names)
    lora = sum(4 * (by_name[n].in_features + by_name[n].out_features) for n in allocation.lora_names)
    # Embeddings (tied with the head) and norms belong to the whole: 50 x 32 and 5 x 32.
    whole = allocation.model.candidate_parameters + 50 * 32 + 5 * 32
    assert (counts.full, counts.lora, counts.frozen) == (full, lora, whole - full)


def test_the_report_states_budget_counts_modules_doubt_and_use(artifact):
    allocation, _ = make_allocation()
    report = (artifact / "report.md").read_text()
    for wanted in (
        f"{allocation.budget.limit:,}",
        f"{allocation.budget.used:,}",
        f"{allocation.parameter_counts().frozen:,}",
        f"{allocation.parameter_counts().full:,}",
        f"{allocation.parameter_counts().lora:,}",
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
    "unknown version": (change(["schema_version"], 3), "schema_version: 3, 2 or 1 is wanted"),
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
    "unknown mode": (change(["budget", "mode"], "bytes"), "budget.mode: 'bytes' is unknown"),
    "fixed with another share": (change(["budget", "mode"], "fixed"), "budget.ratio: 0.3 but the full modules are"),
    "modules counted as parameters": (change(["budget", "mode"], "modules"), "budget.limit: .* allows 4"),
    "no rank": (change(["budget", "lora_rank"], 0), "budget.lora_rank: 0, more than 0"),
    "no probe method": (lambda p: p["probe"].pop("method"), "probe: missing key 'method'"),
    "a version 1 in name only": (change(["schema_version"], 1), "criterion: None, an object is wanted"),
    "no limit": (change(["budget", "limit"], 0), "budget.limit: 0, more than 0"),
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


def test_measurements_that_are_damaged_or_of_other_modules_are_refused(artifact):
    allocation, _ = make_allocation()
    with pytest.raises(AllocationError, match="does not list the modules"):
        load_measurements(artifact, dataclasses.replace(allocation, modules=allocation.modules[1:]))
    (artifact / "sensitivities.safetensors").write_bytes(b"x")
    with pytest.raises(AllocationError, match="cannot be read"):
        load_measurements(artifact, allocation)


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
    allocation, measurements = make_allocation(tiny_qwen2_config(50, layers=layers), ratio=0.1)
    folder = save_allocation(tmp_path / "artifact", allocation, measurements)
    png = (folder / "heatmap.png").read_bytes()
    assert png.startswith(b"\x89PNG") and b"Software" not in png
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    assert width >= layers * 30 and 300 < height < 700
