"""What ``hybrid-lora-evidence`` takes, and what a plan of it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybrid_lora_plugin.config_field import Bound, above, at_least, documented

#: What the command does, in this order; each one goes on where it was ended.
EVIDENCE_STAGES = ("prepare", "choose", "tune", "freeze", "compare", "report")
DEVICES = ("auto", "cpu", "cuda")
#: Whose held-out values a learning rate is chosen by.
TUNED_PER = ("task", "base", "arm")

_WHOLE_AND_DIFFERENT = Bound(
    lambda values: bool(values) and len(set(values)) == len(values) and min(values) >= 0,
    "different whole numbers, 0 or more, e.g. [0, 1, 2]",
)
_RATES = Bound(
    lambda values: bool(values) and len(set(values)) == len(values) and 0 < min(values) <= max(values) < float("inf"),
    "different numbers above 0, e.g. [1e-3, 3e-3, 1e-2]",
)
_NAMES = Bound(
    lambda values: bool(values) and len(set(values)) == len(values) and all(values), "different names, e.g. [small]"
)


@dataclass
class EvidenceCommandConfig:
    """What ``hybrid-lora-evidence`` takes on the command line as ``key=value``."""

    plan: str | None = documented(
        None,
        "YAML file of the comparison; `output_dir` keeps a copy, so that a later stage needs none.",
        source="none: must be given for the first stage",
    )
    output_dir: str | None = documented(
        None,
        "Folder for raw results and the report; the same one goes on where it was ended.",
        source="none: must be given",
    )
    stage: str = documented(
        "all",
        "What to do: `prepare` the bases, `choose` what each arm tunes, `tune` learning rates, `freeze` plan and "
        "rates, `compare` the arms, `report`; `all` is these in turn, and `cost` only counts what there is to do.",
        source="own choice",
        choices=("all", "cost", *EVIDENCE_STAGES),
    )
    workers: int = documented(
        1,
        "Processes of one thread each that choose modules at once, each for other starts, and that train small "
        "replicas on the CPU, if the command itself has one thread (`OMP_NUM_THREADS=1`).",
        source="own choice",
        unit="processes",
        bound=at_least(1, "at least 1 process"),
    )
    device: str = documented(
        "auto",
        "Where models run; `auto` is a GPU where there is one. All runs that are tuned or compared run on one device.",
        source="own choice",
        choices=DEVICES,
    )


@dataclass
class EvidenceSeedsConfig:
    """Which starts there are; a start is a base, a task and a seed."""

    tune: list[int] = documented(
        [100, 101],
        "Seeds of the starts that learning rates are chosen by.",
        source="own choice",
        bound=_WHOLE_AND_DIFFERENT,
    )
    compare: list[int] = documented(
        [0, 1, 2, 3, 4, 5, 6, 7],
        "Seeds of the starts that arms are compared at, none of them in `seeds.tune`.",
        source="own choice: 3 at least, and 8 where runs are cheap",
        bound=_WHOLE_AND_DIFFERENT,
    )


@dataclass
class EvidenceRatesConfig:
    """Learning rates that are tried; an arm with full and LoRA modules tries every pair."""

    full: list[float] = documented(
        [], "Of fully tuned modules, from the lowest.", source="none: must be given", bound=_RATES
    )
    lora: list[float] = documented([], "Of LoRA factors, from the lowest.", source="none: must be given", bound=_RATES)
    zeroth: list[float] | None = documented(
        None,
        "Of the frozen weights that `zeroth_order` moves without a gradient, from the lowest; that arm tries each with "
        "every one of `lora`. Null where there is no such arm.",
        source="none: must be given for such an arm",
        bound=_RATES,
    )
    of: dict[str, Any] | None = documented(
        None,
        "Rates of arms that need others, each as `NAME: {full: [...], lora: [...]}`; what is left out there is as "
        "above.",
        source="own choice: where a run is dear, no arm has to try what another one needs",
    )


@dataclass
class EvidenceTuningConfig:
    """How a learning rate is chosen: by the lowest mean held-out value over the starts of `seeds.tune`."""

    per: str = documented(
        "task",
        "Every arm has rates of its own for each base and `task`, for each `base` over all tasks, or as one `arm` over "
        "all bases and tasks.",
        source="own choice: whoever trains tunes on his own model and task",
        choices=TUNED_PER,
    )
    draws: int = documented(
        2,
        "Draws of a random arm that its rates are chosen by; the other draws take the same rates.",
        source="own choice: its cost",
        bound=at_least(1, "at least 1 draw"),
    )


@dataclass
class EvidencePlanConfig:
    """A comparison, as its YAML file says it."""

    name: str = documented("", "Title of the report.", source="none: must be given")
    protocol: str = documented(
        "",
        "What makes, probes and trains models: `sft`, `policy`, `rl` (runs of verl), or your own as `module:callable`.",
        source="none: must be given",
    )
    settings: dict[str, Any] = documented(
        dict, "Settings of the protocol, which says what they mean.", source="the protocol"
    )
    bases: list[str] = documented([], "Names of the base models.", source="none: must be given", bound=_NAMES)
    tasks: list[str] = documented([], "Names of the tasks.", source="none: must be given", bound=_NAMES)
    steps: int = documented(
        0,
        "Optimizer steps of a run.",
        source="none: must be given",
        bound=above(0, "a number of optimizer steps, e.g. 200"),
    )
    rank: int = documented(
        2,
        "LoRA rank of the modules that are not fully tuned.",
        source="own choice",
        bound=at_least(1, "a rank, e.g. 2"),
    )
    budgets: list[float] = documented(
        [0.1],
        "Shares of the candidate parameters that selected modules may hold, `budget.ratio`; every selecting arm is run "
        "at each.",
        source="paper §4.3",
        bound=Bound(
            lambda values: bool(values) and len(set(values)) == len(values) and all(0 < value <= 1 for value in values),
            "different fractions in (0, 1], e.g. [0.1]",
        ),
    )
    arms: list[Any] = documented(
        ["all"],
        "Names of arms, `all`, or arms of your own as `{name:, kind:, rank:, placement:, selection: {criterion: …}}`.",
        source="own choice",
        bound=Bound(bool, "names of arms, or [all]"),
    )
    without: list[str] = documented([], "Arms to leave out of `all`.", source="own choice")
    selection: dict[str, Any] = documented(
        dict,
        "Options of hybrid-lora-allocate and `probe.*` for every selecting arm; an arm's own come before them. "
        "`budget.overflow` is `skip` unless given, so that all arms fill the budget.",
        source="own choice",
    )
    draws: int = documented(
        5,
        "Draws of each random arm; its value at a start is their mean.",
        source="own choice",
        bound=at_least(1, "at least 1 draw"),
    )
    seeds: EvidenceSeedsConfig = documented(EvidenceSeedsConfig, "Starts.", source="own choice")
    rates: EvidenceRatesConfig = documented(EvidenceRatesConfig, "Learning rates.", source="own choice")
    tuning: EvidenceTuningConfig = documented(EvidenceTuningConfig, "Choice of learning rates.", source="own choice")
    primary: list[Any] = documented(
        [],
        "Comparisons that the study is for, each `{arm: NAME, against: [NAMES]}`; the others are exploratory.",
        source="none: must be given",
        bound=Bound(bool, "at least one, e.g. [{arm: lookahead, against: [random, lora_matched]}]"),
    )
    match: str | None = documented(
        None,
        "Selecting arm whose trainable parameters `lora_matched` and whose FLOPs `lora_flops` are matched to; null is "
        "the arm of the first primary comparison.",
        source="own choice",
    )
    resamples: int = documented(
        10_000, "Resamples of an interval.", source="own choice", bound=at_least(1000, "1000 or more, e.g. 10000")
    )
    level: float = documented(
        0.95,
        "Level of an interval; the primary comparisons share what is left of it among them.",
        source="own choice",
        bound=Bound(lambda value: 0.5 <= value < 1, "a level in [0.5, 1), e.g. 0.95"),
    )
