"""A whole probe: reproducible to the byte, resumable, and careful with what is already there."""

import signal
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from tiny_models import sums, write_jsonl
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin.allocation import AllocationError, load_allocation
from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import AdapterConfig, BudgetConfig, ModelConfig, ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.probing import runner
from hybrid_lora_plugin.probing.errors import ProbeError
from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted
from hybrid_lora_plugin.probing.progress import LineProgress, Progress, clock
from hybrid_lora_plugin.probing.runner import run_probe


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
    monkeypatch.setattr(runner, "SAVE_EVERY_SECONDS", 0.0)
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
    assert ranked[-1].name in highest.full_names and highest.criterion.direction == "highest"


def test_a_probe_in_bfloat16_runs(tiny_qwen2, tmp_path):
    config = probe_config(tiny_qwen2, tmp_path)
    config.model.dtype = "bfloat16"
    assert load_allocation(run_probe(config)).criterion.dtype == "bfloat16"


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


def test_several_processes_are_refused_instead_of_probing_the_same_thing_each(tiny_qwen2, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ProbeError, match="WORLD_SIZE: 4 processes"):
        run_probe(probe_config(tiny_qwen2, tmp_path))
    assert not (tmp_path / "out").exists()
