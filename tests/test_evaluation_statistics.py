"""Estimators, intervals and the paired test against slow ones that are right by their definition."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lora_plugin.evaluation.estimators import (
    FEWEST,
    any_of_k,
    distinguishable,
    effective_problems,
    interval,
    unbiased_pass_at_k,
    wilson_interval,
)
from hybrid_lora_plugin.evaluation.paired import (
    bootstrap,
    holm,
    paired_difference,
    sign_flip_distribution,
    verdict,
)

# -- pass@k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 9))
def test_the_unbiased_estimator_is_the_share_of_all_choices_of_k_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        correct = [index < c for index in range(n)]
        choices = list(itertools.combinations(correct, k))
        assert unbiased_pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-15)


def test_the_unbiased_estimator_has_the_right_mean_and_any_of_the_first_k_too():
    # Over all 2^n outcomes of n independent responses, weighted by their chances.
    n, k, p = 6, 2, 0.3
    truth, unbiased, first = 1 - (1 - p) ** k, 0.0, 0.0
    for outcome in itertools.product([False, True], repeat=n):
        chance = math.prod(p if right else 1 - p for right in outcome)
        unbiased += chance * unbiased_pass_at_k(n, sum(outcome), k)
        first += chance * sum(any_of_k(outcome, k)) / (n // k)
    assert unbiased == pytest.approx(truth, abs=1e-12) and first == pytest.approx(truth, abs=1e-12)


def test_large_numbers_do_not_drift():
    exact = 1 - Fraction(math.comb(9_000, 100), math.comb(10_000, 100))
    assert unbiased_pass_at_k(10_000, 1_000, 100) == pytest.approx(float(exact), abs=1e-15)


def test_repeats_are_the_responses_in_order():
    assert any_of_k([False, True, False, False], 2) == [True, False]
    for correct, k in (([], 1), ([True] * 3, 2), ([True], 0)):
        with pytest.raises(ValueError):
            any_of_k(correct, k)


# -- intervals --------------------------------------------------------------------------------------------------------


def slow_wilson(mean, trials):
    """All shares that a score test does not reject, by halving."""

    def rejected(share):
        return abs(mean - share) > 1.959963984540054 * math.sqrt(share * (1 - share) / trials)

    ends = []
    for outside in (0.0, 1.0):
        inside = mean
        if not rejected(outside) and outside == mean:
            ends.append(outside)
            continue
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        ends.append(inside)
    return ends


@pytest.mark.parametrize("trials", [1, 5, 30, 500, 12_032])
@pytest.mark.parametrize("mean", [0.0, 0.033, 0.5, 0.9, 1.0])
def test_wilsons_interval_is_what_a_score_test_does_not_reject(mean, trials):
    assert wilson_interval(mean, trials) == pytest.approx(slow_wilson(mean, trials), abs=1e-9)


def test_one_repeat_is_wilsons_interval_of_the_problems():
    values = [1.0] * 12 + [0.0] * 18
    assert effective_problems(values, 1) == pytest.approx(30) and interval(values, 1) == pytest.approx(
        wilson_interval(0.4, 30)
    )
    assert interval([0.0] * 30, 5) == pytest.approx(wilson_interval(0.0, 30))
    # All problems alike: nothing but the chance of sampling is left, and that of as many responses.
    assert effective_problems([0.5] * 30, 4) == 120


def coverage(problems, repeats, draw_skill, runs=500, seed=0):
    """Share of runs whose interval holds the true mean over all problems of the kind."""
    generator = np.random.default_rng(seed)
    skills = draw_skill(generator, (runs, problems))
    truth = draw_skill(generator, (200_000,)).mean()
    values = generator.binomial(repeats, skills) / repeats
    ends = [interval(list(row), repeats) for row in values]
    return sum(low <= truth <= high for low, high in ends) / runs


SKILLS = {
    "all alike": lambda generator, shape: np.full(shape, 0.35),
    "easy and hard": lambda generator, shape: generator.beta(0.4, 0.8, shape),
    "nearly all too hard": lambda generator, shape: generator.beta(0.1, 1.5, shape),
    "nearly all solved": lambda generator, shape: generator.beta(4.0, 0.5, shape),
}


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize(("problems", "repeats"), [(30, 1), (30, 5), (500, 1)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(skill, problems, repeats):
    assert 0.925 <= coverage(problems, repeats, SKILLS[skill]) <= 0.995


def test_too_narrow_an_interval_would_be_found():
    narrow = coverage(30, 1, lambda generator, shape: generator.beta(0.4, 0.8, shape))
    assert narrow > 0.925
    assert sum(abs(m - 0.4) <= 0.05 for m in np.random.default_rng(0).binomial(30, 0.4, 2000) / 30) / 2000 < 0.925


def test_thirty_problems_tell_little():
    values = [1.0] * 12 + [0.0] * 18
    assert 0.24 < distinguishable(values, 1) < 0.26
    assert distinguishable([1.0] * 400 + [0.0] * 100, 1) < 0.06
    # Ten of thirty runs of nothing but zeros are no proof that the next is one as well.
    assert distinguishable([0.0] * 30, 1) > 0.05


# -- the paired test --------------------------------------------------------------------------------------------------


def slow_p(differences):
    """Every choice of signs."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product([-1, 1], repeat=len(differences))
    ]
    return sum(value >= observed for value in sums) / len(sums)


