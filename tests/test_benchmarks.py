"""Benchmarks take minutes and no test runs them; what they reach into must be there all the same."""

import pytest
import torch


@pytest.mark.verl
@pytest.mark.parametrize("side", ["trainer", "engine"])
def test_all_that_is_timed_exists(side, monkeypatch):
    from benchmarks.rollout import stopwatch

    watched = []
    monkeypatch.setattr(stopwatch.Stopwatch, "watch", lambda self, owner, name, label: watched.append((owner, name)))
    getattr(stopwatch, f"watch_{side}")()
    assert len(watched) > 15
    assert [f"{owner}.{name}" for owner, name in watched if not hasattr(owner, name)] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_share_of_changed_elements_is_the_size_of_a_step_in_units_of_the_last_place(dtype):
    from benchmarks.changed_share import RANK, ROWS, SCALING, changed_share

    deviation, width, rate = 0.05, 256, 1e-5
    weights = (torch.randn(ROWS, width, dtype=torch.float64) * deviation).to(dtype)
    bits = weights.view(torch.int16)
    unit = ((bits + 1).view(dtype).double() - weights.double()).abs()
    a = (torch.rand(RANK, width, dtype=torch.float64) * 2 - 1) / width**0.5
    moved = SCALING * (torch.randn(ROWS, RANK, dtype=torch.float64).sign() * rate) @ a
    wanted = (moved.abs() / unit).clamp(max=1).mean().item()
    assert changed_share(deviation, width, dtype, rate) == pytest.approx(wanted, rel=0.1)
