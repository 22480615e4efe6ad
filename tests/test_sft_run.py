"""verl's SFT trainer from its command line with ``+hybrid_lora=enabled``: probe, train, save, resume, export."""

from __future__ import annotations

import json
import shutil

import pandas
import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hybrid_lora_plugin import load_allocation  # noqa: E402
from hybrid_lora_plugin.cli.export import main as export_command  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2, sums, write_jsonl  # noqa: E402
from tests.support.verl_processes import ranks, torchrun  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.ranks]

STEPS, SAVED, BATCH, RANKS = 3, 2, 8, 2
FULL_LR, LORA_LR, RANK, ALPHA = 1e-4, 2.5e-3, 4, 8


class Trainer:
    """``verl.trainer.sft_trainer`` with small settings; each start has its own log of metrics."""

    def __init__(self, folder):
        self.folder = folder
        self.model = make_tiny_qwen2(folder / "model", tie_word_embeddings=False)
        AutoModelForCausalLM.from_pretrained(self.model).bfloat16().save_pretrained(self.model)
        pandas.DataFrame(sums(STEPS * BATCH)).to_parquet(folder / "rows.parquet")
        self.probe_rows = write_jsonl(folder / "rows.jsonl", sums(STEPS * BATCH))

    def start(self, name, *arguments, count=RANKS, launch=ranks):
        """Train; returns what was printed and the metrics of each step."""
        log = self.folder / f"{name}.jsonl"
        done = launch(
            count,
            [
                "-m", "verl.trainer.sft_trainer", f"model.path={self.model}",
                f"data.train_files={self.folder / 'rows.parquet'}",
                f"data.train_batch_size={BATCH}", "data.micro_batch_size_per_gpu=4", "data.use_dynamic_bsz=false",
                "data.num_workers=0", "data.max_length=64", "model.use_remove_padding=false",
                "+model.override_config.attn_implementation=sdpa", "engine.use_torch_compile=false",
                f"optim.lr={FULL_LR}", "optim.weight_decay=0", "trainer.total_epochs=1", "trainer.device=cpu",
                "trainer.logger=[console,file]", f"hydra.run.dir={self.folder / 'hydra'}", *arguments,
            ],
            VERL_FILE_LOGGER_PATH=str(log),
        )  # fmt: skip
        return done.stdout, [json.loads(line)["data"] for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("sft"))


HYBRID = ["+hybrid_lora=enabled", f"hybrid_lora.lora.rank={RANK}", f"hybrid_lora.lora.alpha={ALPHA}"]


@pytest.fixture(scope="module")
def run(trainer):
    """Probes for itself, trains three steps, and saves the second and the last."""
    folder = trainer.folder / "checkpoints"
    probe = {"files": f"[{trainer.probe_rows}]", "warmup_steps": 2, "partitions": 3, "batch_size": 4, "max_length": 64}
    text, steps = trainer.start(
        "hybrid",
        *HYBRID,
        *(f"hybrid_lora.probe.{name}={value}" for name, value in probe.items()),
        "hybrid_lora.budget.ratio=0.3",
        f"trainer.save_freq={SAVED}",
        f"trainer.default_local_dir={folder}",
        f"data.val_files={trainer.folder / 'rows.parquet'}",
        "trainer.test_freq=1",
        # The loss falls, so turned round it is the older one that must outlive a limit of one.
        "trainer.max_ckpt_to_keep=1",
        "hybrid_lora.best.larger_is_better=true",
        launch=torchrun,
    )
    losses = [step["val/loss"] for step in steps if "val/loss" in step]
    steps = [step for step in steps if "train/loss" in step]
    return {
        "text": text,
        "steps": steps,
        "losses": losses,
        "folder": folder,
        "allocation": load_allocation(folder / "allocation"),
    }


def trained(folder):
    return load_file(folder / "hybrid_lora" / "trainables.safetensors")


def test_rates_keep_their_meaning_and_are_said_once(run):
    said = [line for line in run["text"].splitlines() if line.startswith("hybrid_lora: learning rates")]
    assert said == [
        f"hybrid_lora: learning rates: full modules {FULL_LR:g} (optim.lr, command line), LoRA {LORA_LR:g} (the "
        "paper's 25 : 1 of LoRA to full)"
    ]
    assert "hybrid_lora: exported weights: bfloat16" in run["text"]
    assert "hybrid_lora: frozen weights in bfloat16" in run["text"]


