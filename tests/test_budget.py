"""The budget rule in every mode and overflow, against an obvious reference, and what it refuses."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config

from hybrid_lora_plugin.allocation import AllocationError, allocate
from hybrid_lora_plugin.allocation.budget_modes import budget_limit
from hybrid_lora_plugin.candidates import TYPE_ORDER, Candidate, find_candidates_from_config
from hybrid_lora_plugin.config import BudgetConfig


def candidates_of(parameters):
    return [
        Candidate(f"layers.{i // 7}.{TYPE_ORDER[i % 7]}", i // 7, TYPE_ORDER[i % 7], "attention", size, 2, 1)
        for i, size in enumerate(parameters)
    ]


def full(assignment):
    return [name for name, how in assignment.modules.items() if how == "full"]


def test_lowest_scores_are_taken_until_the_first_that_does_not_fit():
    candidates = candidates_of([10, 30, 10, 50])
    assignment = allocate(candidates, [1.0, 3.0, 2.0, 4.0], BudgetConfig(ratio=0.45))
    # Limit 45: 10, 10, then 30 does not fit and ends it, though nothing larger was tried.
    assert full(assignment) == [candidates[0].name, candidates[2].name]
    assert (assignment.budget.limit, assignment.budget.used) == (45, 20)
    assert assignment.full_names + assignment.lora_names == full(assignment) + [candidates[1].name, candidates[3].name]


def test_stop_does_not_go_on_to_a_smaller_module():
    candidates = candidates_of([10, 80, 10])
    assert full(allocate(candidates, [1, 2, 3], BudgetConfig(ratio=0.5))) == [candidates[0].name]


def select_slowly(sizes, scores, silent, budget, direction, rank):
    """Indices to tune fully: recount the whole model after every module that is tried."""

    def cost(full):
        if budget.mode == "modules":
            return len(full)
        lora = rank * 3 * (len(sizes) - len(full)) if budget.mode == "total_trainable" else 0
        return sum(sizes[i] for i in full) + lora

    whole = len(sizes) if budget.mode == "modules" else sum(sizes)
    limit = budget.total if budget.mode == "total_trainable" else math.floor(Fraction(repr(budget.ratio)) * whole)
    order = sorted(range(len(sizes)), key=lambda i: (scores[i] if direction == "lowest" else -scores[i], i))
    full = []
    for i in order:
        if i in silent:
            continue
        if cost([*full, i]) <= limit:
            full.append(i)
        elif budget.overflow == "stop":
            break
    return full, limit, cost(full), cost([])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(1e-6, 1e3), st.booleans()), min_size=1, max_size=21),
    st.floats(0.01, 1.0),
    st.integers(1, 600),
    st.integers(1, 4),
    st.sampled_from(["parameters", "modules", "total_trainable"]),
    st.sampled_from(["stop", "skip"]),
    st.sampled_from(["lowest", "highest"]),
)
def test_every_mode_and_overflow_selects_what_the_slow_reference_selects(
    modules, ratio, total, rank, mode, overflow, direction
):
    sizes, scores = [size for size, _, _ in modules], [score for _, score, _ in modules]
    silent = {index for index, (_, _, quiet) in enumerate(modules) if quiet}
    assume(len(silent) < len(modules))
    candidates = candidates_of(sizes)
    budget = BudgetConfig(mode=mode, ratio=ratio, total=total, overflow=overflow)
    taken, limit, used, nothing = select_slowly(sizes, scores, silent, budget, direction, rank)
    signal = [index not in silent for index in range(len(modules))]
    if not taken or nothing > limit:
        with pytest.raises(
            AllocationError, match="^budget.total: " if mode == "total_trainable" else "^budget.ratio: "
        ):
            allocate(candidates, scores, budget, direction, signal, rank=rank)
        return
    assignment = allocate(candidates, scores, budget, direction, signal, rank=rank)
    assert assignment.full_names == [candidates[index].name for index in sorted(taken)]
    assert (assignment.budget.limit, assignment.budget.used, assignment.budget.mode) == (limit, used, mode)
    assert assignment.budget.used <= assignment.budget.limit
    assert list(assignment.modules) == [candidate.name for candidate in candidates]


def test_skip_goes_on_to_a_smaller_module():
    candidates = candidates_of([10, 80, 10])
    assert full(allocate(candidates, [1, 2, 3], BudgetConfig(ratio=0.5, overflow="skip"))) == [
        candidates[0].name,
        candidates[2].name,
    ]


def test_a_share_of_modules_counts_modules_whatever_their_size():
    assignment = allocate(candidates_of([1000, 1, 1, 1]), [1, 2, 3, 4], BudgetConfig(mode="modules", ratio=0.5))
    assert full(assignment) == ["layers.0.q_proj", "layers.0.k_proj"]
    assert (assignment.budget.limit, assignment.budget.used, assignment.budget.ratio) == (2, 2, 0.5)


def test_total_trainable_trades_the_adapter_of_a_module_for_its_weight():
    candidates = candidates_of([20, 30, 50])  # LoRA of rank 2: 6 each, 18 in all
    assignment = allocate(candidates, [1, 2, 3], BudgetConfig(mode="total_trainable", total=56), rank=2)
    assert full(assignment) == ["layers.0.q_proj", "layers.0.k_proj"]
    assert (assignment.budget.limit, assignment.budget.used) == (56, 20 + 30 + 6)
    assert assignment.budget.ratio == 50 / 100
    with pytest.raises(AllocationError, match=r"^budget.total: 17, but LoRA of rank 2 .* alone has 18 parameters"):
        allocate(candidates, [1, 2, 3], BudgetConfig(mode="total_trainable", total=17), rank=2)
    with pytest.raises(AllocationError, match=r"leaves 2 parameters beyond LoRA .*q_proj, .* adds 14, .*at least 32$"):
        allocate(candidates, [1, 2, 3], BudgetConfig(mode="total_trainable", total=20), rank=2)
    assert full(allocate(candidates, [1, 2, 3], BudgetConfig(mode="total_trainable", total=32), rank=2))


def test_total_trainable_is_refused_where_the_dimensions_are_not_known():
    candidates = [Candidate("layers.0.q_proj", 0, "q_proj", "attention", 10)]
    with pytest.raises(AllocationError, match="needs the dimensions of layers.0.q_proj"):
        allocate(candidates, [1.0], BudgetConfig(mode="total_trainable", total=100))


def test_named_modules_are_taken_whatever_the_scores_and_the_budget_say():
    candidates = candidates_of([10, 30, 60])
    assignment = allocate(candidates, [0, 0, 0], BudgetConfig(ratio=0.01), fixed=[False, True, True])
    assert full(assignment) == ["layers.0.k_proj", "layers.0.v_proj"]
    assert (assignment.budget.mode, assignment.budget.ratio, assignment.budget.limit, assignment.budget.used) == (
        "fixed",
        0.9,
        90,
        90,
    )
    with pytest.raises(AllocationError, match="names no candidate"):
        allocate(candidates, [0, 0, 0], BudgetConfig(), fixed=[False] * 3)


def test_the_limit_is_exact_integer_arithmetic():
    assert budget_limit(1_310_253_056, 0.1) == 131_025_305
    assert budget_limit(100, 0.29) == 29 and int(0.29 * 100) == 28
    assert budget_limit(7, 1.0) == 7


def test_ties_are_broken_by_mean_then_layer_then_type():
    candidates = candidates_of([1] * 14)
    scores = [1.0] * 14
    assert full(allocate(candidates, scores, BudgetConfig(ratio=0.15))) == [c.name for c in candidates[:2]]
    means = [2.0] * 14
    means[9] = 1.0
    assert full(allocate(candidates, scores, BudgetConfig(ratio=0.1), means=means)) == [candidates[9].name]
    # Given in another order, the same modules win.
    backwards = candidates[::-1]
    assert set(full(allocate(backwards, scores, BudgetConfig(ratio=0.15)))) == {c.name for c in candidates[:2]}


def test_a_module_without_signal_is_never_selected():
    candidates = candidates_of([10, 10, 10])
    assert full(allocate(candidates, [0.0, 1.0, 2.0], BudgetConfig(ratio=0.4))) == [candidates[1].name]
    only_last = allocate(candidates, [1.0, 2.0, 3.0], BudgetConfig(ratio=1.0), signal=[False, False, True])
    assert full(only_last) == [candidates[2].name]
    with pytest.raises(AllocationError, match="no candidate has a signal"):
        allocate(candidates, [0.0, 0.0, 0.0], BudgetConfig())


def test_a_budget_below_the_first_module_is_refused_with_the_ratio_that_is_enough():
    candidates = candidates_of([50, 30, 20])
    with pytest.raises(AllocationError, match=r"0.1 allows 10 of 100 .* 50 .*smallest candidate has 20.*at least 0.5$"):
        allocate(candidates, [1.0, 2.0, 3.0], BudgetConfig(ratio=0.1))
    assert full(allocate(candidates, [1.0, 2.0, 3.0], BudgetConfig(ratio=0.5))) == [candidates[0].name]


@pytest.mark.parametrize(
    "budget, message, enough",
    [
        (
            BudgetConfig(ratio=0.1, overflow="skip"),
            r"^budget.ratio: 0.1 allows 10 of 100 .* layers.0.k_proj, the smallest with a signal, has 30 .*least 0.3$",
            BudgetConfig(ratio=0.3, overflow="skip"),
        ),
        (
            BudgetConfig(mode="modules", ratio=0.2),
            r"^budget.ratio: 0.2 allows 0 of 3 modules, .*least 0.333334$",
            BudgetConfig(mode="modules", ratio=0.333334),
        ),
        (
            BudgetConfig(mode="total_trainable", total=30, overflow="skip"),
            r"^budget.total: 30 leaves 21 .* layers.0.k_proj, the smallest with a signal, adds 27, .*least 36$",
            BudgetConfig(mode="total_trainable", total=36, overflow="skip"),
        ),
    ],
    ids=["parameters", "modules", "total_trainable"],
)
def test_a_budget_too_small_for_anything_names_one_that_is_enough(budget, message, enough):
    arguments = dict(signal=[True, True, False], rank=1)
    candidates = candidates_of([50, 30, 20])
    with pytest.raises(AllocationError, match=message):
        allocate(candidates, [1.0, 2.0, 3.0], budget, **arguments)
    assert len(full(allocate(candidates, [1.0, 2.0, 3.0], enough, **arguments))) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(scores=[1.0]), "scores: 1 values for 2 candidates"),
        (dict(scores=[1.0, float("nan")]), "scores: nan for layers.0.k_proj"),
        (dict(signal=[True]), "signal: 1 values"),
        (dict(means=[1.0]), "means: 1 values"),
        (dict(direction="auto"), "direction: 'auto'"),
        (dict(fixed=[True]), "fixed: 1 values"),
        (dict(budget=BudgetConfig(mode="bytes")), "budget.mode: 'bytes' .*choose one of parameters, modules"),
        (dict(budget=BudgetConfig(overflow="wrap")), "budget.overflow: 'wrap' .*choose one of stop, skip"),
        (dict(budget=BudgetConfig(mode="total_trainable")), "budget.total: None"),
        (dict(budget=BudgetConfig(mode="modules", ratio=0.0)), "budget.ratio: 0.0"),
        (dict(budget=BudgetConfig(ratio=1.5)), "budget.ratio: 1.5"),
    ],
)
def test_unusable_arguments_are_named(arguments, message):
    defaults = dict(candidates=candidates_of([1, 1]), scores=[1.0, 2.0], budget=BudgetConfig(ratio=0.5))
    with pytest.raises(AllocationError, match=message):
        allocate(**(defaults | arguments))


def test_qwen25_7b_at_ten_percent_stays_under_its_limit():
    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    )
    candidates = find_candidates_from_config(config)
    assignment = allocate(candidates, torch.rand(196, generator=torch.Generator().manual_seed(1)) + 1, BudgetConfig())
    assert assignment.budget.limit == 652_541_747 and 0 < assignment.budget.used <= assignment.budget.limit
