"""The options of criterion `trial`: candidate allocations that are trained for a short while, and how they compete."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hybrid_lora_plugin.config_field import Bound, above, at_least, documented

#: behind a criterion's name: its ranking from the other end
REVERSED = ":reversed"
#: ``spread:TYPES`` or ``spread:TYPES@DEPTH``, as ``control.type`` and ``control.depth``
_SPREAD = re.compile(r"spread:([\w+]+)(?:@(all|middle|\d+-\d+))?")
#: verl's defaults of AdamW, for a trial that no run gives its own
WEIGHT_DECAY, BETAS, CLIP_GRAD = 0.01, (0.9, 0.999), 1.0


def criterion_of(entry: str) -> str:
    """The criterion that an entry of ``trial.portfolio`` names."""
    return entry.partition(":")[0]


def spread_of(entry: str) -> tuple[str, str] | None:
    """Types and depth of a ``spread:…`` entry; None for any other."""
    found = _SPREAD.fullmatch(entry)
    return (found[1], found[2] or "all") if found else None


def _are_entries(entries: list[str]) -> bool:
    names = (entry.removesuffix(REVERSED) for entry in entries)
    plain = all(re.fullmatch(r"\w+", name) or _SPREAD.fullmatch(name) for name in names)
    return plain and len(set(entries)) == len(entries)


def _are_betas(values: list[float]) -> bool:
    return not values or (len(values) == 2 and all(0 <= value < 1 for value in values))


@dataclass
class TrialConfig:
    """Criterion `trial`: successive halving of candidate allocations under the learning rates of the run to come."""

    portfolio: list[str] = documented(
        ["lookahead", "signal_to_noise", "hybrid", "spread:up_proj+down_proj@middle"],
        "Candidates: criteria, each with `:reversed` for its other end, and `spread:TYPES@DEPTH`. Where the rows "
        "cannot tell the best ones apart, the first of them in this order is used.",
        source="own choice: the best of the toy studies, and the paper's",
        bound=Bound(_are_entries, "criteria such as [lookahead,hybrid:reversed,spread:up_proj+down_proj@middle]"),
    )
    draws: int = documented(
        2,
        "Random candidates beside them.",
        source="own choice: what a score has to beat",
        bound=at_least(0, "0 or more draws"),
    )
    lora: bool = documented(
        True,
        "Also train LoRA of the same trainable size to the end, as a control: it is told about and never chosen.",
        source="own choice: without a gap to it no choice of modules helps",
    )
    steps: int = documented(
        25,
        "Optimizer steps of every candidate in the first round.",
        source="own choice",
        unit="steps",
        bound=at_least(1, "at least 1 step, e.g. 25"),
    )
    rounds: int = documented(
        3,
        "Rounds. Before each after the first the worse candidates are dropped; those that stay are trained on to "
        "1 / `keep` times as many steps.",
        source="own choice",
        bound=at_least(1, "at least 1 round, e.g. 3"),
    )
    keep: float = documented(
        0.5,
        "Share of the candidates that stays for the next round, rounded up, two at least.",
        source="successive halving (Jamieson and Talwalkar, AISTATS 2016)",
        unit="fraction in (0, 1)",
        bound=Bound(lambda value: 0 < value < 1, "a fraction in (0, 1), e.g. 0.5"),
    )
    batch_size: int | None = documented(
        None,
        "Rows of a step, over all ranks; null: `data.train_batch_size` in a run of supervised fine-tuning, else "
        "`probe.batch_size`.",
        source="the run's own",
        unit="rows",
        bound=at_least(1, "at least 1 row, or null"),
    )
    held_out_rows: int = documented(
        128,
        "Rows that candidates are compared on, held out from steps and probes alike.",
        source="own choice",
        unit="rows",
        bound=at_least(8, "at least 8 rows, e.g. 128"),
    )
    full_lr: float | None = documented(
        None,
        "Learning rate of the fully tuned modules; null: `hybrid_lora.full_lr` in a run, else a 25th of "
        "`trial.lora_lr`. Give the rates that you will train at: the result holds for them alone.",
        source="the run's own",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 1e-6, or null"),
    )
    lora_lr: float | None = documented(
        None,
        "Learning rate of the LoRA modules; null: `hybrid_lora.lora.lr` in a run, else 25 times `trial.full_lr`.",
        source="the run's own",
        unit="per step",
        bound=above(0, "a learning rate above 0, e.g. 2.5e-5, or null"),
    )
    full_lr_factors: list[str] = documented(
        [],
        "Factors on the rate of fully tuned modules by type, as `hybrid_lora.full_lr_factors`, which a run takes.",
        source="the run's own",
    )
    weight_decay: float | None = documented(
        None,
        "Weight decay of AdamW; null: that of the run's `optim`, else 0.01.",
        source="verl's default",
        bound=at_least(0, "0 or more, e.g. 0.01, or null"),
    )
    betas: list[float] = documented(
        [],
        "Both betas of AdamW; []: those of the run's `optim`, else 0.9 and 0.999.",
        source="verl's default",
        bound=Bound(_are_betas, "two numbers in [0, 1), e.g. [0.9,0.999], or []"),
    )
    clip_grad: float | None = documented(
        None,
        "Norm that gradients are cut to; null: that of the run's `optim`, else 1.",
        source="verl's default",
        bound=above(0, "a norm above 0, e.g. 1.0, or null"),
    )
    run_steps: int | None = documented(
        None,
        "Steps of the run to come, so that the cost is also said as a share of it; null: "
        "`trainer.total_training_steps` in a run that gives it.",
        source="the run's own",
        unit="steps",
        bound=at_least(1, "at least 1 step, or null"),
    )
    max_state_gb: float = documented(
        64.0,
        "Most that the kept states of candidates may take on the disk of `output_dir`. Where more would be needed, "
        "candidates are trained again from the start in each round: slower, and the same numbers.",
        source="own choice",
        unit="GB of 10^9 bytes",
        bound=Bound(lambda value: 0 <= value < math.inf, "0 or more, e.g. 64"),
    )

    @property
    def criteria(self) -> tuple[str, ...]:
        """What the portfolio names, each criterion once."""
        return tuple(dict.fromkeys(criterion_of(entry) for entry in self.portfolio))


@dataclass
class TrialRunsCommandConfig:
    """What ``hybrid-lora-trial`` takes on the command line as ``key=value``, in front of ``--``."""

    allocations: list[str] = documented(
        [],
        "Two or more folders that `hybrid-lora-probe` or `hybrid-lora-allocate` wrote, of one model, in the order in "
        "which they are preferred where runs cannot tell the best ones apart.",
        source="none: must be given",
    )
    output_dir: str | None = documented(
        None, "New folder for the allocation that did best, with the table.", source="none: must be given"
    )
    steps: int = documented(
        20,
        "Training steps of every run in the first round.",
        source="own choice",
        unit="steps of your command",
        bound=at_least(1, "at least 1 step, e.g. 20"),
    )
    rounds: int = documented(
        3,
        "Rounds; the runs of those that stay are resumed to 1 / `keep` times as many steps.",
        source="own choice",
        bound=at_least(1, "at least 1 round, e.g. 3"),
    )
    keep: float = documented(
        0.5,
        "Share of the allocations that stays for the next round, rounded up, two at least.",
        source="successive halving (Jamieson and Talwalkar, AISTATS 2016)",
        unit="fraction in (0, 1)",
        bound=Bound(lambda value: 0 < value < 1, "a fraction in (0, 1), e.g. 0.5"),
    )
    score: str = documented(
        "score",
        "Field of verl's validation dump that counts, more of it being better; the mean over the answers to a prompt.",
        source="verl: the reward",
    )
    minutes: float = documented(
        24 * 60.0,
        "After which a run is ended, which ends the command.",
        source="own choice",
        unit="minutes",
        bound=above(0, "more than 0 minutes"),
    )
