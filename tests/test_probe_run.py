"""A whole probe: reproducible to the byte, resumable, and careful with what is already there."""

import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin.allocation import AllocationError, load_allocation
from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import (
    WITHOUT_WARMUP,
    AdaLoraConfig,
    AdapterConfig,
    BudgetConfig,
    ModelConfig,
    ProbeCommandConfig,
    ProbeConfig,
)
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing import stages
from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted
from hybrid_lora_plugin.probing.progress import LineProgress, Progress, clock
from hybrid_lora_plugin.probing.runner import run_probe
from tests.support.tiny_models import make_tiny_qwen2, sums, write_jsonl


def probe_config(model, tmp_path, name="out", rows=60, **probe):
    values = dict(warmup_steps=8, partitions=4, batch_size=4, max_length=64, lr=5e-3)
    return ProbeCommandConfig(
        model=ModelConfig(path=str(model)),
        output_dir=str(tmp_path / name),
        budget=BudgetConfig(ratio=0.3),
        lora=AdapterConfig(rank=3),
        probe=ProbeConfig(files=[write_jsonl(tmp_path / "rows.jsonl", sums(rows))], **(values | probe)),
    )


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class InterruptAt(Progress):
    """Sends this process a real signal after so many steps in all."""

    def __init__(self, steps, signum=signal.SIGINT):
        self.left, self.signum, self.losses, self.notes = steps, signum, [], []

    def note(self, text):
        self.notes.append(text)

    def advance(self, done, loss):
        self.losses.append(loss)
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.signum)


@pytest.fixture(scope="module")
def uninterrupted(tiny_qwen2, tmp_path_factory):
    return run_probe(probe_config(tiny_qwen2, tmp_path_factory.mktemp("uninterrupted")))


def test_the_same_settings_give_the_same_bytes_and_another_seed_does_not(tiny_qwen2, uninterrupted, tmp_path):
    again = run_probe(probe_config(tiny_qwen2, tmp_path))
    assert contents(again) == contents(uninterrupted)
    other = run_probe(probe_config(tiny_qwen2, tmp_path, "other", seed=1))
    assert contents(other)["sensitivities.safetensors"] != contents(again)["sensitivities.safetensors"]


@pytest.mark.parametrize("stops", [(1,), (5,), (8,), (10,), (3, 3, 4)], ids=str)
def test_an_interrupted_run_continues_to_the_bytes_of_an_uninterrupted_one(tiny_qwen2, uninterrupted, tmp_path, stops):
    config, before = probe_config(tiny_qwen2, tmp_path), signal.getsignal(signal.SIGINT)
    for stop, signum in zip(stops, (signal.SIGINT, signal.SIGTERM, signal.SIGINT), strict=False):
        with pytest.raises(ProbeInterrupted) as caught:
            run_probe(config, InterruptAt(stop, signum))
        assert caught.value.folder == tmp_path / "out.partial" and caught.value.signum == signum
    last = InterruptAt(0)
    assert contents(run_probe(config, last)) == contents(uninterrupted)
    assert len(last.losses) == 12 - sum(stops)
    assert any("continuing" in note for note in last.notes)
    assert not (tmp_path / "out.partial").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_state_is_saved_by_time_as_well(tiny_qwen2, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "SAVE_EVERY_SECONDS", 0.0)
    config = probe_config(tiny_qwen2, tmp_path)

    class Crash(Progress):
        def advance(self, done, loss):
            if done == 4:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run_probe(config, Crash())
    from safetensors import safe_open

    with safe_open(tmp_path / "out.partial" / "warmup.safetensors", framework="pt") as saved:
        assert saved.metadata() == {"step": "3"}


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(lr=1e-3), "probe.lr: .*begun with 0.005, this run has 0.001"),
        (dict(seed=4), "probe.seed"),
        (dict(warmup_steps=9), "probe.warmup_steps"),
        (dict(rows=61), "probe.files"),
    ],
    ids=["lr", "seed", "steps", "data"],
)
def test_a_changed_setting_does_not_continue_another_run(tiny_qwen2, tmp_path, change, field):
    with pytest.raises(ProbeInterrupted):
        run_probe(probe_config(tiny_qwen2, tmp_path), InterruptAt(2))
    with pytest.raises(ProbeError, match=f"{field}.*delete .*out.partial"):
        run_probe(probe_config(tiny_qwen2, tmp_path, **change))