fractions = st.sampled_from([Fraction(0), Fraction(1, 5), Fraction(2, 5), Fraction(1, 4), Fraction(1, 2), Fraction(1)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(fractions, fractions), min_size=1, max_size=9))
def test_the_exact_test_is_the_share_of_all_choices_of_signs(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = paired_difference(first, second)
    differences = [b - a for a, b in pairs]
    assert found.p == pytest.approx(slow_p(differences), abs=1e-12)
    assert found.mean == pytest.approx(float(sum(differences) / len(differences)), abs=1e-12)
    back = paired_difference(second, first)
    assert (back.p, back.mean, back.better, back.worse) == (found.p, -found.mean, found.worse, found.better)


@pytest.mark.parametrize(("better", "worse"), [(6, 0), (5, 0), (9, 1), (12, 5), (40, 20), (0, 0), (300, 250)])
def test_with_one_repeat_it_is_mcnemars_exact_test(better, worse):
    first = [Fraction(0)] * better + [Fraction(1)] * worse + [Fraction(1)] * 20
    second = [Fraction(1)] * better + [Fraction(0)] * worse + [Fraction(1)] * 20
    count = better + worse
    tail = sum(math.comb(count, index) for index in range(min(better, worse) + 1)) / 2**count
    assert paired_difference(first, second).p == pytest.approx(min(1.0, 2 * tail), abs=1e-9)


def test_six_problems_in_one_direction_are_the_fewest_that_show_anything():
    def p(count):
        return paired_difference([Fraction(0)] * 30, [Fraction(1)] * count + [Fraction(0)] * (30 - count)).p

    assert p(FEWEST) < 0.05 <= p(FEWEST - 1)
    few = paired_difference([Fraction(0)] * 30, [Fraction(1)] * 5 + [Fraction(0)] * 25)
    assert few.needed is None and "5 problems differ" in verdict(few, few.p, "A", "B")


def test_what_would_have_been_needed_is_where_the_test_turns():
    first = [Fraction(0)] * 8 + [Fraction(1)] * 6 + [Fraction(0)] * 86
    second = [Fraction(1)] * 8 + [Fraction(0)] * 6 + [Fraction(0)] * 86
    found = paired_difference(first, second)
    assert "not distinguished: 2.0 points, and" in verdict(found, found.p, "A", "B")

    def p_of(better):
        worse = 14 - better
        return paired_difference(
            [Fraction(0)] * better + [Fraction(1)] * worse, [Fraction(1)] * better + [Fraction(0)] * worse
        ).p

    least = next(2 * better - 14 for better in range(8, 15) if p_of(better) < 0.05)
    assert found.needed == pytest.approx(least / 100)


def test_the_bootstrap_is_that_of_whole_problems():
    generator = random.Random(0)
    differences = [Fraction(generator.choice([-1, 0, 0, 0, 1, 1]), 1) for _ in range(200)]
    low, high = bootstrap(differences, seed=0)
    draws = sorted(sum(generator.choices(differences, k=200)) / 200 for _ in range(2000))
    assert low == pytest.approx(float(draws[50]), abs=0.015) and high == pytest.approx(float(draws[1949]), abs=0.015)
    # Kept together: two runs that are right on the same problems differ by less than two that are not.
    same = paired_difference([Fraction(i % 2) for i in range(100)], [Fraction(i % 2) for i in range(100)])
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)


def test_the_distribution_of_signs_sums_to_one():
    chances = sign_flip_distribution([3, 0, 2, 1])
    assert len(chances) == 13 and chances.sum() == pytest.approx(1) and chances[0] == chances[-1] == 0.125
    assert sign_flip_distribution([1] * 3000).sum() == pytest.approx(1)


def test_a_false_difference_is_called_in_few_families_of_seven():
    generator = np.random.default_rng(0)
    called = 0
    for _ in range(300):
        chances = []
        for _ in range(7):
            better = generator.binomial(20, 0.5)
            tail = sum(math.comb(20, i) for i in range(min(better, 20 - better) + 1)) / 2**20
            chances.append(min(1.0, 2 * tail))
        called += min(holm(chances)) < 0.05
    assert called / 300 < 0.05
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06] and holm([0.9]) == [0.9]


def test_the_verdict_is_in_words():
    clear = paired_difference([Fraction(0)] * 100, [Fraction(1)] * 30 + [Fraction(0)] * 70)
    assert verdict(clear, clear.p, "base", "trained") == "trained is better by 30.0 points"
    assert verdict(clear, 0.2, "base", "trained").endswith("more for several benchmarks at once")
    same = paired_difference([Fraction(1)] * 3, [Fraction(1)] * 3)
    assert verdict(same, same.p, "a", "b") == "the same on every problem"
