"""A few kills of each kind; ``python -m tests.support.kill_trials`` makes hundreds (docs/checkpoints.md)."""

from __future__ import annotations

import pytest

from tests.support.kill_trials import export_trials, halving_trials, probe_trials, run_trials

pytestmark = pytest.mark.usefixtures("few_objects")


@pytest.mark.parametrize(("trials", "count"), [(probe_trials, 4), (halving_trials, 2), (export_trials, 4)])
def test_killed_at_random_moments_the_same_start_ends_with_the_same_bytes(trials, count, tmp_path):
    kills, resumes = trials(tmp_path, count=count, seed=1)
    assert kills >= count - 1 and resumes == count


@pytest.mark.verl
@pytest.mark.parametrize("save", ["full", "trainable"])
def test_a_killed_run_goes_on_from_the_last_whole_checkpoint_to_the_same_weights(save, tmp_path):
    pytest.importorskip("verl", reason="verl is not installed")
    kills, resumes = run_trials(tmp_path, count=2, seed=2, save=save)
    # A moment may be after the end where the machine has little else to do.
    assert kills >= 1 and resumes == 2
