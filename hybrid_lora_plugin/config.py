"""The configuration of Hybrid-LoRA: one set of dataclasses for Hydra, the command line and the docs.

``HybridLoraConfig`` is the ``hybrid_lora`` node of a verl run; ``ProbeCommandConfig`` is what
``hybrid-lora-probe`` takes: the same keys without the prefix, plus the model and the output folder.
The Hydra group ``hybrid_lora/enabled.yaml``, the ``--help`` texts and ``docs/configuration.md`` are
generated from or checked against this file, so a field is documented here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_lora_plugin.config_field import Bound, above, at_least, documented

#: Budget modes that a user can choose, and the field of ``BudgetConfig`` that says how much; the modes themselves are
#: in ``allocation/budget_modes.py``.
BUDGET_AMOUNTS = {"parameters": "ratio", "modules": "ratio", "total_trainable": "total"}


@dataclass
class BudgetConfig:
    """How much of the candidate modules may be fully fine-tuned (Eq. 4)."""

    mode: str = documented(
        "parameters",
        "What is limited: `parameters` the share of candidate parameters that is fully fine-tuned, `modules` the share "
        "of candidate modules, `total_trainable` the number of trainable parameters, LoRA included.",
        source="paper Eq. 4",
        choices=tuple(BUDGET_AMOUNTS),
    )
    ratio: float = documented(
        0.10,
        "Share that full fine-tuning may use, in mode `parameters` (weights and biases) or `modules`.",
        source="paper §4.3",
        unit="fraction in (0, 1]",
        bound=Bound(lambda value: 0 < value <= 1, "a fraction in (0, 1], e.g. 0.1"),
    )
    total: int | None = documented(
        None,
        "Largest number of trainable parameters, full and LoRA together, in mode `total_trainable`.",
        source="none: must be given in that mode",
        unit="parameters",
        bound=above(0, "the largest number of trainable parameters, e.g. 150000000"),
    )
    overflow: str = documented(
        "stop",
        "At the first module that no longer fits: `stop`, as the paper's greedy rule does, or `skip` it and go on.",
        source="paper §3.4",
        choices=("stop", "skip"),
    )

    @property
    def amount(self) -> float | None:
        """How much of what ``mode`` limits."""
        return getattr(self, BUDGET_AMOUNTS.get(self.mode, "ratio"))


@dataclass
class ControlConfig:
    """Options of the criteria that choose modules without a probe: the controls of any claim about a score."""

    seed: int = documented(0, "Seed of criterion `random`; draw several, each with its own.", source="own choice")
    type: str = documented(
        "o_proj",
        "Module type that criterion `spread` tunes fully over the whole depth.",
        source="own study: o_proj of every layer beat random draws",
    )
    modules: list[str] = documented(
        [], "Names of the modules that criterion `explicit` tunes fully.", source="none: must be given for `explicit`"
    )


@dataclass
class AdaLoraConfig:
    """The AdaLoRA parameterisation (`probe.init=adalora`) and its rank allocation (criterion `adalora`)."""

    lr: float = documented(
        5.0e-4,
        "Warm-up learning rate; at 2.5e-5 this initialisation barely trains.",
        source="AdaLoRA, MNLI script",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 5e-4"),
    )
    initial_rank: int = documented(24, "Rank of every adapter before pruning.", source="1.5 × target, as in AdaLoRA")
    target_rank: int = documented(
        16,
        "Mean rank of the adapters after pruning.",
        source="paper §4.3 (LoRA rank)",
        bound=at_least(1, "at least 1, e.g. 16"),
    )
    start: float = documented(
        0.1,
        "Share of the warm-up before pruning begins.",
        source="AdaLoRA scripts, about 0.1",
        unit="fraction",
        bound=Bound(lambda value: 0 <= value < 1, "a fraction in [0, 1), e.g. 0.1"),
    )
    final: float = documented(
        0.3,
        "Share of the warm-up after pruning ended.",
        source="AdaLoRA scripts, 0.2 to 0.5",
        unit="fraction",
        bound=at_least(0, "a fraction below 1 - probe.adalora.start"),
    )
    interval: int = documented(
        10,
        "Steps between two prunings.",
        source="AdaLoRA scripts, 1 to 100",
        unit="steps",
        bound=at_least(1, "at least 1 step"),
    )
    beta: float = documented(
        0.85,
        "Decay of the moving averages of importance and of its uncertainty.",
        source="AdaLoRA §4",
        bound=Bound(lambda value: 0 <= value < 1, "a decay in [0, 1), e.g. 0.85"),
    )
    orthogonal: float = documented(
        0.1,
        "Weight of the orthogonality penalty on A and B.",
        source="AdaLoRA, official scripts",
        bound=at_least(0, "0 or more, e.g. 0.1"),
    )


@dataclass
class AutoLoraConfig:
    """The bi-level warm-up of criterion `autolora`."""

    alpha_lr: float = documented(
        3.0e-4,
        "Learning rate of the selection scalars alpha, which are trained on validation batches.",
        source="AutoLoRA, official code",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 1e-3"),
    )


_HALF_OF_THE_PARTITIONS = "1 to half of probe.partitions, so that there are two validation batches or more"


@dataclass
class ProbeConfig:
    """The probing run: warm-up of SVD-style LoRA on every candidate, then K masked scoring batches."""

    objective: str = documented(
        "sft",
        "Loss that warms up and is scored: `sft` the negative log-likelihood of the response tokens, `policy` the "
        "policy loss of a verl run on its own rollouts (in a verl run only).",
        source="docs/differences.md (the paper leaves it open)",
        choices=("sft", "policy"),
    )
    files: list[str] = documented(
        [],
        "Rows as JSONL, Parquet or a Hugging Face `datasets` folder, each with `messages`, or with `prompt` and "
        "`response`.",
        source="none: must be given for objective sft",
    )
    warmup_steps: int = documented(
        500, "Optimizer steps before scoring.", source="paper §4.3", unit="steps", bound=at_least(0, "0 or more steps")
    )
    partitions: int = documented(
        20,
        "Random two-bucket partitions K, one row of sensitivities each, so T = K.",
        source="paper §4.3",
        unit="rows",
        bound=at_least(2, "at least 2, or no spread can be measured"),
    )
    partitions_per_batch: int = documented(
        1,
        "Partitions drawn for one validation batch.",
        source="paper Algorithm 1: one",
        unit="partitions",
        bound=at_least(1, _HALF_OF_THE_PARTITIONS),
    )
    batch_size: int = documented(
        8,
        "Rows per warm-up step and per validation batch, over all ranks.",
        source="own choice",
        unit="rows",
        bound=at_least(1, "at least 1 row"),
    )
    micro_batch_size: int | None = documented(
        None,
        "Most rows in one pass on one rank; null: as many as hold 4096 tokens. Changes memory, not the result.",
        source="own choice",
        unit="rows",
        bound=at_least(1, "at least 1 row, or null"),
    )
    max_length: int = documented(
        2048,
        "Longest row; the end of a longer one is cut.",
        source="own choice",
        unit="tokens",
        bound=at_least(2, "at least 2 tokens"),
    )
    lr: float = documented(
        2.5e-5,
        "Warm-up learning rate (AdamW, constant).",
        source="paper §4.3 (LoRA)",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 2.5e-5"),
    )
    full_lr: float = documented(
        1.0e-6,
        "Warm-up learning rate of the full deltas of criterion `full_pruning`.",
        source="paper §4.3 (full fine-tuning)",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 1e-6"),
    )
    init: str = documented(
        "default",
        "Initial values: `default` is A kaiming, B = 0, e = 1; `adalora` is e = 0, A and B from N(0, 0.02²), trained "
        "at `probe.adalora.lr`.",
        source="own choice: Eq. 7 leaves it open",
        choices=("default", "adalora"),
    )
    controls: bool = documented(
        True,
        "Also measure what `lora_drop`, `gradient_norm` and `snip` need: one more, unmasked pass per validation batch.",
        source="own choice: every score needs controls beside it",
    )
    adalora: AdaLoraConfig = documented(AdaLoraConfig, "AdaLoRA.", source="arXiv 2303.10512")
    autolora: AutoLoraConfig = documented(AutoLoraConfig, "AutoLoRA.", source="arXiv 2403.09113")
    seed: int = documented(
        0, "Seed of the adapters, the data order, the split and the partitions.", source="own choice"
    )


#: Every criterion by name; `trial` (successive halving over allocations) has its place but is not built yet.
CRITERIA = (
    "hybrid",
    "hybrid_ratio",
    "hybrid_cv",
    "hybrid_additive",
    "full_pruning",
    "adalora",
    "autolora",
    "lora_drop",
    "alpha",
    "perturbation",
    "gradient_norm",
    "snip",
    "random",
    "lora_ffn",
    "explicit",
    "spread",
)
FROZEN_DTYPES = ("auto", "float32")
ROUNDINGS = ("stochastic", "nearest")
EXPORT_DTYPES = ("auto", "float32", "bfloat16", "float16")
SYNC_MODES = ("merge", "sparse_merge", "adapter", "receiver_merge")
NORMALISATIONS = ("none", "sqrt_dims", "delta_norm", "type_zscore")


@dataclass
class SelectionConfig:
    """What selects the modules from what was measured: shared by a run and the commands that probe and allocate."""

    criterion: str = documented(
        "hybrid",
        "Criterion that chooses the modules; docs/probe.md explains each.",
        source="paper Eq. 14",
        choices=CRITERIA,
    )
    direction: str = documented(
        "auto",
        "Which end of the score goes to full fine-tuning; auto is the criterion's own.",
        source="paper Algorithm 2: lowest",
        choices=("auto", "lowest", "highest"),
    )
    normalise: str = documented(
        "none",
        "What is divided out of the score: `none` is the paper, `sqrt_dims` the module's shape, `delta_norm` the norm "
        "of its probe update, `type_zscore` the mean and spread of its type.",
        source="paper",
        choices=NORMALISATIONS,
    )
    budget: BudgetConfig = documented(BudgetConfig, "Full fine-tuning budget.", source="paper Eq. 4")
    control: ControlConfig = documented(ControlConfig, "Criteria without a probe.", source="own choice")


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
    dropout: float = documented(
        0.0,
        "Dropout on the adapter input while training.",
        source="verl default",
        bound=Bound(lambda value: 0 <= value < 1, "a dropout in [0, 1), e.g. 0.0"),
    )


@dataclass
class HybridLoraConfig(SelectionConfig):
    """The ``hybrid_lora`` node of a verl configuration."""

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
    probe: ProbeConfig = documented(ProbeConfig, "Probing run.", source="paper Algorithm 1")
    full_lr: float = documented(
        1.0e-6,
        "Learning rate of the fully fine-tuned modules; that of LoRA is actor_rollout_ref.actor.optim.lr.",
        source="paper §4.3",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 1e-6"),
    )
    lora: AdapterConfig = documented(AdapterConfig, "LoRA adapters.", source="paper §4.3")
    frozen_dtype: str = documented(
        "auto",
        "Dtype that frozen weights are held in: `auto` is the checkpoint's own where that has two bytes, which loses "
        "nothing, else float32; what trains is always float32.",
        source="own choice: frozen weights are only read",
        choices=FROZEN_DTYPES,
    )
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
        "Seed of the random thresholds; a run that resumes has to keep it.",
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
        "for bfloat16 and 0.2 for float16 rollouts.",
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
    lora: AdapterConfig = documented(
        AdapterConfig, "Adapters of the probe (rank only; Eq. 7 has its own scale).", source="paper §4.3"
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
        None, "A global_step_N folder saved by a run with +hybrid_lora=enabled.", source="none: must be given"
    )
    output_dir: str | None = documented(None, "New folder for the Hugging Face model.", source="none: must be given")
    dtype: str = documented(
        "auto",
        "Type of the weights: `auto` is the one of the run's rollout engine, with the very weights that the sync of "
        "that step gave it; `float32` keeps all of the update.",
        source="own choice: what was validated is what is exported",
        choices=EXPORT_DTYPES,
    )
    base: str | None = documented(
        None, "Base model, if it is no longer where the run found it.", source="recorded in the checkpoint"
    )
    trust_remote_code: bool = documented(False, "Run model code from the base checkpoint.", source="transformers")
