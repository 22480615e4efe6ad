"""Rounding to 16 bits: against exact rational arithmetic, its mean, what it leaves alone, and what it refuses."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import xxhash

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.training import rounding
from hybrid_lora_plugin.training.arrival import SAMPLED, Arrival, arrival_of, is_lost
from hybrid_lora_plugin.training.merge import merge_weight
from hybrid_lora_plugin.training.rounding import NEAREST, Rounding, round_weight

SIXTEEN = [torch.bfloat16, torch.float16]
each_type = pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
STOCHASTIC = Rounding("stochastic", seed=3)
MASK = (1 << 64) - 1


def weights(*shape, size=0.02, seed=0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.int16), right.view(torch.int16))


# -- a slow reference, in Python's integers and fractions -------------------------------------------------------------


def odd_factor(stream: str, index: int) -> int:
    state = (xxhash.xxh3_64_intdigest(stream.encode()) + 0x9E3779B97F4A7C15 * (index + 1)) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return ((state ^ (state >> 31)) >> 32) | 1


def product_of(seed: int, name: str, row: int, column: int) -> int:
    return odd_factor(f"{seed}/{name}/row", row) * odd_factor(f"{seed}/{name}/column", column) % (1 << 32)


def neighbours(value: float, dtype: torch.dtype) -> tuple[Fraction, Fraction]:
    """The number of 8 or 11 significant bits at or below the magnitude of ``value``, and the step to the next."""
    step = Fraction(2) ** ((math.frexp(abs(value))[1] - 1 if value else 0) - (7 if dtype == torch.bfloat16 else 10))
    return Fraction(abs(value)) // step * step, step


def reference(value: float, product: int, dtype: torch.dtype) -> float:
    bits = 16 if dtype == torch.bfloat16 else 13
    lower, step = neighbours(value, dtype)
    up = (Fraction(abs(value)) - lower) / step + Fraction(product >> (32 - bits), 1 << bits) >= 1
    magnitude = lower + step * up
    if dtype == torch.float16:
        # Below the smallest normal number it has fewer bits; round() takes a tie to the even one, as IEEE 754 does.
        magnitude = Fraction(round(magnitude * 2**24), 2**24) if magnitude < Fraction(1, 2**14) else magnitude
    return math.copysign(float(magnitude), value)


@each_type
def test_agrees_with_exact_arithmetic(dtype):
    values = weights(23, 37)
    values[0, :6] = torch.tensor([0.0, -0.0, 1.0, -0.375, 3.1e-5, -4.2e-7])
    result = round_weight("model.w", values, dtype, STOCHASTIC)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            wanted = reference(values[row, column].item(), product_of(3, "model.w", row, column), dtype)
            found = result[row, column].item()
            assert (found, math.copysign(1, found)) == (wanted, math.copysign(1, wanted)), (row, column)


# -- properties -------------------------------------------------------------------------------------------------------


@each_type
def test_stays_between_its_neighbours_and_moves_both_ways(dtype):
    values = weights(64, 512)
    result = round_weight("w", values, dtype, STOCHASTIC).double()
    for value, found in zip(values.flatten().tolist()[:2000], result.flatten().tolist()[:2000], strict=True):
        lower, step = neighbours(value, dtype)
        slack = Fraction(1, 2**25) if dtype == torch.float16 and abs(value) < 2**-14 else 0
        assert lower - slack <= abs(Fraction(found)) <= lower + step + slack
    assert 0.45 < (result > values).double().mean() < 0.55


@each_type
@pytest.mark.parametrize("share", [0.02, 0.25, 0.5, 0.9])
def test_goes_up_as_often_as_it_should(dtype, share):
    step = 2.0 ** (-6 - (7 if dtype == torch.bfloat16 else 10))
    values = torch.full((512, 512), 2.0**-6 + share * step)
    for sign in (1, -1):
        up = (round_weight("w", sign * values, dtype, STOCHASTIC).float().abs() > 2.0**-6).double()
        bound = 5 * math.sqrt(share * (1 - share) / up.numel())
        assert abs(up.mean().item() - share) < bound
        # No row and no column is luckier than another.
        for dimension in (0, 1):
            spread = up.mean(dimension).std().item() / math.sqrt(share * (1 - share) / 512)
            assert 0.8 < spread < 1.2


@each_type
def test_a_value_of_the_type_stays_as_it_is(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].reshape(-1, 2)
    assert same_bits(round_weight("w", every.float(), dtype, STOCHASTIC), every)


def test_neighbouring_thresholds_know_nothing_of_each_other():
    above = round_weight("w", torch.full((1024, 1024), 1.0 + 2.0**-8), torch.bfloat16, STOCHASTIC).float() > 1
    signs = above.double() * 2 - 1
    for one, other in ((signs[1:], signs[:-1]), (signs[:, 1:], signs[:, :-1]), (signs[:512], signs[512:])):
        assert abs((one * other).mean().item()) < 5 / 1024


def test_another_name_or_seed_has_other_thresholds():
    values = weights(64, 64)
    first = round_weight("a", values, torch.bfloat16, STOCHASTIC)
    for name, seed in (("b", 3), ("a", 4)):
        assert 0.1 < (round_weight(name, values, torch.bfloat16, Rounding("stochastic", seed)) != first).double().mean()


@each_type
@pytest.mark.parametrize("chunk", [1, 100, 4096])
def test_is_the_same_in_any_pieces(dtype, chunk, monkeypatch):
    values = weights(96, 40)
    whole = round_weight("w", values, dtype, STOCHASTIC)
    monkeypatch.setattr(rounding, "CHUNK", chunk)
    assert same_bits(round_weight("w", values, dtype, STOCHASTIC), whole)
    # A shard of rows that knows where it begins.
    out = torch.empty(30, 40, dtype=dtype)
    STOCHASTIC.for_tensor("w", dtype, values.shape, "cpu").round(values[50:80].clone(), 50, out)
    assert same_bits(out, whole[50:80])


@each_type
def test_almost_nothing_changes_with_a_small_step(dtype):
    values, step = weights(512, 512), 2e-6 * weights(512, 512, size=1.0, seed=1)
    before, after = (round_weight("w", v, dtype, STOCHASTIC) for v in (values, values + step))
    changed = (before != after).double().mean().item()
    # The share of thresholds that the step crosses: its size in units of the last place.
    ulp = 2.0 ** (values.abs().log2().floor().clamp(min=-14) - (7 if dtype == torch.bfloat16 else 10))
    assert changed == pytest.approx((step.abs() / ulp).clamp(max=1).mean().item(), rel=0.1)
    assert changed < 0.3


@each_type
def test_a_bias_is_rounded_too(dtype):
    bias = weights(1000)
    result = round_weight("b", bias, dtype, STOCHASTIC)
    column = round_weight("b", bias[:, None], dtype, STOCHASTIC)
    assert result.shape == (1000,)
    assert same_bits(result, column[:, 0])
    assert not same_bits(result, bias.to(dtype))


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
def test_nearest_is_torch_s_own(dtype):
    values = weights(64, 100)
    assert torch.equal(round_weight("w", values, dtype, NEAREST), values.to(dtype))
    assert torch.equal(round_weight("w", values, torch.float32, STOCHASTIC), values)


def test_the_values_are_left_alone():
    values = weights(64, 100)
    kept = values.clone()
    round_weight("w", values, torch.bfloat16, STOCHASTIC)
    assert torch.equal(values, kept)


# -- what cannot be rounded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
@pytest.mark.parametrize("value", [65504.1, -70000.0, math.inf])
def test_too_large_for_float16_is_refused_by_name(mode, value):
    values = weights(8, 8)
    values[3, 5] = value
    with pytest.raises(WeightSyncError, match=r"^model\.w: its largest weight, .*float16.*rollout\.dtype=bfloat16"):
        round_weight("model.w", values, torch.float16, Rounding(mode))


def test_the_largest_float16_is_not():
    values = torch.tensor([[65504.0, -65504.0, 65490.0]])
    for mode in ("stochastic", "nearest"):
        assert round_weight("w", values, torch.float16, Rounding(mode)).isfinite().all()


@each_type
def test_no_number_is_refused_by_name(dtype):
    values = weights(8, 8)
    values[0, 0] = math.nan
    with pytest.raises(WeightSyncError, match=r"^model\.w: .*no number"):
        round_weight("model.w", values, dtype, STOCHASTIC)


# -- merging ----------------------------------------------------------------------------------------------------------


@each_type
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_without_an_update_the_merge_is_what_the_engine_loads(dtype, stored):
    base = weights(48, 40).to(stored)
    merged = merge_weight(base, weights(4, 40), torch.zeros(48, 4), 2.0, dtype, STOCHASTIC, "w")
    assert same_bits(merged, base.to(dtype))


@each_type
def test_the_mean_of_merges_is_the_exact_weight(dtype):
    base, a, b = weights(64, 64).bfloat16(), weights(4, 64, seed=1), weights(64, 4, size=1e-3, seed=2)
    exact = base.double() + 2.0 * (b.double() @ a.double())
    seeds = 256
    mean = sum(merge_weight(base, a, b, 2.0, dtype, Rounding("stochastic", s), "w").double() for s in range(seeds))
    error = mean / seeds - exact
    # Of one element the variance is below a quarter of a squared step.
    steps = 2.0 ** (exact.abs().log2().floor().clamp(min=-14) - (7 if dtype == torch.bfloat16 else 10))
    # What is below float16's smallest normal number is rounded to nearest.
    allowed = 5 * steps * 0.5 / math.sqrt(seeds) + 2.0**-25 * (dtype == torch.float16) * (exact.abs() < 2.0**-14)
    assert (error.abs() < allowed).all()
    nearest = merge_weight(base, a, b, 2.0, dtype).double() - exact
    assert nearest.norm() > 3 * error.norm()


@pytest.mark.parametrize("rank", [1, 6, 16])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_a_part_of_a_weight_is_merged_to_the_bits_of_the_whole(dtype, rank, monkeypatch):
    """Whichever: a product of few rows or columns by itself takes another kernel."""
    base, a, b = weights(300, 200), weights(rank, 200, seed=1), weights(300, rank, size=1e-3, seed=2)
    for block in ((256, 1024), (64, 48)):
        monkeypatch.setattr("hybrid_lora_plugin.training.merge.BLOCK", block)
        whole = merge_weight(base, a, b, 2.0, dtype, STOCHASTIC, "w")
        for top, height in ((0, 300), (0, 8), (296, 4), (60, 70), (299, 1)):
            for left, width in ((0, 200), (192, 8), (5, 1), (40, 60)):
                part = base[top : top + height, left : left + width]
                merged = merge_weight(part, a, b, 2.0, dtype, STOCHASTIC, "w", corner=(top, left))
                assert same_bits(merged, whole[top : top + height, left : left + width].contiguous())


# -- how much arrived -------------------------------------------------------------------------------------------------


def arrived(dtype, how, number=1, rows=256):
    base, a, b = weights(rows, 512).bfloat16(), weights(8, 512, size=0.1, seed=1), weights(rows, 8, size=2e-5, seed=2)
    arrival = Arrival(number)
    merge_weight(base, a, b, 2.0, dtype, how, "w", arrival)
    return arrival_of(arrival.sums()["lora"])


def test_nearest_loses_the_update_and_stochastic_does_not():
    lost, _ = arrived(torch.bfloat16, NEAREST)
    whole, noise = arrived(torch.bfloat16, STOCHASTIC)
    finer, less_noise = arrived(torch.float16, STOCHASTIC)
    assert lost < 0.5
    assert whole == pytest.approx(1, abs=0.1)
    assert finer == pytest.approx(1, abs=0.03)
    assert less_noise < noise / 2
    assert arrived(torch.float32, STOCHASTIC) == pytest.approx((1, 0), abs=1e-3)


def test_arrival_is_what_it_says():
    base, a, b = weights(64, 40).bfloat16(), weights(4, 40, seed=1), weights(64, 4, size=1e-3, seed=2)
    arrival = Arrival(1)
    merged = merge_weight(base, a, b, 2.0, torch.bfloat16, STOCHASTIC, "w", arrival)
    exact, moved = 2.0 * (b.double() @ a.double()), merged.double() - base.double()
    share, noise = arrival_of(arrival.sums()["lora"])
    assert share == pytest.approx(((moved * exact).sum() / exact.square().sum()).item(), rel=1e-4)
    assert noise == pytest.approx(((moved - exact).norm() / exact.norm()).item(), rel=1e-4)


def lost(dtype, how, rows):
    base, a, b = weights(rows, 64).bfloat16(), weights(8, 64, size=0.1, seed=1), weights(rows, 8, size=1e-5, seed=2)
    arrival = Arrival(1)
    merge_weight(base, a, b, 2.0, dtype, how, "w", arrival)
    return is_lost(arrival.sums()["lora"])


@pytest.mark.parametrize("rows", [8, 64, 1000])
def test_only_a_loss_beyond_chance_is_called_one(rows):
    """Few elements that move by little arrive in part by chance, whichever seed."""
    assert lost(torch.bfloat16, NEAREST, 1000)
    assert not any(lost(dtype, Rounding("stochastic", seed), rows) for seed in range(40) for dtype in SIXTEEN)


def test_every_row_has_its_turn():
    shape = torch.Size((1000, 700))
    seen = set()
    for number in range(1, 100):
        rows = Arrival(number).rows(shape)
        assert (rows.stop - rows.start) * 700 <= SAMPLED
        seen |= set(range(rows.start, rows.stop))
    assert len(seen) > 950


def test_nothing_updated_is_not_called_lost():
    arrival = Arrival()
    merge_weight(weights(8, 8), weights(2, 8), torch.zeros(8, 2), 2.0, torch.bfloat16, STOCHASTIC, "w", arrival)
    assert arrival_of(arrival.sums()["lora"]) is None
