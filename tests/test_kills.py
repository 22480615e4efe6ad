"""A few kills of each kind; ``python -m tests.support.kill_trials`` makes hundreds (docs/checkpoints.md)."""

from __future__ import annotations

import pytest

from tests.support.kill_trials import export_trials, halving_trials, probe_trials, run_trials


@pytest.mark.parametrize("trials", [probe_trials, halving_trials, export_trials])
def test_killed_at_random_moments_the_same_start_ends_with_the_same_bytes(trials, tmp_path):
    kills, resumes = trials(tmp_path, count=4, seed=1)
    assert kills >= 3 and resumes == 4


@pytest.mark.verl
@pytest.mark.parametrize("save", ["full", "trainable"])
def test_a_killed_run_goes_on_from_the_last_whole_checkpoint_to_the_same_weights(save, tmp_path):
    pytest.importorskip("verl", reason="verl is not installed")
    kills, resumes = run_trials(tmp_path, count=2, seed=2, save=save)
    assert kills >= 2 and resumes == 2
