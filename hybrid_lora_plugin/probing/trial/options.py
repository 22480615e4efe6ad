"""The settings of a trial with a number for each null, and what is refused before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybrid_lora_plugin.config import AUTO, ProbeCommandConfig
from hybrid_lora_plugin.config_selection import CRITERIA, NAMING
from hybrid_lora_plugin.config_trial import BETAS, CLIP_GRAD, REVERSED, WEIGHT_DECAY, TrialConfig, spread_of
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.training.learning_rates import Rate, learning_rates


@dataclass(frozen=True)
class TrialSettings:
    """How candidates are trained.

    Attributes:
        full_lr, lora_lr: constant learning rates.
        full_lr_factors: by type of module, on ``full_lr``.
        weight_decay, betas, clip_grad: of AdamW, and the norm that gradients are cut to.
        batch_size: rows of a step.
        scale: LoRA's alpha / rank, at every rank.
    """

    full_lr: float
    lora_lr: float
    full_lr_factors: tuple[str, ...]
    weight_decay: float
    betas: tuple[float, float]
    clip_grad: float
    batch_size: int
    scale: float


def settled(config: ProbeCommandConfig) -> TrialSettings:
    """What ``config`` says, with verl's defaults where it says nothing.

    Raises:
        ProbeError: it has no learning rate.
    """
    trial = config.trial
    if trial.full_lr is None and trial.lora_lr is None:
        raise ProbeError(
            "trial.full_lr: nothing given, and candidates are compared at the rates of the run to come; give "
            "trial.full_lr and trial.lora_lr, e.g. trial.full_lr=1e-6 trial.lora_lr=2.5e-5"
        )
    given = {name: None if rate is None else Rate(rate, "") for name, rate in rates_of(trial).items()}
    rates = learning_rates(given["full"], given["lora"], None, "full")
    return TrialSettings(
        full_lr=rates.full.value,
        lora_lr=rates.lora.value,
        full_lr_factors=tuple(trial.full_lr_factors),
        weight_decay=WEIGHT_DECAY if trial.weight_decay is None else trial.weight_decay,
        betas=tuple(trial.betas) or BETAS,
        clip_grad=CLIP_GRAD if trial.clip_grad is None else trial.clip_grad,
        batch_size=trial.batch_size or config.probe.batch_size,
        scale=config.lora.alpha / config.lora.rank,
    )


def rates_of(trial: TrialConfig) -> dict[str, float | None]:
    """Both learning rates as they were given, by kind."""
    return {"full": trial.full_lr, "lora": trial.lora_lr}


def recorded(config: ProbeCommandConfig) -> dict[str, Any]:
    """What the artifact says of the settings, and what an unfinished trial is compared by.

    ``max_state_gb`` and ``run_steps`` are left out: they change time and words, not the result.
    """
    trial, train = config.trial, settled(config)
    return {
        "portfolio": list(trial.portfolio),
        "draws": trial.draws,
        "lora": trial.lora,
        "steps": trial.steps,
        "rounds": trial.rounds,
        "keep": trial.keep,
        "held_out_rows": trial.held_out_rows,
        "batch_size": train.batch_size,
        "full_lr": train.full_lr,
        "lora_lr": train.lora_lr,
        "full_lr_factors": list(train.full_lr_factors),
        "weight_decay": train.weight_decay,
        "betas": list(train.betas),
        "clip_grad": train.clip_grad,
        "lora_alpha": config.lora.alpha,
    }


def check_trial(config: ProbeCommandConfig) -> None:
    """Refuse a trial that cannot work, before anything is read.

    Raises:
        ProbeError: naming the option, the value and the way out.
    """
    trial = config.trial
    settled(config)
    for entry in trial.portfolio:
        name = entry.removesuffix(REVERSED)
        if spread_of(name) is not None and name == entry:
            continue
        if name == "random":
            raise ProbeError("trial.portfolio: 'random' has draws of its own; leave it out and give trial.draws=2")
        usable = [one for one in CRITERIA if one not in (*NAMING, "spread", "random", "trial")]
        if name not in usable:
            raise ProbeError(
                f"trial.portfolio: {entry!r} is no candidate; give spread:TYPES@DEPTH, or one of "
                f"{', '.join(usable)}, each with {REVERSED} for its other end"
            )
    if len(trial.portfolio) + trial.draws < 2:
        raise ProbeError(
            f"trial.portfolio: {trial.portfolio!r} with trial.draws={trial.draws} leaves nothing to compare; name "
            "two candidates or more"
        )
    for name in ("warmup_steps", "partitions"):
        if getattr(config.probe, name) == AUTO:
            raise ProbeError(
                f"probe.{name}: 'auto' is not possible with criterion 'trial', whose candidates come from several "
                f"criteria; give a number, e.g. {500 if name == 'warmup_steps' else 20}"
            )
    if config.probe.seeds:
        raise ProbeError(
            f"probe.seeds: {config.probe.seeds!r} is not possible with criterion 'trial', which is one comparison; "
            "give [] and probe.seed"
        )
    if config.normalise != "none":
        raise ProbeError(
            f"normalise: {config.normalise!r} has no meaning for criterion 'trial', whose candidates have scores of "
            "several kinds; use normalise=none"
        )
    if config.direction != "auto":
        raise ProbeError(
            f"direction: {config.direction!r} has no effect on criterion 'trial'; write NAME{REVERSED} in "
            "trial.portfolio"
        )
