"""How far two policies stand apart: against slow references, and where the answer is known."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError, WeightSyncError
from hybrid_lora_plugin.sync.policy_distance import BLOCKS, ERRORS, PolicyDistance, policy_distance
from hybrid_lora_plugin.verl_backend.fixed_prompts import LENGTH, OWN_LENGTH, TEXTS, fixed_prompts
from hybrid_lora_plugin.verl_backend.receiver.logprob_check import Base, compare
from hybrid_lora_plugin.verl_backend.sender.logprob_prompt import header_entry
from tests.support.tiny_models import make_char_tokenizer

N = 496


def policies(slope=1.0, move=0.1, trainer_noise=0.0, engine_noise=0.0, stray=0.0, seed=0, n=N):
    """Log-probabilities t0, t1, e0, e1 of an engine that went ``slope`` of the way and ``stray`` beside it.

    Half of the noise of two passes at one end is the same in both, as roundings that no update has reached are.
    """
    draw = random.Random(seed)
    base = [-3.0 + draw.gauss(0, 1) for _ in range(n)]
    way = [draw.gauss(0, move) for _ in range(n)]

    def passes(size, end):
        shared = [draw.gauss(0, size / math.sqrt(2)) for _ in range(n)]
        return tuple(
            [b + e * moved + s + draw.gauss(0, size / math.sqrt(2)) for b, e, s in zip(base, end, shared, strict=True)]
            for moved in (0, 1)
        )

    engine = [slope * w + draw.gauss(0, stray) for w in way]
    return *passes(trainer_noise, way), *passes(engine_noise, engine)


def by_loops(t0, t1, e0, e1, rounds):
    """The formulas of the module, token by token and block by block."""

    def figures(kept):
        moved = cross = apart = 0.0
        for i in kept:
            floor = (t0[i] - e0[i]) ** 2
            moved += (t1[i] - e0[i]) ** 2 - floor if rounds else (t1[i] - t0[i]) ** 2
            cross += (t1[i] - t0[i]) * (e1[i] - e0[i])
            apart += (t1[i] - e1[i]) ** 2 - floor
        return cross / moved, apart / moved, moved

    n = len(t0)
    left_out = [figures([i for i in range(n) if i * BLOCKS // n != block]) for block in range(BLOCKS)]
    errors = []
    for values in zip(*left_out, strict=True):
        mean = sum(values) / BLOCKS
        errors.append(math.sqrt((BLOCKS - 1) / BLOCKS * sum((value - mean) ** 2 for value in values)))
    return figures(range(n)), errors


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("n", [2 * BLOCKS, 101, N])
def test_figures_are_those_of_the_slow_reference(rounds, n):
    given = policies(slope=0.8, trainer_noise=0.02, engine_noise=0.03, stray=0.02, n=n)
    found, ((slope, ratio, moved), errors) = policy_distance(*given, rounds), by_loops(*given, rounds)
    assert found.slope == pytest.approx(slope, rel=1e-9) and found.slope_error == pytest.approx(errors[0], rel=1e-6)
    assert found.kl_ratio == pytest.approx(ratio, rel=1e-9)
    assert found.kl_ratio_error == pytest.approx(errors[1], rel=1e-6)
    assert found.move == pytest.approx(math.sqrt(moved / n), rel=1e-9)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("slope", [1.0, 0.0, 0.3, 1.7])
def test_an_engine_that_applied_a_part_of_the_update_has_that_slope(rounds, slope):
    found = policy_distance(*policies(slope=slope), rounds)
    assert found.slope == pytest.approx(slope, abs=1e-9)
    assert found.kl_ratio == pytest.approx((1 - slope) ** 2, abs=1e-9)
    assert bool(found.fault(0.25)) is (slope != 1.0) and found.judged(0.25)


def test_the_same_policy_has_slope_1_and_ratio_0_with_the_noise_of_both_ends():
    """As large as the move itself; over many draws the errors are what the figures scatter by."""
    found = [policy_distance(*policies(trainer_noise=0.1, engine_noise=0.1, seed=s), True) for s in range(100)]
    for name, wanted in (("slope", 1.0), ("kl_ratio", 0.0)):
        values = [getattr(distance, name) for distance in found]
        mean = sum(values) / len(values)
        scatter = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        told = sum(getattr(distance, f"{name}_error") for distance in found) / len(found)
        assert mean == pytest.approx(wanted, abs=4 * scatter / math.sqrt(len(values)) + 0.05)
        assert told == pytest.approx(scatter, rel=0.25)
    assert not any(distance.fault(0.25) for distance in found)


def test_a_plain_square_would_take_a_trainers_rounding_for_a_policy_that_lags():
    """Why a trainer in 16 bits needs the other formula."""
    given = policies(trainer_noise=0.2, engine_noise=0.02)
    assert policy_distance(*given, False).fault(0.25) and not policy_distance(*given, True).fault(0.25)


@pytest.mark.parametrize("rounds", [False, True])
def test_move_below_the_noise_gives_no_verdict_instead_of_one(rounds):
    for seed in range(50):
        noise = 0.1 if rounds else 0.0
        found = policy_distance(*policies(move=0.01, trainer_noise=noise, engine_noise=0.1, seed=seed), rounds)
        assert found is None or (not found.judged(0.25) and found.fault(0.25) == "")


def test_weights_that_are_noise_beside_the_update_are_a_fault_of_the_ratio():
    found = policy_distance(*policies(stray=0.1, engine_noise=0.01), False)
    assert found.slope == pytest.approx(1, abs=0.2) and "(by KL)" in found.fault(0.25)


def test_nothing_is_said_of_few_tokens_or_of_no_move():
    assert policy_distance(*policies(n=2 * BLOCKS - 1), False) is None
    t0, _, e0, _ = policies()
    assert policy_distance(t0, t0, e0, e0, False) is None and policy_distance(t0, t0, e0, e0, True) is None
    with pytest.raises(ValueError, match="every token"):
        policy_distance(t0, t0, e0, e0[1:], False)


def test_a_verdict_keeps_its_distance_from_the_limit():
    def at(slope, error):
        return PolicyDistance(slope, error, 0.0, 0.0, 0.1, True)

    assert at(0.75 - ERRORS * 0.05 - 0.01, 0.05).fault(0.25) and not at(0.75 - ERRORS * 0.05 + 0.01, 0.05).fault(0.25)
    assert at(1, 0.0625).judged(0.25) and not at(1, 0.0626).judged(0.25)


# -- what the rollout engine makes of it -----------------------------------------------------------------------------

LENGTHS = (64, 64, 64, 63, 50, 64, 64, 64)


def rows(values):
    values = iter(values)
    return [[next(values) for _ in range(length - 1)] for length in LENGTHS]


def asked(slope, rounding="nearest", **noise):
    t0, t1, e0, e1 = map(rows, policies(slope, n=sum(LENGTHS) - len(LENGTHS), **noise))
    tokens = [list(range(length)) for length in LENGTHS]
    prompt = {
        "tokens": tokens, "base_log_probs": t0, "log_probs": t1, "trainer_rounds": False, "rounding": rounding,
        "limit": 1.0, "policy_limit": 0.25,
    }  # fmt: skip
    return prompt, e1, Base(tokens, e0)


@pytest.mark.parametrize(
    "dtype, rounding, cure",
    [
        ("bfloat16", "nearest", "hybrid_lora.sync_rounding=stochastic or actor_rollout_ref.rollout.dtype=float16"),
        ("float16", "nearest", "hybrid_lora.sync_rounding=stochastic ["),
        ("bfloat16", "stochastic", "give actor_rollout_ref.rollout.dtype=float16"),
        ("float32", "stochastic", "the two ends compute differently"),
    ],
)
def test_a_policy_that_lags_is_refused_with_its_cure(dtype, rounding, cure):
    with pytest.raises(WeightSyncError) as refused:
        compare(*asked(0.4, rounding, engine_noise=0.03), dtype)
    text = str(refused.value)
    assert (
        re.search(r"has gone 0\.(3[5-9]|4[0-5]) ± 0\.0\d of the trainer's way", text)
        and "within 0.25 (hybrid_lora.sync_policy_limit)" in text
        and cure in text
    )
    assert text.endswith("[docs/troubleshooting.md#rollout-policy-behind-the-trainers]") and "\n" not in text


def test_a_policy_that_goes_along_is_measured():
    metrics = compare(*asked(1.0, engine_noise=0.03), "bfloat16")
    assert metrics["sync_policy_judged"] == 1 and metrics["sync_policy_slope"] == pytest.approx(1, abs=0.1)
    assert 0 < metrics["sync_policy_slope_error"] < 0.0625 and abs(metrics["sync_policy_kl_ratio"]) < 0.1
    assert 0 < metrics["sync_logprob_difference"] < 0.5 and metrics["sync_policy_move"] == pytest.approx(0.1, rel=0.2)


def test_without_a_base_of_the_engines_own_or_a_move_there_is_no_verdict():
    prompt, engine, base = asked(0.4)
    for without in (None, Base([[1, 2]], base.log_probs)):
        metrics = compare(prompt, engine, without, "bfloat16")
        assert set(metrics) == {"sync_logprob_difference", "sync_policy_judged"} and metrics["sync_policy_judged"] == 0
    still = prompt | {"log_probs": prompt["base_log_probs"]}
    assert compare(still, engine, base, "bfloat16")["sync_policy_judged"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row, token", [(0, 0), (0, 5), (3, 40)])
def test_what_is_no_number_is_refused_wherever_it_is(row, token, value):
    # Of several differences the largest is none of those that are no numbers, and a slope of them is beyond no limit.
    prompt, engine, base = asked(1.0)
    engine[row][token] = value
    with pytest.raises(WeightSyncError, match=rf"token {token + 1} of prompt {row + 1}, in float16; give .*bfloat16"):
        compare(prompt, engine, base, "float16")


@pytest.mark.parametrize(
    "rollout, trainer, limit",
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.float16, torch.float32, 0.2),
        (torch.float16, torch.bfloat16, 1.0),
        (torch.float32, torch.bfloat16, 1.0),
    ],
)
def test_the_limit_is_that_of_the_coarser_end(rollout, trainer, limit):
    entry = header_entry([[1, 2]], [[-1.0]], [[-1.0]], trainer, HybridLoraConfig(), rollout)
    assert entry["limit"] == limit and entry["trainer_rounds"] is (trainer != torch.float32)


def test_an_engine_that_fits_fewer_tokens_is_compared_on_those():
    prompt, engine, base = asked(1.0, engine_noise=0.03)
    short = [[row[:40] for row in rows] for rows in (engine, base.log_probs)]
    metrics = compare(prompt, short[0], Base(base.tokens, short[1]), "bfloat16")
    wanted = [row[:40] for row in prompt["log_probs"]], [row[:40] for row in prompt["base_log_probs"]]
    flat = [[value for row in part for value in row] for part in (wanted[1], wanted[0], short[1], short[0])]
    assert metrics["sync_policy_slope"] == policy_distance(*flat, False).slope


# -- the texts ------------------------------------------------------------------------------------------------------


def test_texts_give_hundreds_of_tokens_and_a_users_own_take_their_place():
    tokenizer = make_char_tokenizer()
    prompts = fixed_prompts(tokenizer)
    assert len(prompts) == len(TEXTS) == 8 and {len(tokens) for tokens in prompts} == {LENGTH}
    own = fixed_prompts(tokenizer, ["1+1=2", "x", "y" * 300])
    assert [len(tokens) for tokens in own] == [5, OWN_LENGTH], "one token predicts nothing"


def test_a_tokenizer_that_makes_nothing_of_them_is_named():
    with pytest.raises(ConfigurationError, match="hybrid_lora.sync_texts.*give texts"):
        fixed_prompts(make_char_tokenizer(), ["x"])
