"""Learning rates: which pairs an arm tries, and which one it takes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_lora_plugin.config_evidence import EvidencePlanConfig, EvidenceRatesConfig
from hybrid_lora_plugin.evidence.protocol import ZEROTH, Outcome


@dataclass(frozen=True, order=True)
class Rates:
    """Learning rates of an arm; 0 where it has no such modules."""

    full: float
    lora: float
    zeroth: float = 0.0


@dataclass(frozen=True)
class Tuned:
    """The rates that an arm takes.

    Attributes:
        rates: these.
        value: mean held-out value over the tuning starts; None of the only rates there are, for which nothing was run.
        diverged: runs at these rates that diverged.
        runs: at these rates.
        edges: those of ``full``, ``lora`` and ``zeroth`` where the rate is the first or the last that was tried, so
            that a better one may lie beyond.
    """

    rates: Rates
    value: float | None
    diverged: int
    runs: int
    edges: tuple[str, ...]


def rates_of(rates: EvidenceRatesConfig, name: str) -> EvidenceRatesConfig:
    """The rates that an arm tries.

    Args:
        rates: of the plan.
        name: of the arm, without its budget.
    """
    return dataclasses.replace(rates, of=None, **(rates.of or {}).get(name, {}))


def grid(kind: str, rates: EvidenceRatesConfig) -> list[Rates]:
    """The pairs that an arm of that kind tries, from the lowest."""
    full = rates.full if kind in ("hybrid", "full") else [0.0]
    lora = rates.lora if kind != "full" else [0.0]
    zeroth = rates.zeroth or [] if kind == ZEROTH else [0.0]
    return [Rates(*pair) for pair in itertools.product(full, lora, zeroth)]


def cell(per: str, base: str, task: str) -> tuple[str, ...]:
    """Starts with one cell have one choice of rates."""
    return {"task": (base, task), "base": (base,), "arm": ()}[per]


def held_out(outcome: Outcome) -> float:
    """The value that a run counts with: the last one of its curve; of a run that diverged the first, its base's.

    Whoever sees a run diverge goes back to the base. How far it had got by then would decide every mean instead.
    """
    return outcome.curve[0 if outcome.diverged else -1][1]


def choose_rates(
    tried: Sequence[tuple[Rates, Sequence[Outcome]]], lower_is_better: bool, rates: EvidenceRatesConfig
) -> Tuned:
    """The pair with the best mean held-out value at the end of its runs.

    A pair of which a run diverged comes behind every pair of which fewer did; between equals the lower rates win.

    Args:
        tried: pairs with what came of their runs, the same starts for each.
        lower_is_better: of the value.
        rates: of the plan, whose ends are the edges.
    """
    sign = 1 if lower_is_better else -1
    ranked = []
    for pair, outcomes in tried:
        diverged = sum(outcome.diverged for outcome in outcomes)
        mean = sum(held_out(outcome) for outcome in outcomes) / len(outcomes)
        ranked.append(((diverged, sign * mean, pair), mean, len(outcomes)))
    (diverged, _, pair), mean, runs = min(ranked)
    edges = tuple(
        name
        for name, value, given in (
            ("full", pair.full, rates.full),
            ("lora", pair.lora, rates.lora),
            ("zeroth", pair.zeroth, rates.zeroth or []),
        )
        if value and len(given) > 1 and value in (given[0], given[-1])
    )
    return Tuned(pair, mean, diverged, runs, edges)


def only_rates(pairs: Sequence[Rates]) -> Tuned:
    """The rates of an arm that has one pair."""
    (pair,) = pairs
    return Tuned(pair, None, 0, 0, ())


def tuning_draws(plan: EvidencePlanConfig, draws: int) -> range:
    """The draws of an arm that its rates are chosen by."""
    return range(min(plan.tuning.draws, draws))
