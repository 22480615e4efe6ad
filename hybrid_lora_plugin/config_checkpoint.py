"""The options of a run's checkpoints: what they hold, and which of them is kept as the best."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_lora_plugin.config_field import documented

SAVES = ("full", "trainable")


@dataclass
class BestCheckpointConfig:
    """The checkpoint that did best in validation."""

    keep: bool = documented(
        True,
        "Whether the best checkpoint is remembered in `best_checkpoint.json` beside the checkpoints and never deleted "
        "for `max_actor_ckpt_to_keep` (in SFT `max_ckpt_to_keep`). A step can be the best that is both validated, by "
        "`trainer.test_freq`, and saved, by `trainer.save_freq`.",
        source="paper §4.3: evaluated every 10 steps, the best checkpoint reported",
    )
    metric: str | None = documented(
        None,
        "Metric of the validation that decides, as it is logged; null is the mean of `val-core/*/mean@*`, in SFT "
        "`val/loss`.",
        source="own choice: what verl itself calls the core of a validation",
    )
    larger_is_better: bool | None = documented(
        None,
        "Whether a larger value is better; null is false for a metric with loss, perplexity, ppl or error in its name, "
        "else true.",
        source="own choice",
    )


@dataclass
class CheckpointConfig:
    """What a verl run saves; a part of the ``hybrid_lora`` node."""

    save: str = documented(
        "full",
        "What a checkpoint holds: `full` has verl's shards with all weights; `trainable` only what trains, in whole "
        "tensors of float32 with their optimizer state, and resumes on the base model with any number of ranks "
        "(FSDP2).",
        source="own choice: verl's own files by default",
        choices=SAVES,
    )
    export_at_save: bool = documented(
        False,
        "Whether each checkpoint also gets the merged model in `huggingface`, as `hf_model` in verl's `save_contents` "
        "does.",
        source="own choice",
    )
    best: BestCheckpointConfig = documented(BestCheckpointConfig, "The best checkpoint.", source="paper §4.3")
