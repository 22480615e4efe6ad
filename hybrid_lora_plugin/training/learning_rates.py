"""The two learning rates of a run, from what its user gave (paper §4.3: 1e-6 for full modules, LoRA 25 times that)."""

from __future__ import annotations

from typing import NamedTuple

#: paper §4.3, per step
PAPER = {"full": 1.0e-6, "lora": 2.5e-5}
#: of LoRA's rate to that of full modules
RATIO = 25.0
_OTHER = {"full": "lora", "lora": "full"}


class Rate(NamedTuple):
    """A learning rate and where it comes from."""

    #: per step
    value: float
    source: str


class LearningRates(NamedTuple):
    """Both rates, as ``learning_rates`` finds them."""

    full: Rate
    lora: Rate
    #: a rate that was given and is used for nothing, in words; "" where there is none
    unused: str = ""

    def __str__(self) -> str:
        said = f"learning rates: full modules {self.full.value:g} ({self.full.source}), LoRA {self.lora.value:g} "
        return said + f"({self.lora.source})" + (f"; {self.unused}" if self.unused else "")


def learning_rates(full: Rate | None, lora: Rate | None, own: Rate | None, trained: str) -> LearningRates:
    """Both rates: each as given for its kind, else the run's own, else the other one by the paper's ratio.

    Args:
        full, lora: given for the fully tuned modules and for LoRA; None where nobody did.
        own: rate of the command as it was before it asked for Hybrid-LoRA; None where nobody gave one.
        trained: what that command trained, ``full`` or ``lora``: the kind that ``own`` is meant for.
    """
    rates = {"full": full, "lora": lora}
    unused = ""
    if own is not None:
        if rates[trained] is None:
            rates[trained] = own
        elif rates[trained].value != own.value:
            unused = f"{own.value:g} ({own.source}) is used for neither"
    if rates["full"] is None and rates["lora"] is None:
        return LearningRates(*(Rate(PAPER[kind], "the paper's") for kind in ("full", "lora")))
    for kind, factor in (("full", 1 / RATIO), ("lora", RATIO)):
        if rates[kind] is None:
            other = rates[_OTHER[kind]]
            # 15 digits: 2.5e-05 / 25 is 1e-06 and not 1.0000000000000002e-06.
            rates[kind] = Rate(float(f"{other.value * factor:.15g}"), f"the paper's {RATIO:g} : 1 of LoRA to full")
    return LearningRates(rates["full"], rates["lora"], unused)
