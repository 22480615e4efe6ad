"""The configuration of Hybrid-LoRA: one set of dataclasses for Hydra, the command line and the docs.

``HybridLoraConfig`` is the ``hybrid_lora`` node of a verl run; ``ProbeCommandConfig`` is what
``hybrid-lora-probe`` takes: the same keys without the prefix, plus the model and the output folder.
The Hydra group ``hybrid_lora/enabled.yaml``, the ``--help`` texts and ``docs/configuration.md`` are
generated from or checked against this file, so a field is documented here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


class ConfigurationError(ValueError):
    """A value the user gave cannot be used.

    The message is one line that names the field, the value found, the value wanted and the way out;
    command lines print it without a traceback and exit with status 2.
    """


def documented(default: Any, help: str, *, source: str, unit: str | None = None, choices: tuple | None = None):
    """A dataclass field that carries its own documentation.

    Args:
        default: the default; a list or a dataclass type is turned into a ``default_factory``.
        help: what the field does, one sentence.
        source: where the default comes from (paper section, verl default, own measurement).
        unit: unit of a number.
        choices: legal values, when they are a fixed set.
    """
    metadata = {"help": help, "source": source, "unit": unit, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class BudgetConfig:
    """How much of the candidate modules may be fully fine-tuned (Eq. 4)."""

    mode: str = documented("parameters", "What the ratio is a share of.", source="paper Eq. 4", choices=("parameters",))
    ratio: float = documented(
        0.10,
        "Share of the candidate parameters (weights and biases) that full fine-tuning may use.",
        source="paper §4.3",
        unit="fraction in (0, 1]",
    )
    overflow: str = documented(
        "stop",
        "At the first module that no longer fits: stop, as the paper's greedy rule does.",
        source="paper §3.4",
        choices=("stop",),
    )


@dataclass
class ProbeConfig:
    """The probing run: warm-up of SVD-style LoRA on every candidate, then K masked scoring batches."""

    objective: str = documented(
        "sft",
        "Validation loss whose gradient is scored: negative log-likelihood of the response tokens.",
        source="docs/differences.md (the paper leaves it open)",
        choices=("sft",),
    )
    files: list[str] = documented(
        [],
        "Training rows as JSONL or Parquet, each with `messages`, or with `prompt` and `response`.",
        source="none: must be given",
    )
    warmup_steps: int = documented(500, "Optimizer steps before scoring.", source="paper §4.3", unit="steps")
    partitions: int = documented(
        20, "Random two-bucket partitions K; one validation batch each, so T = K.", source="paper §4.3", unit="batches"
    )
    batch_size: int = documented(8, "Rows per warm-up step and per validation batch.", source="own choice", unit="rows")
    max_length: int = documented(
        2048, "Longest row; the end of a longer one is cut.", source="own choice", unit="tokens"
    )
    lr: float = documented(
        2.5e-5, "Warm-up learning rate (AdamW, constant).", source="paper §4.3 (LoRA)", unit="per step"
    )
    init: str = documented(
        "default",
        "Initial values: `default` is A kaiming, B = 0, e = 1.",
        source="own choice: Eq. 7 leaves it open",
        choices=("default",),
    )
    seed: int = documented(
        0, "Seed of the adapters, the data order, the split and the partitions.", source="own choice"
    )


@dataclass
class AdapterConfig:
    """The LoRA adapters of the modules that are not fully fine-tuned, and of the probe."""

    rank: int = documented(16, "LoRA rank r.", source="paper §4.3")
    alpha: int = documented(
        32, "LoRA alpha; the adapter is scaled by alpha / rank.", source="2r, the paper does not say"
    )
    dropout: float = documented(0.0, "Dropout on the adapter input while training.", source="verl default")


@dataclass
class HybridLoraConfig:
    """The ``hybrid_lora`` node of a verl configuration."""

    enabled: bool = documented(True, "Whether this run trains under an allocation.", source="plugin")
    allocation: str | None = documented(
        None,
        "Folder or allocation.json written by `hybrid-lora-probe`, on a path that every worker can read.",
        source="none: must be given",
    )
    criterion: str = documented(
        "hybrid", "Criterion that scores the modules.", source="paper Eq. 14", choices=("hybrid",)
    )
    direction: str = documented(
        "auto",
        "Which end of the score goes to full fine-tuning; auto is the criterion's own.",
        source="paper Algorithm 2: lowest",
        choices=("auto", "lowest", "highest"),
    )
    normalise: str = documented(
        "none", "Normalisation of the score over module shapes; none is the paper.", source="paper", choices=("none",)
    )
    budget: BudgetConfig = documented(BudgetConfig, "Full fine-tuning budget.", source="paper Eq. 4")
    probe: ProbeConfig = documented(ProbeConfig, "Probing run.", source="paper Algorithm 1")
    full_lr: float = documented(
        1.0e-6,
        "Learning rate of the fully fine-tuned modules; that of LoRA is actor_rollout_ref.actor.optim.lr.",
        source="paper §4.3",
        unit="per step",
    )
    lora: AdapterConfig = documented(AdapterConfig, "LoRA adapters.", source="paper §4.3")
    sync: str = documented(
        "merge",
        "How trained weights reach the rollout engine: merged in fp32 from the untouched base, rounded once.",
        source="own choice: the rollout engine then runs no adapter",
        choices=("merge",),
    )


@dataclass
class ModelConfig:
    """The model to probe."""

    path: str | None = documented(
        None, "Hugging Face folder or name of the model to probe.", source="none: must be given"
    )
    dtype: str = documented(
        "auto",
        "Precision of the frozen base while probing; auto is bfloat16 on an accelerator, float32 on a CPU.",
        source="own choice",
        choices=("auto", "float32", "bfloat16"),
    )
    gguf_file: str | None = documented(
        None, "Name of a GGUF file inside `model.path` to load instead of safetensors.", source="transformers"
    )
    trust_remote_code: bool = documented(False, "Run model code from the checkpoint.", source="transformers")


@dataclass
class ProbeCommandConfig:
    """What ``hybrid-lora-probe`` takes on the command line as ``key=value``."""

    model: ModelConfig = documented(ModelConfig, "The model.", source="plugin")
    output_dir: str | None = documented(
        None, "Folder for the artifact; must not hold another one.", source="none: must be given"
    )
    criterion: str = documented("hybrid", "As hybrid_lora.criterion.", source="paper Eq. 14", choices=("hybrid",))
    direction: str = documented(
        "auto", "As hybrid_lora.direction.", source="paper Algorithm 2", choices=("auto", "lowest", "highest")
    )
    normalise: str = documented("none", "As hybrid_lora.normalise.", source="paper", choices=("none",))
    budget: BudgetConfig = documented(BudgetConfig, "Full fine-tuning budget.", source="paper Eq. 4")
    probe: ProbeConfig = documented(ProbeConfig, "Probing run.", source="paper Algorithm 1")
    lora: AdapterConfig = documented(
        AdapterConfig, "Adapters of the probe (rank only; Eq. 7 has its own scale).", source="paper §4.3"
    )


@dataclass
class ExportCommandConfig:
    """What ``hybrid-lora-export`` takes on the command line as ``key=value``."""

    checkpoint: str | None = documented(
        None, "A global_step_N folder saved by a run with +hybrid_lora=enabled.", source="none: must be given"
    )
    output_dir: str | None = documented(None, "New folder for the Hugging Face model.", source="none: must be given")
    base: str | None = documented(
        None, "Base model, if it is no longer where the run found it.", source="recorded in the checkpoint"
    )
    trust_remote_code: bool = documented(False, "Run model code from the base checkpoint.", source="transformers")


def _check(config: Any, prefix: str) -> None:
    for spec in dataclasses.fields(config):
        value, name = getattr(config, spec.name), f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(value):
            _check(value, name + ".")
            continue
        choices = spec.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigurationError(f"{name}: {value!r} is not supported; choose one of {', '.join(choices)}")


def validate(config: HybridLoraConfig | ProbeCommandConfig, prefix: str = "") -> None:
    """Refuse values that cannot work, before anything is loaded or written.

    Args:
        config: the configuration to check.
        prefix: put before each field name in messages, e.g. ``"hybrid_lora."``.

    Raises:
        ConfigurationError: naming the field, the value and the way out.
    """
    _check(config, prefix)

    def require(ok: bool, name: str, value: Any, wanted: str) -> None:
        if not ok:
            raise ConfigurationError(f"{prefix}{name}: {value!r} is not usable; give {wanted}")

    require(0 < config.budget.ratio <= 1, "budget.ratio", config.budget.ratio, "a fraction in (0, 1], e.g. 0.1")
    require(config.lora.rank > 0, "lora.rank", config.lora.rank, "a LoRA rank of at least 1, e.g. 16")
    require(config.lora.alpha > 0, "lora.alpha", config.lora.alpha, "a LoRA alpha above 0, e.g. 32")
    require(0 <= config.lora.dropout < 1, "lora.dropout", config.lora.dropout, "a dropout in [0, 1), e.g. 0.0")
    require(config.probe.warmup_steps >= 0, "probe.warmup_steps", config.probe.warmup_steps, "0 or more steps")
    require(
        config.probe.partitions >= 2,
        "probe.partitions",
        config.probe.partitions,
        "at least 2, or no spread can be measured",
    )
    require(config.probe.batch_size >= 1, "probe.batch_size", config.probe.batch_size, "at least 1 row")
    require(config.probe.max_length >= 2, "probe.max_length", config.probe.max_length, "at least 2 tokens")
    require(config.probe.lr > 0, "probe.lr", config.probe.lr, "a learning rate above 0, e.g. 2.5e-5")
    if isinstance(config, HybridLoraConfig):
        require(config.full_lr > 0, "full_lr", config.full_lr, "a learning rate above 0, e.g. 1e-6")
