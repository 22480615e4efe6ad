"""What the demo's model can learn: how its base and rows are made, and the settings of its probe and its verl run.

``carry`` is quick, and nearly all of it is learnt by LoRA alone. On ``last_digits`` LoRA lagged full fine-tuning in ten
seeds of plain torch (docs/evidence/last-digits-gspo); three under verl (last-digits-rl) do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.demo import base_model, noisy_adder, task


@dataclass(frozen=True)
class Files:
    """What a lesson starts from: folder of the base model, rows of verl by split, rows of the probe."""

    model: Path
    rows: Mapping[str, Path]
    probe_rows: Path


@dataclass(frozen=True)
class Lesson:
    """One of the demo's tasks.

    Attributes:
        name: of the lesson.
        model: the base model, for the first sentence of the page.
        prepare: makes its files in a cache folder, or finds them there.
        steps: of the verl run.
        least_gain: of the greedy validation accuracy in so many steps.
        rank: of the adapters.
        full_lr, lora_lr: rates of the fully tuned modules and of the adapters.
        matched_lr: of LoRA alone with as many trainable parameters.
        settings: more overrides of the verl run, beside ``+recipe=demo``.
        selection: options of the probe's command that choose modules.
        probes: options ``probe.*`` by objective; a policy probe takes a verl step for each of its steps.
    """

    name: str
    model: str
    prepare: Callable[[Path], Files]
    steps: int
    least_gain: float
    rank: int
    full_lr: float
    lora_lr: float
    matched_lr: float
    settings: tuple[str, ...] = ()
    selection: tuple[str, ...] = ()
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def run_overrides(lesson: Lesson, files: Files, steps: int, ranks: int) -> list[str]:
    """Overrides that every verl run of a lesson has, hybrid or not."""
    return [
        "+recipe=demo",
        *lesson.settings,
        f"actor_rollout_ref.model.path={files.model}",
        f"data.train_files={files.rows['train']}",
        f"data.val_files={files.rows['validation']}",
        f"trainer.n_gpus_per_node={ranks}",
        f"trainer.total_training_steps={steps}",
    ]


def hybrid_overrides(lesson: Lesson) -> list[str]:
    """Those that switch the hybrid on, with the lesson's rates."""
    return [
        "+hybrid_lora=enabled",
        f"hybrid_lora.full_lr={lesson.full_lr}",
        f"hybrid_lora.lora.lr={lesson.lora_lr}",
        f"hybrid_lora.lora.rank={lesson.rank}",
        f"hybrid_lora.lora.alpha={2 * lesson.rank}",
    ]


def _carry(cache: Path) -> Files:
    model, data = cache / "demo-base-model", cache / "demo-data"
    base_model.build(model)
    return Files(model, task.write_rl_parquet(data), task.write_sft_jsonl(data / "sft.jsonl"))


def _last_digits(cache: Path) -> Files:
    folder = noisy_adder.write(cache / "demo-last-digits", "last_digits")
    rows = {split: folder / f"{split}.parquet" for split in task.SPLITS}
    return Files(folder / "model", rows, folder / "probe.jsonl")


LESSONS = {
    lesson.name: lesson
    for lesson in (
        Lesson(
            name="carry",
            model="A small Qwen2 model that forgets the carry in most additions",
            prepare=_carry,
            steps=24,
            least_gain=0.10,
            rank=16,
            full_lr=1e-4,
            lora_lr=6e-4,
            matched_lr=6e-4,
            probes={
                "sft": {"warmup_steps": 100, "batch_size": 32, "max_length": 32, "lr": 1e-3},
                "policy": {"objective": "policy", "warmup_steps": 8, "partitions": 6, "lr": 6e-4},
            },
        ),
        Lesson(
            name="last_digits",
            model="A small Qwen2 model that can add, and has to give the last digit of each number instead",
            prepare=_last_digits,
            steps=90,
            # Of ten runs in plain torch the least gained 0.08, and half of them 0.35 and more.
            least_gain=0.05,
            rank=1,
            full_lr=4e-3,
            lora_lr=5e-3,
            matched_lr=2e-3,
            # The hybrid that did best in docs/evidence/last-digits-gspo, though not for certain better than chance.
            selection=("direction=highest",),
            settings=(
                "data.train_batch_size=16",
                "actor_rollout_ref.actor.ppo_mini_batch_size=8",
                # 64 answers a mini batch and 128 a step: whole micro batches on one rank and on two.
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64",
                "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=64",
                # The base is wrong everywhere, so the pull to it is weak.
                "actor_rollout_ref.actor.kl_loss_coef=0.001",
                "reward.custom_reward_function.path=recipes/demo/digits_reward.py",
                "trainer.test_freq=15",
            ),
            probes={
                "sft": {"warmup_steps": 100, "batch_size": 32, "max_length": 32, "lr": 3e-3},
                "policy": {"objective": "policy", "warmup_steps": 8, "partitions": 6, "lr": 5e-3},
            },
        ),
    )
}
