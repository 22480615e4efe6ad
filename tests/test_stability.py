"""How sure a choice is: draws of the stored batches, what they say and where it is said."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from hybrid_lora_plugin.allocation import AllocationError, load_allocation, stability
from hybrid_lora_plugin.allocation.budget import FULL, LORA
from hybrid_lora_plugin.allocation.select import select_modules
from hybrid_lora_plugin.allocation.storage import allocation_text, parse_allocation
from hybrid_lora_plugin.candidates import find_candidates, meta_model
from hybrid_lora_plugin.cli.result import print_result
from hybrid_lora_plugin.config import AllocateCommandConfig, BudgetConfig
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.scoring import get_criterion
from tests.support.allocations import decide_for, draw_measurements
from tests.support.tiny_models import tiny_qwen2_config

CONFIG = tiny_qwen2_config(64, layers=3)
COUNT = 21


def settings(criterion="hybrid", **options):
    return AllocateCommandConfig(criterion=criterion, budget=BudgetConfig(mode="modules", ratio=0.2), **options)


def decided(measurements, criterion="hybrid", **options):
    return decide_for(CONFIG, measurements, settings(criterion, **options))


def test_shares_are_those_of_all_possible_draws(monkeypatch):
    """Every draw of three batches, chosen from by hand; those of one batch alone have no spread and do not count."""
    monkeypatch.setattr(stability, "DRAWS", 1000)
    measured = draw_measurements(COUNT, batches=3)
    number, wanted, draws = len(decided(measured).full_names), torch.zeros(COUNT, dtype=torch.float64), 0
    for rows in itertools.product(range(3), repeat=3):
        if len(set(rows)) > 1:
            drawn = measured["sensitivities"][list(rows)]
            scores = drawn.mean(0) * drawn.std(0, correction=0)
            wanted[scores.argsort()[:number]] += 1
            draws += 1
    seen = decided(measured).stability
    assert (seen.draws, seen.batches, draws) == (1000, 3, 24)
    # Four standard errors of a share of one half.
    torch.testing.assert_close(torch.tensor(seen.shares, dtype=torch.float64), wanted / draws, rtol=0, atol=0.064)


def test_bounds_hold_nine_tenths_of_the_scores_of_the_draws():
    measured = draw_measurements(COUNT, batches=8)
    record = decided(measured).stability
    generator = torch.Generator().manual_seed(5)
    scores = []
    for _ in range(2000):
        drawn = measured["sensitivities"][torch.randint(8, (8,), generator=generator)]
        scores.append(drawn.mean(0) * drawn.std(0, correction=0))
    inside = (torch.stack(scores) >= torch.tensor(record.low)) & (torch.stack(scores) <= torch.tensor(record.high))
    assert abs(inside.double().mean().item() - 0.9) < 0.02


def test_a_common_factor_and_the_order_of_the_batches_change_nothing_that_matters():
    measured = draw_measurements(COUNT, batches=6)
    plain = decided(measured).stability
    scaled = decided({name: tensor * 8 for name, tensor in measured.items()}).stability
    assert scaled.shares == plain.shares
    assert scaled.low == pytest.approx([64 * value for value in plain.low])
    turned = decided({name: t.flip(0) if t.ndim == 2 else t for name, t in measured.items()}).stability
    assert turned.shares == pytest.approx(plain.shares, abs=0.15)
    assert decided(measured).stability == plain


def test_what_is_far_from_the_cut_is_decided_and_two_alike_share_the_last_place():
    measured = draw_measurements(COUNT, batches=10)
    draws = torch.Generator().manual_seed(0)
    rows = measured["sensitivities"] = torch.rand(10, COUNT, generator=draws, dtype=torch.float64) + 1
    number = len(decided(measured).full_names)
    rows[:, : number - 1] *= 1e-3
    rows[:, number - 1 : number + 1] *= 1e-1
    allocation = decided(measured)
    groups = stability.by_standing(allocation)
    names = [module.name for module in allocation.modules]
    assert [m.name for m in groups[stability.CERTAIN]] == names[: number - 1]
    assert [m.name for m in groups[stability.EDGE]] == names[number - 1 : number + 1]
    assert [m.name for m in groups[stability.OUT]] == names[number + 1 :]
    shares = stability.shares_of(allocation)
    assert shares[names[number - 1]] + shares[names[number]] == pytest.approx(1)
    assert {allocation.modules[number - 1].assignment, allocation.modules[number].assignment} == {FULL, LORA}


@pytest.mark.parametrize("criterion", ["hybrid", "lora_drop", "gradient_norm", "snip", "hybrid_cv"])
@pytest.mark.parametrize("normalise", ["none", "type_zscore"])
def test_every_criterion_of_batches_says_how_sure_it_is(criterion, normalise):
    allocation = decided(draw_measurements(COUNT, batches=5), criterion, normalise=normalise)
    assert allocation.stability.draws == stability.DRAWS
    assert sum(allocation.stability.shares) == pytest.approx(len(allocation.full_names))


@pytest.mark.parametrize("criterion", ["lookahead", "signal_to_noise", "sign_consistency", "residual_gradient", "plop"])
def test_criteria_with_a_method_of_their_own_have_batches_to_draw_from(criterion):
    generator = torch.Generator().manual_seed(0)
    measured = {
        name: torch.rand(6, COUNT, generator=generator, dtype=torch.float64) + 0.1
        for name in get_criterion(criterion).needs
    }
    record = decided(measured, criterion).stability
    assert (record.draws, record.batches) == (stability.DRAWS, 6) and 0 < max(record.shares) <= 1
    # With equal batches every draw is the same.
    same = {name: rows[:1].expand(6, -1).clone() for name, rows in measured.items()}
    assert set(decided(same, criterion).stability.shares) == {0.0, 1.0}


@pytest.mark.parametrize("criterion", ["alpha", "random", "lora_ffn", "spread"])
def test_what_was_measured_once_or_not_at_all_has_nothing_to_draw_from(criterion, tmp_path, capsys):
    measured = draw_measurements(COUNT, batches=5)
    allocation = decided(measured, criterion)
    assert allocation.stability is None
    folder = save_allocation(tmp_path / "artifact", allocation, measured)
    assert "stability" not in json.loads((folder / "allocation.json").read_text())
    print_result(folder, allocation)
    assert "certain" not in capsys.readouterr().out and "How sure" not in (folder / "report.md").read_text()
    assert load_allocation(folder) == allocation


def test_two_batches_are_drawn_until_both_are_in():
    record = decided(draw_measurements(COUNT, batches=2)).stability
    # Every such draw is the two batches themselves.
    assert set(record.shares) == {0.0, 1.0} and record.draws == stability.DRAWS


def test_it_is_the_first_thing_that_is_said(tmp_path, capsys):
    measured = draw_measurements(COUNT, batches=5)
    allocation = decided(measured)
    folder = save_allocation(tmp_path / "artifact", allocation, measured)
    print_result(folder, allocation)
    said = stability.in_words(allocation)
    assert said.startswith("0 of the") or int(said.split()[0]) > 0
    assert capsys.readouterr().out.splitlines()[0].endswith(said)
    report = (folder / "report.md").read_text()
    assert said in report.splitlines()[2] and "## How sure is the choice?" in report
    edge = stability.by_standing(allocation)[stability.EDGE]
    assert edge and all(f"| `{module.name}` | " in report for module in edge)
    assert load_allocation(folder) == allocation


def test_an_artifact_without_it_is_read_and_decided_anew(tmp_path):
    measured = draw_measurements(COUNT, batches=5)
    allocation = decided(measured)
    earlier = dataclasses.replace(allocation, stability=None)
    folder = save_allocation(tmp_path / "earlier", earlier, measured)
    assert load_allocation(folder).stability is None and stability.in_words(earlier) == ""
    again = select_modules(
        settings(), earlier.model, find_candidates(meta_model(CONFIG)), measured, lora_rank=4, environment={}
    )
    assert again.stability == allocation.stability


@pytest.mark.parametrize(
    "change, named",
    [
        ({"shares": [0.5]}, "stability.shares: 1 values for 21 modules"),
        ({"shares": [1.5] * COUNT}, r"stability.shares\[0\]: 1.5"),
        ({"low": [1e9] * COUNT}, r"stability.low\[0\]: 1000000000.0"),
        ({"draws": 0}, "stability.draws: 0"),
        ({"batches": -1}, "stability.batches: -1"),
        ({"more": 1}, "stability: unknown key 'more'"),
    ],
)
def test_a_damaged_one_is_refused_by_its_field(change, named):
    payload = json.loads(allocation_text(decided(draw_measurements(COUNT, batches=5))))
    payload["stability"] |= change
    with pytest.raises(AllocationError, match=named):
        parse_allocation("allocation.json", payload)
