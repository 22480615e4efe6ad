"""What the responses to one benchmark come to, with an interval and with all that was not a plain right or wrong."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from hybrid_lora_plugin.evaluation.estimators import (
    FEWEST,
    any_of_k,
    distinguishable,
    interval,
    unbiased_pass_at_k,
)
from hybrid_lora_plugin.evaluation.records import CUT, NOT_ASKED, Judgement, Key, Response, in_order


@dataclass(frozen=True)
class Counts:
    """Responses that are not a plain right or wrong; one may be in several of these.

    Attributes:
        responses: all.
        correct: of them.
        unparsed: nothing stood where the answer has to stand; wrong.
        timed_out: judging took longer than allowed; wrong.
        cut: ended by the limit of their length; judged as they stand.
        not_asked: the prompt was longer than allowed; wrong.
    """

    responses: int
    correct: int
    unparsed: int
    timed_out: int
    cut: int
    not_asked: int


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark of one run.

    Attributes:
        name: of the benchmark.
        k: responses of which any may be right.
        repeats: r.
        problems: P that were asked.
        of: problems that the benchmark has.
        value: the paper's figure, in [0, 1]: the share of problems with a right response among k, the mean over the
            repeats.
        low, high: its 95 % interval, see ``estimators.interval``.
        per_repeat: [r] the figure of each.
        repeat_deviation: standard deviation between them; None for one.
        unbiased: pass@k from all k · r responses; equal to ``value`` for one repeat.
        per_response: share of right responses, pass@1.
        tokens: mean length of a response.
        counts: see there.
        distinguishable: least difference to a figure without results per problem that chance does not give.
    """

    name: str
    k: int
    repeats: int
    problems: int
    of: int
    value: float
    low: float
    high: float
    per_repeat: list[float]
    repeat_deviation: float | None
    unbiased: float
    per_response: float
    tokens: float
    counts: Counts
    distinguishable: float

    @property
    def fewest_points(self) -> float:
        """Least difference in points of two runs on the same problems: ``FEWEST`` problems in one repeat each."""
        return 100 * FEWEST / (self.problems * self.repeats)


def values_of(correct: Sequence[Sequence[bool]], k: int) -> list[Fraction]:
    """Each problem's value, the share of its repeats with a right response.

    Args:
        correct: [P][n], n = k · r.
        k: responses of a repeat.
    """
    return [Fraction(sum(repeats), len(repeats)) for repeats in (any_of_k(row, k) for row in correct)]


def summarise(
    name: str,
    k: int,
    repeats: int,
    identities: Sequence[str],
    of: int,
    responses: Mapping[Key, Response],
    judgements: Mapping[Key, Judgement],
) -> BenchmarkResult:
    """The result of a benchmark whose responses are all there and judged.

    Args:
        name: of the benchmark.
        k, repeats: k · r responses a problem.
        identities: of the P problems that were asked.
        of: problems that the benchmark has.
        responses, judgements: by key.

    Raises:
        KeyError: one is missing.
    """
    samples = k * repeats
    given = [row for rows in in_order(responses, identities, samples) for row in rows]
    judged = in_order(judgements, identities, samples)
    correct = [[one.correct for one in row] for row in judged]
    said = [one for row in judged for one in row]
    tries = [any_of_k(row, k) for row in correct]
    per_repeat = [sum(row[repeat] for row in tries) / len(tries) for repeat in range(repeats)]
    values = [float(value) for value in values_of(correct, k)]
    low, high = interval(values, repeats)
    return BenchmarkResult(
        name=name,
        k=k,
        repeats=repeats,
        problems=len(identities),
        of=of,
        value=math.fsum(values) / len(values),
        low=low,
        high=high,
        per_repeat=per_repeat,
        repeat_deviation=statistics.stdev(per_repeat) if repeats > 1 else None,
        unbiased=math.fsum(unbiased_pass_at_k(samples, sum(row), k) for row in correct) / len(correct),
        per_response=sum(map(sum, correct)) / len(said),
        tokens=sum(response.tokens for response in given) / len(given),
        counts=Counts(
            responses=len(said),
            correct=sum(one.correct for one in said),
            # What took too long, or was never asked, is counted as that.
            unparsed=sum(
                one.answer is None and not one.correct and not one.timed_out and response.finish != NOT_ASKED
                for one, response in zip(said, given, strict=True)
            ),
            timed_out=sum(one.timed_out for one in said),
            cut=sum(response.finish == CUT for response in given),
            not_asked=sum(response.finish == NOT_ASKED for response in given),
        ),
        distinguishable=distinguishable(values, repeats),
    )
