"""The best checkpoint of a run: chosen by its validations, remembered beside the checkpoints, never deleted."""

from __future__ import annotations

import json

import pytest

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.training.best_checkpoint import FILE, BestCheckpoint, best_step, measured_by
from hybrid_lora_plugin.training.checkpoint import FOLDER, TENSORS


def save(checkpoints, step, actor="actor"):
    folder = checkpoints / f"global_step_{step}" / actor / FOLDER
    folder.mkdir(parents=True)
    (folder / TENSORS).touch()


def pointer(checkpoints):
    return json.loads((checkpoints / FILE).read_text())


def run(checkpoints, values, resumed=0, metric=None, larger=None, name="val-core/sums/acc/mean@4"):
    """A run that validates each step and has saved before; returns what it said."""
    best, said = BestCheckpoint(checkpoints, metric, larger, resumed), []
    for step, value in values.items():
        said += best.record(step, {name: value, "actor/loss": 3.0})
        said.append(best.choose())
    return [line for line in said if line]


def test_the_largest_reward_of_the_steps_that_are_saved(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step)
    said = run(tmp_path, {0: 0.9, 5: 0.2, 10: 0.6, 15: 0.6, 17: 0.95, 20: 0.1})
    assert [line.partition(",")[0] for line in said] == [
        "best checkpoint: global_step_5",
        "best checkpoint: global_step_10",
    ]
    assert pointer(tmp_path) == {
        "step": 10,
        "checkpoint": "global_step_10",
        "metric": "val-core/sums/acc/mean@4",
        "value": 0.6,
        "larger_is_better": True,
        "validations": [[0, 0.9], [5, 0.2], [10, 0.6], [15, 0.6], [17, 0.95], [20, 0.1]],
    }
    assert best_step(tmp_path) == 10


def test_the_smallest_loss_in_sft_whose_checkpoints_come_after_their_validation(tmp_path):
    best = BestCheckpoint(tmp_path, None, None, 0)
    for step, loss in ((2, 3.0), (4, 2.0), (6, 2.5)):
        best.record(step, {"val/loss": loss})
        assert best.choose() is None or step > 2
        save(tmp_path, step, actor="")
        # Before the next line of the log: who deletes asks the file and the disk.
        assert best_step(tmp_path) == min(step, 4)
        best.record(step + 1, {"train/loss": 1.0})
        best.choose()
    assert pointer(tmp_path)["step"] == 4 and pointer(tmp_path)["larger_is_better"] is False


def test_a_run_that_was_killed_before_it_chose_has_the_same_best(tmp_path):
    best = BestCheckpoint(tmp_path, None, None, 0)
    best.record(2, {"val/loss": 3.0})
    best.choose()
    save(tmp_path, 2, actor="")
    assert pointer(tmp_path)["step"] is None
    again = BestCheckpoint(tmp_path, None, None, 2)
    assert again.choose() == "best checkpoint: global_step_2, val/loss 3"


def test_what_was_measured_after_the_step_that_a_run_goes_on_from_is_forgotten(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    run(tmp_path, {5: 0.2, 10: 0.6, 15: 0.3})
    assert run(tmp_path, {10: 0.1}, resumed=5) == ["best checkpoint: global_step_5, val-core/sums/acc/mean@4 0.2"]
    assert pointer(tmp_path)["validations"] == [[5, 0.2], [10, 0.1]]


def test_a_checkpoint_that_was_removed_by_hand_is_not_the_best(tmp_path):
    save(tmp_path, 5)
    run(tmp_path, {5: 0.2, 10: 0.6})
    assert best_step(tmp_path) == 5


def test_no_number_is_no_best_and_is_said(tmp_path):
    save(tmp_path, 5)
    said = run(tmp_path, {5: float("nan")})
    assert len(said) == 1 and "step 5 is nan" in said[0] and not (tmp_path / FILE).exists()


def test_another_metric_begins_anew_and_says_so(tmp_path):
    save(tmp_path, 5), save(tmp_path, 10)
    run(tmp_path, {5: 0.2})
    said = run(tmp_path, {10: 7.0}, resumed=5, metric="val-aux/length", name="val-aux/length", larger=False)
    assert "the 1 validations before had val-core/sums/acc/mean@4" in said[0]
    assert pointer(tmp_path)["validations"] == [[10, 7.0]] and pointer(tmp_path)["larger_is_better"] is False


@pytest.mark.parametrize(
    ("metrics", "wanted", "expected"),
    [
        ({"actor/lr": 1.0}, None, None),
        ({"val/loss": 2.0}, None, ("val/loss", 2.0)),
        ({"val-core/a/acc/mean@4": 0.5, "val-core/a/acc/best@4/mean": 0.9, "val-aux/a/x/mean@4": 3}, None,
         ("val-core/a/acc/mean@4", 0.5)),
        ({"val-core/b/reward/mean@1": 1.0, "val-core/a/acc/mean@1": 0.5}, None,
         ("mean of val-core/a/acc/mean@1, val-core/b/reward/mean@1", 0.75)),
        ({"val-aux/num_turns/mean": 2.0, "val-core/a/acc/mean@1": 0.5}, "val-aux/num_turns/mean",
         ("val-aux/num_turns/mean", 2.0)),
        ({"actor/entropy": 2.0}, "val-core/none", None),
    ],
)  # fmt: skip
def test_metric_of_a_validation(metrics, wanted, expected):
    assert measured_by(metrics, wanted) == expected


def test_a_validation_without_the_usual_metrics_is_said_once(tmp_path):
    save(tmp_path, 5)
    said = run(tmp_path, {5: 0.3, 10: 0.4}, name="val-aux/a/x")
    assert len(said) == 1 and "give hybrid_lora.best.metric" in said[0] and not (tmp_path / FILE).exists()


def test_a_metric_that_no_validation_has_is_refused_with_those_it_has():
    with pytest.raises(ConfigurationError, match=r"best.metric: .*val-aux/a/x.*best.keep=false.*#no-metric"):
        measured_by({"val-aux/a/x": 1.0, "actor/lr": 1.0}, "val-core/b/acc/mean@1")


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"validations": 3}'])
def test_a_damaged_record_is_refused_by_name(text, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ConfigurationError, match=r"best_checkpoint.json' cannot be read .*remove it"):
        BestCheckpoint(tmp_path, None, None, 0)