def test_a_damaged_state_is_refused(tiny_qwen2, tmp_path):
    config = probe_config(tiny_qwen2, tmp_path)
    with pytest.raises(ProbeInterrupted):
        run_probe(config, InterruptAt(2))
    for file in ("warmup.safetensors", "settings.json"):
        (tmp_path / "out.partial" / file).write_bytes(b"{")
        with pytest.raises(ProbeError, match=f"{file} is damaged .*delete"):
            run_probe(config)


def test_the_artifact_belongs_to_the_model_that_was_probed(tiny_qwen2, uninterrupted):
    allocation = load_allocation(uninterrupted)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    allocation.check_model(model.config, find_candidates(model))
    assert allocation.model.candidate_parameters == sum(c.parameters for c in find_candidates(model))
    assert allocation.full_names and allocation.lora_names
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"| frozen | {total - allocation.budget.used:,} |" in (uninterrupted / "report.md").read_text()
    assert load_file(uninterrupted / "sensitivities.safetensors")["sensitivities"].shape == (4, 14)


def test_direction_highest_takes_the_other_end(tiny_qwen2, tmp_path):
    lowest, highest = (
        load_allocation(run_probe(replace(probe_config(tiny_qwen2, tmp_path, name), direction=name)))
        for name in ("lowest", "highest")
    )
    ranked = sorted(lowest.modules, key=lambda module: module.score)
    assert ranked[0].name in lowest.full_names and ranked[0].name not in highest.full_names
    assert ranked[-1].name in highest.full_names and highest.selection.direction == "highest"


def test_a_probe_in_bfloat16_runs(tiny_qwen2, tmp_path):
    config = probe_config(tiny_qwen2, tmp_path)
    config.model.dtype = "bfloat16"
    assert load_allocation(run_probe(config)).probe.dtype == "bfloat16"


def test_an_existing_artifact_is_refused_before_anything_is_loaded(uninterrupted, tmp_path):
    config = probe_config(tmp_path / "no-model", tmp_path)
    with pytest.raises(AllocationError, match="holds an allocation already"):
        run_probe(replace(config, output_dir=str(uninterrupted)))


def test_lines_state_step_loss_and_remaining_time(capsys):
    progress = LineProgress(interval=0.0)
    progress.stage("warm-up", 3, 1)
    progress.advance(2, 1.5)
    progress.advance(3, 1.25)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("warm-up 2/3  loss 1.5000") and lines[1].endswith("ETA 0:00")
    assert clock(3725) == "1:02:05" and clock(65) == "1:05"


def test_a_checkpoint_that_changes_under_the_probe_is_refused_and_the_state_is_kept(tiny_qwen2, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2, model)

    class Overwrite(Progress):
        def advance(self, done, loss):
            weights = model / "model.safetensors"
            weights.write_bytes(weights.read_bytes())

    with pytest.raises(ProbeError, match="model.path: .*model.safetensors changed while it was probed"):
        run_probe(probe_config(model, tmp_path), Overwrite())
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()


def test_a_run_does_not_continue_on_other_weights_of_the_same_shape(tiny_qwen2, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2, model)
    with pytest.raises(ProbeInterrupted):
        run_probe(probe_config(model, tmp_path), InterruptAt(2))
    make_tiny_qwen2(model, seed=1)
    with pytest.raises(ProbeError, match="model.weights: .*begun with"):
        run_probe(probe_config(model, tmp_path))


def test_one_run_fills_all_measurements_of_its_kind(uninterrupted):
    measured = load_file(uninterrupted / "sensitivities.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in measured.items()} == {
        "sensitivities": (4, 14),
        "lora_output": (4, 14),
        "gradient_norm": (4, 14),
        "snip": (4, 14),
        "alpha": (14,),
        "delta_norm": (14,),
    }