def test_the_best_checkpoint_outlives_the_limit(run):
    pointer = json.loads((run["folder"] / "best_checkpoint.json").read_text())
    assert len(run["losses"]) == STEPS and pointer["validations"] == [[i, v] for i, v in enumerate(run["losses"], 1)]
    # The first step is validated and not saved.
    assert run["losses"][0] > run["losses"][1] > run["losses"][2]
    assert (pointer["step"], pointer["metric"], pointer["larger_is_better"]) == (SAVED, "val/loss", True)
    assert f"hybrid_lora: best checkpoint: global_step_{SAVED}, val/loss" in run["text"]
    left = {path.name for path in run["folder"].glob("global_step_*")}
    assert left == {f"global_step_{SAVED}", f"global_step_{STEPS}"}


def test_both_groups_move_at_their_own_rates(run, trainer):
    moved, base = trained(run["folder"] / f"global_step_{STEPS}"), load_file(trainer.model / "model.safetensors")
    full = [name for name in moved if ".lora_" not in name]
    assert {name.rpartition(".")[0] for name in full} == set(run["allocation"].full_names)
    # Adam's step is at most about its rate for a weight, and very nearly that where the gradient keeps its sign.
    largest = max((moved[name] - base[name].float()).abs().max().item() for name in full)
    assert 2 * FULL_LR < largest < 1.05 * STEPS * FULL_LR
    # B starts at 0.
    largest = max(moved[name].abs().max().item() for name in moved if ".lora_B." in name)
    assert 2 * LORA_LR < largest < 1.05 * STEPS * LORA_LR


def test_the_first_loss_is_that_of_a_plain_run(run, trainer):
    _, plain = trainer.start(
        "plain", "trainer.total_training_steps=1", f"trainer.default_local_dir={trainer.folder / 'plain'}", count=1
    )
    # Before any step the model is the base. Its weights are bfloat16 here, there cast to it from float32 in each pass.
    assert run["steps"][0]["train/loss"] == pytest.approx(plain[0]["train/loss"], rel=1e-4)


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(run, trainer):
    again = trainer.folder / "again"
    shutil.copytree(run["folder"] / f"global_step_{SAVED}", again / f"global_step_{SAVED}")
    (again / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    # No allocation and nothing to probe with: it is in the checkpoint, which has no folder for the actor.
    text, steps = trainer.start("again", *HYBRID, f"trainer.default_local_dir={again}")
    assert f"hybrid_lora: resuming under the allocation of the checkpoint, {again}" in text
    assert len(steps) == STEPS - SAVED and steps[0]["train/loss"] == run["steps"][-1]["train/loss"]
    before, after = (trained(folder / f"global_step_{STEPS}") for folder in (run["folder"], again))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_export_takes_the_trainers_checkpoint(run, trainer, capsys):
    checkpoint = run["folder"] / f"global_step_{STEPS}"
    out = {dtype: trainer.folder / f"exported-{dtype}" for dtype in ("auto", "float32")}
    for dtype, folder in out.items():
        assert export_command([f"checkpoint={checkpoint}", f"output_dir={folder}", f"dtype={dtype}"]) == 0
    said = capsys.readouterr().out
    assert "weights in bfloat16, rounded by the run's thresholds" in said
    assert f"tokenizer and chat template: the run's, from {checkpoint / 'huggingface'}" in said
    assert "| trainer | sft |" in (out["auto"] / "README.md").read_text()
    delta, again = trainer.folder / "delta", trainer.folder / "delta-applied"
    assert export_command([f"checkpoint={checkpoint}", f"output_dir={delta}", "format=delta"]) == 0
    assert export_command([f"delta={delta}", f"output_dir={again}"]) == 0
    capsys.readouterr()
    assert (again / "model.safetensors").read_bytes() == (out["auto"] / "model.safetensors").read_bytes()
    auto, whole = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in out.values())
    assert auto.dtype == torch.bfloat16 and whole.dtype == torch.float32
    moved, base = trained(checkpoint), load_file(trainer.model / "model.safetensors")
    merged = whole.state_dict()
    for name in run["allocation"].full_names:
        assert torch.equal(merged[f"{name}.weight"], moved[f"{name}.weight"])
    for name in run["allocation"].lora_names:
        update = ALPHA / RANK * moved[f"{name}.lora_B.weight"] @ moved[f"{name}.lora_A.weight"]
        assert torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"].float() + update, atol=1e-6)
    assert export_command([f"checkpoint={trainer.folder}", f"output_dir={trainer.folder / 'none'}"]) == 2
    assert "hybrid_lora/trainables.safetensors" in capsys.readouterr().err
