"""The options that say which modules are fully tuned, from what was measured or without a probe."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hybrid_lora_plugin.config_field import Bound, above, documented

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


def _is_depth(value: str) -> bool:
    found = re.fullmatch(r"(\d+)-(\d+)", value)
    return value in ("all", "middle") or (found is not None and int(found[1]) <= int(found[2]))


@dataclass
class ControlConfig:
    """Options of the criteria that choose modules without a probe: the controls of any claim about a score."""

    seed: int = documented(0, "Seed of criterion `random`; draw several, each with its own.", source="own choice")
    type: str = documented(
        "o_proj",
        "Module types that criterion `spread` tunes fully, joined by `+`, e.g. `up_proj+down_proj`.",
        source="own choice: o_proj of every layer beat random on one toy, and not on another",
        bound=Bound(lambda value: all(value.split("+")), "a module type or several, e.g. up_proj+down_proj"),
    )
    depth: str = documented(
        "all",
        "Layers that criterion `spread` chooses from: `all`, `middle` (the middle third), or the first and the last "
        "one, from 0, e.g. `8-15`.",
        source="own choice",
        bound=Bound(_is_depth, "all, middle, or two layers such as 8-15"),
    )
    modules: list[str] = documented(
        [], "Names of the modules that criterion `explicit` tunes fully.", source="none: must be given for `explicit`"
    )


#: Every criterion by name.
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
    "lookahead",
    "signal_to_noise",
    "sign_consistency",
    "residual_gradient",
    "plop",
    "trial",
)
#: of these, those that read nothing of a probe, and those that name the modules, so that no budget applies
WITHOUT_PROBE = ("random", "lora_ffn", "explicit", "spread")
NAMING = ("lora_ffn", "explicit")
#: those that read the model as it is given, so that a probe has no warm-up
WITHOUT_WARMUP = ("signal_to_noise", "sign_consistency", "plop")
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