def test_several_partitions_share_a_validation_batch(tiny_qwen2, tmp_path):
    run_probe(probe_config(tiny_qwen2, tmp_path, partitions_per_batch=2))
    measured = load_file(tmp_path / "out" / "sensitivities.safetensors")
    assert len(measured["sensitivities"]) == 4 and len(measured["gradient_norm"]) == 2
    assert not torch.equal(measured["sensitivities"][0], measured["sensitivities"][1])


@pytest.mark.parametrize(
    "criterion, names",
    [
        ("perturbation", {"perturbation", "sensitivities"}),
        ("adalora", {"adalora_rank", "adalora_importance"}),
        ("autolora", {"autolora_alpha"}),
        ("full_pruning", {"full_sensitivities"}),
        ("lookahead", {"lookahead", "sensitivities", "gradient_norm"}),
        ("residual_gradient", {"residual_signal", "gradient_signal", "gradient_energy", "sign_agreement"}),
    ],
)
def test_every_run_is_resumable_to_the_byte_and_fills_its_measurements(tiny_qwen2, tmp_path, criterion, names):
    def config(name):
        made = probe_config(tiny_qwen2, tmp_path, name, warmup_steps=10, full_lr=1e-3)
        made.probe.lookahead.lr = 1e-4
        made.probe.adalora = AdaLoraConfig(lr=5e-3, initial_rank=4, target_rank=2, interval=1)
        return replace(made, criterion=criterion)

    straight = run_probe(config("straight"))
    for stop in (4, 3):
        with pytest.raises(ProbeInterrupted):
            run_probe(config("parts"), InterruptAt(stop))
    assert contents(run_probe(config("parts"))) == contents(straight)
    assert set(load_file(straight / "sensitivities.safetensors")) >= names
    assert load_allocation(straight).selection.criterion == criterion


@pytest.mark.parametrize("criterion", WITHOUT_WARMUP)
def test_a_criterion_of_the_model_as_it_is_has_no_warm_up_and_reads_no_rows_for_one(tiny_qwen2, tmp_path, criterion):
    config = replace(probe_config(tiny_qwen2, tmp_path, rows=16, warmup_steps=500), criterion=criterion)
    with pytest.raises(ProbeInterrupted):
        run_probe(config, InterruptAt(3))
    allocation = load_allocation(run_probe(config))
    assert (allocation.probe.warmup_steps, allocation.probe.data["warmup_rows"]) == (0, 0)
    assert allocation.stability is not None and allocation.full_names
    again = replace(config, output_dir=str(tmp_path / "straight"))
    assert contents(run_probe(again)) == contents(tmp_path / "out")


@pytest.mark.parametrize("criterion", ["random", "lora_ffn", "spread"])
def test_a_criterion_without_a_probe_loads_no_weights_and_no_data(tiny_qwen2, tmp_path, criterion):
    model = tmp_path / "only-config"
    model.mkdir()
    shutil.copyfile(tiny_qwen2 / "config.json", model / "config.json")
    config = probe_config(model, tmp_path)
    config.probe.files = []
    allocation = load_allocation(run_probe(replace(config, criterion=criterion)))
    assert allocation.full_names and not (tmp_path / "out" / "sensitivities.safetensors").exists()
    assert (tmp_path / "out" / "report.md").exists()


def test_a_rank_whose_adapters_are_no_smaller_than_the_weights_is_refused(tiny_qwen2, tmp_path):
    config = probe_config(tiny_qwen2, tmp_path)
    config.lora.rank = 12
    with pytest.raises(ProbeError, match=r"lora.rank: 12 makes the adapter of .*k_proj \(32 × 16\).*give 10 or less"):
        run_probe(config)


def test_a_budget_below_the_smallest_module_is_refused_before_the_warm_up(tiny_qwen2, tmp_path):
    config, progress = probe_config(tiny_qwen2, tmp_path), InterruptAt(0)
    config.budget = BudgetConfig(ratio=1e-4)
    with pytest.raises(AllocationError, match="budget.ratio: 0.0001"):
        run_probe(config, progress)
    assert not progress.losses


def test_the_policy_objective_is_refused_outside_a_verl_run(tiny_qwen2, tmp_path):
    with pytest.raises(ProbeError, match="probe.objective: 'policy' needs rollouts"):
        run_probe(probe_config(tiny_qwen2, tmp_path, objective="policy"))
