"""The configuration of Hybrid-LoRA: one set of dataclasses for Hydra, the command line and the docs.

``HybridLoraConfig`` is the ``hybrid_lora`` node of a verl run; ``ProbeCommandConfig`` is what
``hybrid-lora-probe`` takes: the same keys without the prefix, plus the model and the output folder.
The Hydra group ``hybrid_lora/enabled.yaml``, the ``--help`` texts and ``docs/configuration.md`` are
generated from or checked against these files, so a field is documented there and nowhere else:

    config.py             what a run and each command take
    config_selection.py   which modules are fully tuned: criterion, budget, controls
    config_probe.py       the probe
    config_trial.py       criterion `trial`
    config_sync.py        the weight sync of a run
    config_checkpoint.py  its checkpoints
    config_zeroth_order.py  frozen weights that move without a gradient
    config_evaluation.py  an evaluation
    config_data.py        what `hybrid-lora-data` takes
    config_plan.py        the plan of a run
    config_evidence.py    a comparison of selections, and its plan
    config_field.py       how a field is declared
    config_validation.py  what one field cannot check of itself
    config_effect.py      which options the others leave without an effect
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hybrid_lora_plugin.config_checkpoint import SAVES, BestCheckpointConfig, CheckpointConfig
from hybrid_lora_plugin.config_data import DATA_FORMATS, DATA_SETS, DataCommandConfig
from hybrid_lora_plugin.config_evaluation import EvaluateCommandConfig
from hybrid_lora_plugin.config_field import Bound, above, at_least, documented
from hybrid_lora_plugin.config_probe import AUTO, AdaLoraConfig, AutoLoraConfig, LookaheadConfig, ProbeConfig
from hybrid_lora_plugin.config_selection import (
    BUDGET_AMOUNTS,
    CRITERIA,
    NORMALISATIONS,
    WITHOUT_PROBE,
    WITHOUT_WARMUP,
    BudgetConfig,
    ControlConfig,
    SelectionConfig,
)
from hybrid_lora_plugin.config_sync import ROUNDINGS, SYNC_MODES, SyncConfig
from hybrid_lora_plugin.config_trial import TrialConfig
from hybrid_lora_plugin.config_zeroth_order import ZerothOrderConfig

__all__ = [
    "AUTO",
    "BUDGET_AMOUNTS",
    "CRITERIA",
    "DATA_FORMATS",
    "DATA_SETS",
    "DOCTOR_LOOKS",
    "EXPORT_DTYPES",
    "EXPORT_FORMATS",
    "FROZEN_DTYPES",
    "NORMALISATIONS",
    "ROUNDINGS",
    "SAVES",
    "SYNC_MODES",
    "WITHOUT_PROBE",
    "WITHOUT_WARMUP",
    "AdaLoraConfig",
    "AdapterConfig",
    "AllocateCommandConfig",
    "AutoLoraConfig",
    "BestCheckpointConfig",
    "BudgetConfig",
    "CheckpointConfig",
    "CompareCommandConfig",
    "ControlConfig",
    "DataCommandConfig",
    "DoctorCommandConfig",
    "EvaluateCommandConfig",
    "ExportCommandConfig",
    "HybridLoraConfig",
    "LookaheadConfig",
    "ModelConfig",
    "ProbeCommandConfig",
    "ProbeConfig",
    "SelectionConfig",
    "SyncConfig",
    "TrainedAdapterConfig",
    "TrainingConfig",
    "ZerothOrderConfig",
]

FROZEN_DTYPES = ("auto", "float32")
EXPORT_FORMATS = ("merged", "adapter", "delta")
EXPORT_DTYPES = ("auto", "float32", "bfloat16", "float16")
DOCTOR_LOOKS = ("source", "import", "run")


@dataclass
class AdapterConfig:
    """The LoRA adapters of the modules that are not fully fine-tuned, and of the probe."""

    rank: int = documented(
        16, "LoRA rank r.", source="paper §4.3", bound=at_least(1, "a LoRA rank of at least 1, e.g. 16")
    )
    alpha: int = documented(
        32,
        "LoRA alpha; the adapter is scaled by alpha / rank.",
        source="2r, the paper does not say",
        bound=above(0, "a LoRA alpha above 0, e.g. 32"),
    )


def _are_factors(entries: list[str]) -> bool:
    """Whether each entry is ``type:factor``, no type twice."""
    parts = [re.fullmatch(r"([A-Za-z]\w*):([0-9.]+(?:[eE][+-]?\d+)?)", entry) for entry in entries]
    try:
        usable = all(part and 0 < float(part[2]) < math.inf for part in parts)
    except ValueError:
        return False
    return usable and len({part[1] for part in parts}) == len(parts)


@dataclass
class TrainedAdapterConfig(AdapterConfig):
    """The LoRA adapters of a verl run."""

    dropout: float = documented(
        0.0,
        "Dropout on the adapter input while training.",
        source="verl default",
        bound=Bound(lambda value: 0 <= value < 1, "a dropout in [0, 1), e.g. 0.0"),
    )
    lr: float | None = documented(
        None,
        "Learning rate of the LoRA modules; null follows `actor_rollout_ref.actor.optim.lr` where your command trains "
        "LoRA by `actor_rollout_ref.model.lora_rank` (in SFT `optim.lr` and `model.lora_rank`), else it is 25 times "
        "`hybrid_lora.full_lr`.",
        source="paper §4.3: 2.5e-5, 25 times that of full modules",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 2.5e-5"),
    )


@dataclass
class TrainingConfig(SelectionConfig):
    """What a verl run trains, and under which allocation; a part of the ``hybrid_lora`` node."""

    enabled: bool = documented(True, "Whether this run trains under an allocation.", source="plugin")
    allocation: str | None = documented(
        None,
        "Folder or allocation.json written by `hybrid-lora-probe`, on a path that the driver and the trainer's first "
        "rank can read; null probes first.",
        source="own choice",
    )
    output_dir: str | None = documented(
        None,
        "Where a run without an allocation writes the one it probes; null is `allocation` beside the checkpoints.",
        source="own choice",
    )
    checkpoint_dir: str | None = documented(
        None,
        "Set by the plugin where a run saves checkpoints: `trainer.default_local_dir`, which every worker tries to "
        "write to before training.",
        source="plugin",
    )
    phase: str = documented(
        "train",
        "Set by the plugin: a run that probes with objective `policy` first starts itself as `probe`.",
        source="plugin",
        choices=("train", "probe"),
    )
    allow_untested: bool = documented(
        False,
        "Whether to go on with a verl outside the tested range, 0.9.1 and later 0.9, where every symbol that the run "
        "needs is there.",
        source="own choice",
    )
    probe: ProbeConfig = documented(ProbeConfig, "Probing run.", source="paper Algorithm 1")
    trial: TrialConfig = documented(TrialConfig, "Criterion trial.", source="own choice")
    full_lr: float | None = documented(
        None,
        "Learning rate of the fully fine-tuned modules; null follows `actor_rollout_ref.actor.optim.lr` (in SFT "
        "`optim.lr`), the rate of your own full fine-tuning, or a 25th of `hybrid_lora.lora.lr`; where none is given "
        "it is the paper's 1e-6.",
        source="paper §4.3",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 1e-6"),
    )
    full_lr_factors: list[str] = documented(
        [],
        "Factors on the rate of fully tuned modules by type, the last part of a module's name, e.g. "
        "`[q_proj:0.1,k_proj:0.1]`; 1 for every other.",
        source="own choice: the paper has one rate",
        bound=Bound(_are_factors, "each type of module once, with a factor above 0, e.g. [q_proj:0.1,k_proj:0.1]"),
    )
    full_warmup_steps: int = documented(
        0,
        "Steps over which the rate of the fully tuned modules rises linearly, on top of verl's own warm-up and "
        "schedule, which act on both rates.",
        source="own choice: the paper has none",
        unit="training steps",
        bound=at_least(0, "0 steps or more"),
    )
    lora: TrainedAdapterConfig = documented(TrainedAdapterConfig, "LoRA adapters.", source="paper §4.3")
    zeroth_order: ZerothOrderConfig = documented(
        ZerothOrderConfig, "Frozen weights that move without a gradient.", source="own choice"
    )
    frozen_dtype: str = documented(
        "auto",
        "Dtype that frozen weights are held in: `auto` is the checkpoint's own where that has two bytes, which loses "
        "nothing, else float32; what trains is always float32.",
        source="own choice: frozen weights are only read",
        choices=FROZEN_DTYPES,
    )


@dataclass
class HybridLoraConfig(CheckpointConfig, SyncConfig, TrainingConfig):
    """The ``hybrid_lora`` node of a verl configuration."""


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
class ProbeCommandConfig(SelectionConfig):
    """What ``hybrid-lora-probe`` takes on the command line as ``key=value``."""

    model: ModelConfig = documented(ModelConfig, "The model.", source="plugin")
    output_dir: str | None = documented(
        None, "Folder for the artifact; must not hold another one.", source="none: must be given"
    )
    probe: ProbeConfig = documented(ProbeConfig, "Probing run.", source="paper Algorithm 1")
    trial: TrialConfig = documented(TrialConfig, "Criterion trial.", source="own choice")
    lora: AdapterConfig = documented(
        AdapterConfig,
        "Adapters of the probe: the rank, and alpha with criteria adalora and trial.",
        source="paper §4.3",
    )


@dataclass
class AllocateCommandConfig(SelectionConfig):
    """What ``hybrid-lora-allocate`` takes on the command line as ``key=value``."""

    artifact: str | None = documented(
        None, "Folder written by `hybrid-lora-probe`, with its sensitivities.", source="none: must be given"
    )
    output_dir: str | None = documented(
        None, "Folder for the new artifact; must not hold another one.", source="none: must be given"
    )


@dataclass
class CompareCommandConfig:
    """What ``hybrid-lora-compare`` takes on the command line as ``key=value``."""

    allocations: list[str] = documented(
        [], "Two or more artifact folders, or allocation.json files, of one model.", source="none: must be given"
    )
    output_dir: str | None = documented(
        None, "New folder for compare.md and compare.png; null prints only.", source="own choice"
    )


@dataclass
class ExportCommandConfig:
    """What ``hybrid-lora-export`` takes on the command line as ``key=value``."""

    checkpoint: str | None = documented(
        None, "A global_step_N folder saved by a run with +hybrid_lora=enabled.", source="none: this or `delta`"
    )
    delta: str | None = documented(
        None, "A folder that `format=delta` wrote, in place of a checkpoint.", source="none: this or `checkpoint`"
    )
    output_dir: str | None = documented(None, "New folder for what is exported.", source="none: must be given")
    format: str = documented(
        "merged",
        "`merged` is a plain Hugging Face model; `adapter` a PEFT adapter with the weights of the fully tuned modules "
        "beside it; `delta` the difference to the base model, from which either is made again with `delta=FOLDER`.",
        source="own choice: what every library loads",
        choices=EXPORT_FORMATS,
    )
    dtype: str = documented(
        "auto",
        "Type of the weights, but of LoRA factors, which stay in float32: `auto` is the one of the run's rollout "
        "engine, with the very weights that the sync of that step gave it, or what an SFT run has said at its start; "
        "`float32` keeps all of the update.",
        source="own choice: what was validated is what is exported",
        choices=EXPORT_DTYPES,
    )
    max_shard_size: str | None = documented(
        None,
        "Largest file of a merged model, e.g. `500MB`; null is 5GB. One larger weight has a file of its own.",
        source="own choice; transformers' is 50GB",
        bound=Bound(lambda value: bool(re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", value)), "a size such as 5GB or 500MB"),
    )
    base: str | None = documented(
        None, "Base model, if it is no longer where the run found it.", source="recorded in the checkpoint"
    )
    trust_remote_code: bool = documented(False, "Run model code from the base checkpoint.", source="transformers")


@dataclass
class DoctorCommandConfig:
    """What ``hybrid-lora-doctor`` takes on the command line as ``key=value``."""

    check: str = documented(
        "import",
        "How deep to look: `source` reads the text of the libraries and imports nothing, in seconds; `import` also "
        "imports them, in about half a minute; `run` also tries a training step and a sync in every mode with a tiny "
        "model, in about a minute.",
        source="own choice",
        choices=DOCTOR_LOOKS,
    )
    json: str | None = documented(
        None, "File for the same as JSON; `--json` prints it in place of the tables.", source="own choice"
    )
    sources: list[str] = documented(
        [],
        "Folders with other versions of libraries, e.g. unpacked wheels, to look at in place of the installed ones; "
        "with `check=source`.",
        source="own choice",
    )
