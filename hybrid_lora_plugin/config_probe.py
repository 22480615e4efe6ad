"""The options of the probe, with those of each of its parameterisations."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date as Day

from hybrid_lora_plugin.config_field import Bound, above, at_least, documented


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


#: what null is in `LookaheadConfig` where no run says more
LOOKAHEAD_STEPS, LOOKAHEAD_LR = 100, 1.0e-6


@dataclass
class LookaheadConfig:
    """How far criterion `lookahead` moves a weight: `steps` × `lr` along minus the sign of its gradient."""

    steps: int | None = documented(
        None,
        "Steps of full fine-tuning to look ahead; null: half of `trainer.total_training_steps` in a run that gives "
        "it, else 100.",
        source="own measurement on a toy, where half of the run was better than a tenth and than more than the run; on "
        "another a tenth was ahead",
        unit="steps",
        bound=at_least(1, "at least 1 step, or null"),
    )
    lr: float | None = documented(
        None,
        "Learning rate of these steps; null: `hybrid_lora.full_lr` in a run, else 1e-6. Give the rate at which you "
        "will tune the full modules.",
        source="paper §4.3 (full fine-tuning)",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 1e-6, or null"),
    )

    @property
    def settled(self) -> LookaheadConfig:
        """The same with a number for each null."""
        return LookaheadConfig(
            steps=LOOKAHEAD_STEPS if self.steps is None else self.steps,
            lr=LOOKAHEAD_LR if self.lr is None else self.lr,
        )

    @property
    def length(self) -> float:
        """How far every entry of a weight moves, in units of the weight."""
        return self.settled.steps * self.settled.lr


def _is_day(value: str) -> bool:
    try:
        return Day.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


#: Instead of a number: as many as it takes.
AUTO = "auto"


def _auto_or_at_least(least: int, wanted: str) -> Bound:
    return Bound(lambda value: value == AUTO or (not isinstance(value, str) and value >= least), wanted)


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
        "Rows as JSONL, JSON arrays (both also `.gz`, `.zst`) or Parquet: files, patterns such as `part-*.jsonl`, "
        "folders, a folder saved by `datasets`, or `org/name:train[:500]` of the hub. Each row has `messages`, or "
        "`prompt` and `response`.",
        source="none: must be given for objective sft",
    )
    messages_key: str = documented(
        "messages",
        "Column of whole chats, `{role, content}` each turn or ShareGPT's `{from, value}`, e.g. `conversations`.",
        source="verl's data.messages_key",
    )
    prompt_key: str = documented(
        "prompt",
        "Column of prompts, texts or chats. Several columns of texts are joined by a newline, e.g. "
        "`instruction+input`; a dot leads into a column.",
        source="verl's data.prompt_key",
    )
    response_key: str = documented(
        "response",
        "Column of responses, e.g. `answer`; a dot leads into a column, e.g. `extra_info.answer`.",
        source="verl's data.response_key",
    )
    train_on: str = documented(
        "last",
        "Assistant turns that are trained: the `last` one, as what a rollout writes, or `all`.",
        source="own choice: a rollout writes one response",
        choices=("last", "all"),
    )
    date: str | None = documented(
        None,
        "Day that a chat template which prints one takes for today, as YYYY-MM-DD; null: the day on which the probe "
        "begins.",
        source="own choice: the same rows give the same tokens on every day",
        bound=Bound(_is_day, "a day such as 2026-07-26, or null"),
    )
    dry_run: bool = documented(
        False,
        "Show one row as it is trained, and what would be cut or left out, and stop: no weights are read and nothing "
        "is written. `hybrid-lora-probe` only.",
        source="own choice",
    )
    warmup_steps: int | str = documented(
        500,
        "Optimizer steps before scoring; `auto`: until the choice of modules no longer changes.",
        source="paper §4.3",
        unit="steps",
        bound=_auto_or_at_least(0, "0 or more steps, or auto"),
    )
    max_warmup_steps: int = documented(
        500,
        "Most steps of a warm-up that is `auto`.",
        source="paper §4.3",
        unit="steps",
        bound=at_least(1, "at least 1 step, e.g. 500"),
    )
    warmup_check_steps: int = documented(
        50,
        "Steps between two looks at what a warm-up that is `auto` would choose now.",
        source="own choice: a tenth of the paper's warm-up",
        unit="steps",
        bound=at_least(1, "at least 1 step, e.g. 50"),
    )
    warmup_check_partitions: int = documented(
        4,
        "Partitions that such a look scores, the same ones each time.",
        source="own choice: about a tenth of the warm-up's cost",
        unit="partitions",
        bound=at_least(2, "at least 2, or no spread can be measured"),
    )
    warmup_agreement: float = documented(
        0.9,
        "Overlap (Jaccard) of two choices in a row, twice in a row, at which a warm-up that is `auto` ends.",
        source="own choice",
        unit="fraction",
        bound=Bound(lambda value: 0 < value <= 1, "a fraction above 0 and up to 1, e.g. 0.9"),
    )
    partitions: int | str = documented(
        20,
        "Random two-bucket partitions K, one row of sensitivities each, so T = K; `auto`: until the choice is settled.",
        source="paper §4.3",
        unit="rows",
        bound=_auto_or_at_least(2, "at least 2, or no spread can be measured; or auto"),
    )
    max_partitions: int = documented(
        100,
        "Most partitions where they are `auto`; validation rows for all of them are held out.",
        source="own choice: five times the paper's",
        unit="rows",
        bound=at_least(2, "at least 2, e.g. 100"),
    )
    settled_share: float = documented(
        0.95,
        "Share of the modules that a bootstrap must be sure of where partitions are `auto`, looked at every 8, "
        "twice in a row.",
        source="own choice: at a budget of 10 % half as many modules on the edge as chosen ones",
        unit="fraction",
        bound=Bound(lambda value: 0 < value <= 1, "a fraction above 0 and up to 1, e.g. 0.95"),
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
    micro_batch_tokens: int | None = documented(
        None,
        "Most tokens in one pass on one rank, padding included, in place of `micro_batch_size`: rows of like length "
        "are passed together, and a longer row alone. Changes memory and speed, and results only by rounding.",
        source="own choice",
        unit="tokens",
        bound=at_least(2, "at least 2 tokens, or null"),
    )
    gradient_checkpointing: bool = documented(
        False,
        "Whether to hold the activations of one decoder layer between forward and backward in place of all, and to "
        "compute each layer once more. Changes memory and time, not the result.",
        source="own choice: a third more computing",
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
    lookahead: LookaheadConfig = documented(LookaheadConfig, "Criterion lookahead.", source="own choice")
    seed: int = documented(
        0, "Seed of the adapters, the data order, the split and the partitions.", source="own choice"
    )
    seeds: list[int] = documented(
        [],
        "Several seeds, a probe each: one choice by the mean of a module's ranks, and how far the seeds agree.",
        source="own choice",
        bound=Bound(
            lambda value: len(value) != 1 and len(set(value)) == len(value),
            "two different seeds or more, e.g. [0,1,2], or [] for probe.seed alone",
        ),
    )

    @property
    def most_warmup_steps(self) -> int:
        """Steps of the warm-up, or the limit where they are ``auto``."""
        return self.max_warmup_steps if self.warmup_steps == AUTO else int(self.warmup_steps)

    @property
    def most_partitions(self) -> int:
        """Partitions, or the limit where they are ``auto``."""
        return self.max_partitions if self.partitions == AUTO else int(self.partitions)
