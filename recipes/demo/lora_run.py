"""LoRA alone beside the demo's hybrid: of the same trainable size, from the same base, on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hybrid_lora_plugin.allocation import Allocation
from hybrid_lora_plugin.candidates import find_candidates, meta_model
from hybrid_lora_plugin.config import ModelConfig
from hybrid_lora_plugin.evidence.matching import MatchedRank, matched_rank
from hybrid_lora_plugin.probing.loading import load_model_config
from recipes.demo.lessons import Lesson
from recipes.demo.verl_run import Step, run_verl


@dataclass(frozen=True)
class LoraRun:
    """What LoRA alone came to.

    Attributes:
        matched: its rank and its trainable parameters, beside those of the hybrid.
        lr: its rate.
        steps: of its verl run, the validation before it as step 0.
    """

    matched: MatchedRank
    lr: float
    steps: list[Step]


def rank_of_size(model: Path, allocation: Allocation) -> MatchedRank:
    """The largest rank of LoRA alone whose parameters do not pass those that an allocation trains."""
    candidates = find_candidates(meta_model(load_model_config(ModelConfig(path=str(model))), False))
    return matched_rank(candidates, [allocation.parameter_counts().trainable])


def lora_overrides(lesson: Lesson, matched: MatchedRank) -> list[str]:
    """verl's own LoRA, without the plugin's engine, at the lesson's rate for it."""
    return [
        f"actor_rollout_ref.actor.optim.lr={lesson.matched_lr}",
        f"actor_rollout_ref.model.lora_rank={matched.rank}",
        f"actor_rollout_ref.model.lora_alpha={2 * matched.rank}",
        "actor_rollout_ref.model.target_modules=all-linear",
        "actor_rollout_ref.model.lora.merge=true",
        "actor_rollout_ref.rollout.load_format=safetensors",
    ]


def train(
    lesson: Lesson,
    matched: MatchedRank,
    steps: int,
    settings: list[str],
    folder: Path,
    say: Callable[[str], None],
    describe: Callable[[Step], str],
) -> LoraRun:
    """The verl run.

    Args:
        lesson: what is learnt.
        matched: rank.
        steps: as many as the hybrid's.
        settings: overrides that both runs have.
        folder: for ``metrics.jsonl``, ``verl.log`` and Hydra's files; made here.
        say, describe: as those of ``run_verl``.

    Raises:
        RunFailed: the process ended with an error.
    """
    folder.mkdir(parents=True)
    results = run_verl(
        [
            *settings,
            *lora_overrides(lesson, matched),
            f"trainer.default_local_dir={folder / 'checkpoints'}",
            f"hydra.run.dir={folder / 'hydra'}",
        ],
        metrics=folder / "metrics.jsonl",
        log=folder / "verl.log",
        steps=steps,
        say=say,
        describe=describe,
    )
    return LoraRun(matched, lesson.matched_lr, results)
