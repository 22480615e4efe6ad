"""The verl runs of the check and the command line of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LORA_RANK, LORA_ALPHA = 16, 32


@dataclass(frozen=True)
class Run:
    """One verl run.

    Attributes:
        name: of its stage and its folder.
        title: of its rows on the page.
        sync: ``hybrid_lora.sync``; None is verl's own LoRA, without Hybrid-LoRA.
        saves: whether it is the demo's line, with a checkpoint and a validation after the last step.
        bypass: whether the rollout's log-probabilities are the old ones, which makes the reference pass the first one
            and leaves verl nothing to compare them with.
    """

    name: str
    title: str
    sync: str | None
    saves: bool = False
    bypass: bool = False

    def steps_of(self, steps: int) -> int:
        """Training steps of this run, where the demo's line takes ``steps``."""
        return steps if self.saves else 2 if self.bypass else max(2, steps * 2 // 3)


#: in the order in which they run; what is behind is skipped first
RUNS = {
    run.name: run
    for run in (
        Run("merge", "`merge`", "merge", saves=True),
        Run("sparse_merge", "`sparse_merge`", "sparse_merge"),
        Run("adapter", "`adapter`", "adapter"),
        Run("receiver_merge", "`receiver_merge`", "receiver_merge"),
        Run("verl_lora", "verl's LoRA, `merge=true`", None),
        Run("bypass", "`merge`, reference pass first", "merge", bypass=True),
    )
}


@dataclass(frozen=True)
class Files:
    """Where one check keeps what it makes.

    Attributes:
        folder: of the check: logs, metrics, page.
        weights: model, checkpoints and export; removed at the end.
    """

    folder: Path
    weights: Path

    @property
    def model(self) -> Path:
        return self.weights / "model"

    @property
    def data(self) -> Path:
        return self.weights / "data"

    @property
    def rows(self) -> Path:
        return self.data / "sft.jsonl"

    @property
    def allocation(self) -> Path:
        return self.folder / "allocation"

    @property
    def exported(self) -> Path:
        return self.weights / "exported"

    def checkpoint(self, step: int) -> Path:
        return self.weights / "checkpoints" / f"global_step_{step}"

    def log(self, stage: str) -> Path:
        return self.folder / f"{stage}.log"

    def metrics(self, run: str) -> Path:
        return self.folder / f"{run}.jsonl"

    def validation(self, step: int) -> Path:
        return self.folder / "validation" / f"{step}.jsonl"


def overrides_of(run: Run, files: Files, steps: int, device: str, flash_attention: bool) -> list[str]:
    """``main_ppo``'s overrides of a run, complete.

    Args:
        run: one of ``RUNS``.
        files: of the check.
        steps: training steps of this run.
        device: ``cuda`` or ``cpu``.
        flash_attention: whether flash-attn is installed; ignored on a CPU.
    """
    overrides = [
        # Of the recipes the first sets no learning rates, so those of the group stay: the paper's.
        *(["+hybrid_lora=enabled"] if run.sync else []),
        "+recipe=gpu_check" if device == "cuda" else "+recipe=gpu_check_on_cpu",
        f"actor_rollout_ref.model.path={files.model}",
        f"data.train_files={files.data / 'train.parquet'}",
        f"data.val_files={files.data / 'validation.parquet'}",
        f"trainer.experiment_name={run.name}",
        f"trainer.total_training_steps={steps}",
        f"trainer.default_local_dir={files.weights / 'checkpoints'}",
        f"hydra.run.dir={files.folder / 'hydra' / run.name}",
    ]
    if run.sync:
        overrides += [
            f"hybrid_lora.allocation={files.allocation}",
            f"hybrid_lora.sync={run.sync}",
            f"hybrid_lora.lora.rank={LORA_RANK}",
            f"hybrid_lora.lora.alpha={LORA_ALPHA}",
        ]
    else:
        overrides += [
            f"actor_rollout_ref.model.lora_rank={LORA_RANK}",
            f"actor_rollout_ref.model.lora_alpha={LORA_ALPHA}",
            "actor_rollout_ref.model.target_modules=all-linear",
            "++actor_rollout_ref.model.lora.merge=true",
            # What +hybrid_lora=enabled sets for the others.
            "actor_rollout_ref.actor.strategy=fsdp2",
            "actor_rollout_ref.actor.optim.lr=2.5e-5",
            "actor_rollout_ref.rollout.load_format=safetensors",
        ]
    if run.saves:
        overrides += [
            f"trainer.save_freq={steps}",
            f"trainer.test_freq={steps}",
            f"trainer.validation_data_dir={files.folder / 'validation'}",
        ]
    if run.bypass:
        overrides += ["algorithm.rollout_correction.bypass_mode=true"]
    if device == "cuda" and not flash_attention:
        overrides += [
            "actor_rollout_ref.model.use_remove_padding=false",
            "++actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        ]
    return overrides
