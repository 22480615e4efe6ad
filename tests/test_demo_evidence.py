"""The demo fails where its claims do not hold: every check is shown a run that breaks it."""

from __future__ import annotations

import json

import pytest

from recipes.demo import evidence
from recipes.demo.verl_run import Step, read_metrics


def run_of(differences, accuracies=None, kl=None, metric=evidence.PROBS_DIFF):
    steps = [Step(0, {"val-core/arithmetic/acc/mean@1": accuracies[0]})] if accuracies else []
    for number, difference in enumerate(differences, start=1):
        metrics = {"critic/score/mean": 0.5, "actor/kl_loss": (kl or [0.0, 0.1, 0.2, 0.3])[number - 1]}
        if difference is not None:
            metrics[metric] = difference
        if accuracies and number == len(differences):
            metrics["val-core/arithmetic/acc/mean@1"] = accuracies[1]
        steps.append(Step(number, metrics))
    return steps


def test_three_good_steps_hold():
    steps = run_of([1e-7, 2e-7, 3e-7])
    assert evidence.check_steps(steps, 3).holds and evidence.check_reference(steps).holds
    check = evidence.check_rollout_weights(steps, 3)
    assert check.holds and "3.00e-07" in check.seen


@pytest.mark.parametrize(
    "differences", [[1e-7, 2e-4, 1e-7], [1e-7, None, 1e-7], [1e-7, float("nan"), 1e-7], [1e-7, 1e-7], []]
)
def test_one_step_above_the_limit_or_without_the_metric_fails(differences):
    assert not evidence.check_rollout_weights(run_of(differences), 3).holds


def test_in_16_bits_the_mean_has_a_limit_and_the_arrived_update_decides():
    name, _ = evidence.WITNESSES["bfloat16"]
    steps = run_of([2e-3, 4e-3], metric=name)
    assert evidence.check_rollout_weights(steps, 2, "bfloat16").holds
    assert not evidence.check_rollout_weights(steps, 2).holds, "that metric is not there"
    assert not evidence.check_rollout_weights(run_of([2e-3, 0.02], metric=name), 2, "bfloat16").holds
    assert not evidence.check_arrived(steps, 2).holds, "no figure is no proof"
    for values, holds in (((0.98, 1.01), True), ((0.98, 0.3), False), ((float("nan"), 1.0), False)):
        for step, value in zip(steps, values, strict=True):
            for kind in ("lora", "full"):
                step.metrics[f"hybrid_lora/update_arrived_{kind}"] = value
        assert evidence.check_arrived(steps, 2).holds is holds


@pytest.mark.parametrize("differences", [[1e-7, 1e-7], [1e-7, None, 1e-7], []])
def test_fewer_steps_than_asked_fail(differences):
    assert not evidence.check_steps(run_of(differences), 3).holds


def test_reference_that_follows_the_actor_fails():
    still = evidence.check_reference(run_of([1e-7] * 3, kl=[3e-5, 0.0, 1e-5]))
    assert not still.holds and "take more steps" in still.seen
    back = evidence.check_reference(run_of([1e-7] * 3, kl=[0.0, 0.1, 0.0]))
    assert not back.holds and "take more steps" not in back.seen
    assert not evidence.check_reference(run_of([1e-7] * 3, kl=[0.0, 0.0, 0.0])).holds
    assert not evidence.check_reference([]).holds


@pytest.mark.parametrize(
    "accuracies, holds", [((0.4, 0.9), True), ((0.4, 0.45), False), ((0.9, 0.4), False), (None, False)]
)
def test_accuracy_has_to_rise_clearly(accuracies, holds):
    assert evidence.check_accuracy(run_of([1e-7] * 3, accuracies), 0.1).holds is holds


def test_a_half_written_metrics_line_is_left_for_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text(json.dumps({"step": 1, "data": {"a": 1.0}}) + '\n{"step": 2, "da')
    assert read_metrics(path) == [Step(1, {"a": 1.0})]
