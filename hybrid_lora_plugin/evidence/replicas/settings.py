"""The settings block of the replica protocols: read strictly from the mapping that a plan holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hybrid_lora_plugin.config import ProbeConfig
from hybrid_lora_plugin.config_field import above, at_least, documented
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.settings_block import fill

Settings = TypeVar("Settings")


@dataclass
class BaseSettings:
    """One base: a Qwen2 of that shape, trained from random weights to add."""

    name: str = documented("", "Name in the plan.", source="none: must be given")
    hidden_size: int = documented(64, "Width.", source="own choice", bound=at_least(8, "at least 8"))
    layers: int = documented(6, "Decoder layers.", source="own choice", bound=at_least(1, "at least 1"))
    intermediate_size: int = documented(256, "MLP width.", source="own choice", bound=at_least(8, "at least 8"))
    heads: int = documented(4, "Attention heads.", source="own choice", bound=at_least(1, "at least 1"))
    kv_heads: int = documented(2, "Heads of keys and values.", source="own choice", bound=at_least(1, "at least 1"))
    seed: int = documented(0, "Seed of the weights and of the problems.", source="own choice")
    steps: int = documented(1000, "Steps of training.", source="measured", bound=at_least(1, "at least 1"))
    batch_size: int = documented(256, "Problems a step.", source="own choice", bound=at_least(1, "at least 1"))
    lr: float = documented(2.0e-3, "Highest rate.", source="measured", bound=above(0, "a rate above 0, e.g. 2e-3"))


@dataclass
class ReplicaSettings:
    """What the runs of the protocol ``sft`` have in common."""

    bases: list[BaseSettings] = field(default_factory=list, metadata={"help": "The bases.", "item": BaseSettings})
    digits: int = documented(3, "Digits of both numbers.", source="own choice", bound=at_least(1, "1 to 4"))
    least_first: bool = documented(False, "Write answers from the last digit on.", source="own choice")
    batch_size: int = documented(32, "Problems a step.", source="first toy study", bound=at_least(1, "at least 1"))
    eval_every: int = documented(25, "Steps between evaluations.", source="own choice", bound=at_least(1, "at least 1"))
    held_out: int = documented(256, "Held-out problems of a task.", source="own choice", bound=at_least(1, "1 or more"))
    lora_scale: float = documented(
        2.0, "LoRA's alpha / r, at every rank.", source="alpha 32, rank 16", bound=above(0, "above 0, e.g. 2")
    )
    weight_decay: float = documented(0.01, "Of AdamW.", source="verl's default", bound=at_least(0, "0 or more"))
    clip_grad: float = documented(
        1.0, "Norm that a run's gradient is cut to.", source="verl's default", bound=above(0, "above 0, e.g. 1")
    )
    train_problems: int | None = documented(
        None,
        "Problems that a start trains on, in another order in each epoch; null: every step draws problems of its own.",
        source="own choice",
        bound=at_least(1, "a multiple of the problems a step, or null"),
    )
    zeroth_epsilon: float = documented(
        1.0e-3,
        "How far zeroth order moves a weight to measure a slope.",
        source="MeZO (arXiv 2305.17333)",
        bound=above(0, "above 0, e.g. 1e-3"),
    )
    zeroth_directions: int = documented(
        1,
        "Directions a step, of two forward passes each.",
        source="MeZO (arXiv 2305.17333)",
        bound=at_least(1, "at least 1"),
    )
    dtype: str = documented("float32", "Of weights and states.", source="own choice", choices=("float32", "float64"))
    tf32: bool = documented(False, "Let products on CUDA round to TF32.", source="own choice: 10 bits are too few")
    group_size: int | None = documented(
        None,
        "Hybrid runs trained at once, and eight times as many as of other arms; null: 512 on CUDA, 16 on the CPU. "
        "Results are equal bit for bit only at one size.",
        source="own measurement",
        bound=at_least(1, "at least 1, or null"),
    )
    probe: ProbeConfig = field(
        default_factory=lambda: ProbeConfig(warmup_steps=30, batch_size=32, lr=4.0e-3, full_lr=4.0e-3),
        metadata={"help": "The probe of each start; its seed is the start's."},
    )


def read_settings(kind: type[Settings], block: Mapping[str, Any], where: str = "settings") -> Settings:
    """A settings dataclass from a mapping; what is not given keeps its default.

    Args:
        kind: ``ReplicaSettings`` or one that extends it.
        block: names as the fields', nested mappings for dataclasses, lists of mappings for lists of them.
        where: name of the block in messages.

    Raises:
        ConfigurationError: an unknown name, a value of another type, or one that cannot work.
    """
    settings = kind()
    fill(settings, block, where)
    _validate(settings, where)
    return settings


def _validate(settings: ReplicaSettings, where: str) -> None:
    plain = dataclasses.replace(settings, bases=[])
    validate(plain, f"{where}.")
    if settings.digits > 4:
        raise ConfigurationError(f"{where}.digits: {settings.digits} makes too many pairs to split; give 1 to 4")
    if settings.train_problems is not None and settings.train_problems % settings.batch_size:
        raise ConfigurationError(
            f"{where}.train_problems: {settings.train_problems} is no multiple of batch_size, {settings.batch_size}; "
            f"give one, e.g. {(settings.train_problems // settings.batch_size + 1) * settings.batch_size}"
        )
    if not settings.bases:
        raise ConfigurationError(f"{where}.bases: nothing given; give a list such as [{{name: w64, hidden_size: 64}}]")
    names = set()
    for index, base in enumerate(settings.bases):
        place = f"{where}.bases[{index}]"
        validate(base, f"{place}.")
        if not base.name or "/" in base.name or base.name in names:
            raise ConfigurationError(
                f"{place}.name: {base.name!r} is empty, a path or taken; give each a name of its own"
            )
        names.add(base.name)
        if base.hidden_size % (2 * base.heads) or base.heads % base.kv_heads:
            raise ConfigurationError(
                f"{place}.heads: {base.heads} heads, {base.kv_heads} of keys and values, width {base.hidden_size}; "
                f"give a width that is an even multiple of heads, and heads a multiple of kv_heads"
            )
