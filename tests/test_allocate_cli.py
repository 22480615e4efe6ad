"""``hybrid-lora-allocate`` from a saved artifact to a new one, without a model."""

import json
import re
import subprocess
import sys

import pytest

from hybrid_lora_plugin.allocation import allocate, load_allocation, load_measurements
from hybrid_lora_plugin.candidates import find_candidates_from_config
from hybrid_lora_plugin.cli.allocate import main
from hybrid_lora_plugin.config import BudgetConfig
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.scoring import Measured, score_modules
from tests.support.allocations import decide_for, draw_measurements
from tests.support.tiny_models import tiny_qwen2_config

CONFIG = tiny_qwen2_config(50)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An artifact as a probe with controls leaves it: Hybrid-Score, 30 % of the parameters."""
    measurements = draw_measurements(14)
    return save_allocation(tmp_path_factory.mktemp("source") / "probe", decide_for(CONFIG, measurements), measurements)


def run(source, output, *arguments):
    return main([f"artifact={source}", f"output_dir={output}", *arguments])


@pytest.mark.parametrize(
    "criterion", ["hybrid", "hybrid_ratio", "hybrid_additive", "lora_drop", "alpha", "snip", "random", "spread"]
)
def test_a_criterion_is_read_off_the_measurements(source, tmp_path, criterion):
    assert run(source, tmp_path / "new", f"criterion={criterion}", "budget.ratio=0.4") == 0
    before, after = load_allocation(source), load_allocation(tmp_path / "new")
    candidates, measurements = find_candidates_from_config(CONFIG), load_measurements(source, before)
    scored = score_modules(criterion, Measured(candidates, measurements))
    direction = "highest" if criterion == "snip" else "lowest"
    wanted = allocate(candidates, scored.scores, BudgetConfig(ratio=0.4), direction, scored.signal, scored.means)
    assert after.full_names == wanted.full_names
    assert [module.score for module in after.modules] == scored.scores.tolist()
    assert (after.selection.criterion, after.selection.direction, after.budget.ratio) == (criterion, direction, 0.4)


def test_model_environment_and_probing_settings_are_kept_and_the_measurements_go_along(source, tmp_path):
    assert run(source, tmp_path / "new", "criterion=alpha", "normalise=type_zscore", "direction=highest") == 0
    before, after = load_allocation(source), load_allocation(tmp_path / "new")
    assert after.model == before.model and after.environment == before.environment
    assert after.probe == before.probe
    changed = {key for key, value in vars(after.selection).items() if value != getattr(before.selection, key)}
    assert changed == {"criterion", "direction", "normalise"}
    files = [folder / "sensitivities.safetensors" for folder in (source, tmp_path / "new")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "new" / "report.md").exists() and (tmp_path / "new" / "scores.png").exists()


def test_the_same_settings_give_the_artifact_itself_byte_for_byte_and_change_nothing(source, tmp_path, capsys):
    assert run(source, tmp_path / "new", "budget.ratio=0.3") == 0
    for file in source.iterdir():
        assert file.read_bytes() == (tmp_path / "new" / file.name).read_bytes(), file.name
    assert f"against {source}: 0 of 14 modules changed their assignment" in capsys.readouterr().out


def test_the_result_is_told_with_what_changed_and_what_to_do_next(source, tmp_path, capsys):
    assert run(source, tmp_path / "new", "criterion=lora_ffn") == 0
    output = capsys.readouterr().out
    before, after = (set(load_allocation(folder).full_names) for folder in (source, tmp_path / "new"))
    assert f"{len(before ^ after)} of 14 modules changed" in output
    assert "full fine-tuning: 8 of 14 modules, LoRA on the other 6" in output
    assert "budget: none, criterion lora_ffn names the modules" in output
    assert f"hybrid_lora.allocation={tmp_path / 'new'}" in output


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["budget.mode=modules", "budget.ratio=0.25"], "budget: 25 % of 14 modules = 3; used 3 (21.43 %)"),
        (["budget.mode=total_trainable", "budget.total=10000"], "budget: 10,000 trainable parameters, LoRA included"),
        (["budget.ratio=0.5"], "budget: 50 % of 18,560 parameters = 9,280; used "),
    ],
)
def test_the_budget_is_told_in_the_unit_of_its_mode(source, tmp_path, capsys, arguments, line):
    assert run(source, tmp_path / "new", *arguments) == 0
    assert line in capsys.readouterr().out


def test_the_allocation_file_itself_may_be_given(source, tmp_path):
    assert run(source / "allocation.json", tmp_path / "new", "criterion=snip") == 0
    assert load_allocation(tmp_path / "new").selection.criterion == "snip"


def test_an_artifact_without_measurements_still_serves_the_criteria_without_a_probe(tmp_path, capsys):
    from hybrid_lora_plugin.config import AllocateCommandConfig

    drawn = decide_for(CONFIG, {}, AllocateCommandConfig(criterion="random", budget=BudgetConfig(ratio=0.4)))
    source = save_allocation(tmp_path / "drawn", drawn, {})
    assert run(source, tmp_path / "again", "criterion=random", "control.seed=1", "budget.ratio=0.4") == 0
    assert load_allocation(tmp_path / "again").selection.options == {"seed": 1}
    assert run(source, tmp_path / "hybrid") == 2
    assert "does not hold 'sensitivities' (it holds no measurement)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["criterion=full_pruning"], "does not hold 'full_sensitivities'.*probe with criterion=full_pruning"),
        (["criterion=perturbation"], "does not hold 'perturbation'"),
        (["criterion=hybird"], "criterion: 'hybird' is not supported; choose one of hybrid"),
        (["criterion=explicit"], "control.modules: "),
        (["criterion=explicit", "control.modules=[model.layers.0.mlp.up]"], "closest name is 'model.layers.0.mlp.up_"),
        (["criterion=random", "normalise=sqrt_dims"], "normalise: 'sqrt_dims' has no meaning"),
        (["budget.ratio=0.0001"], "budget.ratio: 0.0001 allows 1 of 18,560"),
        (["budget.mode=total_trainable"], "budget.total: None"),
        (["budget.mode=total_trainable", "budget.total=9"], "budget.total: 9, but LoRA of rank 4"),
        (["budget.rato=0.1"], "did you mean 'budget.ratio'"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_writes_nothing(source, tmp_path, capsys, arguments, message):
    assert run(source, tmp_path / "new", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("hybrid-lora-allocate: ")
    assert re.search(message, captured.err), captured.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten_and_folders_must_be_given(source, tmp_path, capsys):
    before = (source / "allocation.json").read_bytes()
    assert run(source, source, "criterion=random") == 2
    assert "holds an allocation already" in capsys.readouterr().err
    assert (source / "allocation.json").read_bytes() == before
    assert main([f"artifact={source}"]) == 2 and "output_dir: not given" in capsys.readouterr().err
    assert main([f"output_dir={tmp_path / 'new'}"]) == 2 and "artifact: not given" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", tmp_path / "new") == 2 and "cannot be read" in capsys.readouterr().err


def test_an_artifact_of_an_earlier_version_is_refused_with_what_it_lacks(source, tmp_path, capsys):
    payload = json.loads((source / "allocation.json").read_text())
    del payload["model"]["parameters"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "allocation.json").write_text(json.dumps(payload))
    assert run(tmp_path / "old", tmp_path / "new", "criterion=random", "budget.ratio=0.5") == 2
    assert "model.parameters: " in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_command_loads_no_model_library_and_help_not_even_torch(source, tmp_path):
    code = (
        "import sys\n"
        "from hybrid_lora_plugin.cli.allocate import main\n"
        "assert main(['--help']) == 0\n"
        "assert 'torch' not in sys.modules\n"
        f"assert main(['artifact={source}', 'output_dir={tmp_path / 'new'}', 'criterion=random']) == 0\n"
        "assert not {'transformers', 'peft', 'verl', 'vllm'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "control.seed=0" in done.stdout and "budget.mode=parameters" in done.stdout
