"""Benchmarks take minutes and no test runs them; what they reach into must be there all the same."""

import pytest


@pytest.mark.verl
@pytest.mark.parametrize("side", ["trainer", "engine"])
def test_all_that_is_timed_exists(side, monkeypatch):
    from benchmarks.rollout import stopwatch

    watched = []
    monkeypatch.setattr(stopwatch.Stopwatch, "watch", lambda self, owner, name, label: watched.append((owner, name)))
    getattr(stopwatch, f"watch_{side}")()
    assert len(watched) > 15
    assert [f"{owner}.{name}" for owner, name in watched if not hasattr(owner, name)] == []
