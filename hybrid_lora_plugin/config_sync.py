"""The options of the weight sync: how trained weights reach the rollout engine, rounded how, proven how."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_lora_plugin.config_field import Bound, above, documented

ROUNDINGS = ("stochastic", "nearest")
SYNC_MODES = ("merge", "sparse_merge", "adapter", "receiver_merge")


@dataclass
class SyncConfig:
    """How the weights of a verl run reach its rollout engine; a part of the ``hybrid_lora`` node."""

    sync: str = documented(
        "merge",
        "How trained weights reach the rollout engine: `merge` sends every weight, merged; `sparse_merge` the "
        "same at first, and then the elements that changed; `adapter` sends the full modules and LoRA factors for the "
        "engine's own adapter; `receiver_merge` sends full modules and fp32 factors, which the engine merges into its "
        "checkpoint's weights.",
        source="own choice: merge needs nothing of the engine",
        choices=SYNC_MODES,
    )
    sync_rounding: str = documented(
        "stochastic",
        "How merged and fully tuned weights become rollout weights of 16 bits: `stochastic` by a random threshold of "
        "each weight, fixed for the run, so that the update arrives in the mean; `nearest` loses most of it while "
        "updates are smaller than a unit in the last place.",
        source="own measurement: docs/weight-sync.md",
        choices=ROUNDINGS,
    )
    sync_seed: int = documented(
        0,
        "Seed of the random thresholds; with rollouts in 16 bits a run does not resume with another one.",
        source="own choice",
    )
    sync_check: str = documented(
        "digest",
        "Proof of every sync: `digest` compares a digest of each tensor at both ends and reads the engine's model "
        "back; `logprobs` also compares log-probabilities of fixed prompts, and how far trainer and engine have moved "
        "from the base model; `off` looks at names, shapes, dtypes and step, that nothing is missing and that the "
        "engine has not lost what is not sent, and at no other value.",
        source="own choice",
        choices=("digest", "logprobs", "off"),
    )
    sync_logprob_limit: float | None = documented(
        None,
        "Largest difference of a log-probability that `sync_check=logprobs` accepts; null is 1e-4 for float32, 1 "
        "for bfloat16 and 0.2 for float16, of trainer and rollout the larger one.",
        source="own choice; float32 and bfloat16 measured",
        unit="nats",
        bound=above(0, "a difference above 0, e.g. 1e-4, or null"),
    )
    sync_policy_limit: float = documented(
        0.25,
        "Largest part of the trainer's way from the base model by which `sync_check=logprobs` lets the engine's "
        "policy stand apart, as a slope other than 1 or as a KL ratio, beyond four standard errors.",
        source="own measurement: docs/weight-sync.md",
        bound=Bound(lambda value: 0 < value < 1, "a fraction between 0 and 1, e.g. 0.25"),
    )
    sync_texts: list[str] = documented(
        [],
        "Texts of your task for `sync_check=logprobs`, in place of its own eight; at most 256 tokens of each are read. "
        "What is trained moves most, so the policy can be judged earlier.",
        source="own choice",
    )
    sync_base: str = documented(
        "memory_map",
        "Where `receiver_merge` reads the original weights: the checkpoint's file, or a copy in page-locked memory of "
        "each rollout worker.",
        source="own choice",
        choices=("memory_map", "pinned"),
    )
    sync_timeout: float = documented(
        240.0,
        "Longest wait of either side for the other in a sync; then the run ends. Other ranks wait up to 1.5 times this "
        "and 40 s, with `sync_check=logprobs` twice this, which must be below `actor_rollout_ref.nccl_timeout`.",
        source="own choice: every wait ends before verl's nccl_timeout of 600 s",
        unit="s",
        bound=above(0, "a number of seconds above 0, e.g. 240"),
    )
    first_sync_timeout: float = documented(
        1800.0,
        "The same at both ends of the first sync, where trainer and engine look at every weight that no sync sends; "
        "read where it is longer than `sync_timeout`.",
        source="own choice: no collective of the trainer stands behind it",
        unit="s",
        bound=above(0, "a number of seconds above 0, e.g. 1800"),
    )
