"""The noisy adder's tasks and the search for a gap: answers, rewards by digit, and what each arm of a run trains."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

import pytest
import torch

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.errors import ConfigurationError
from recipes.demo import noisy_adder, task
from recipes.evidence import gap_report, gap_search
from tests.support.verl_processes import ROOT


@pytest.fixture(scope="module")
def reward():
    """Loaded by its path, as verl does."""
    spec = importlib.util.spec_from_file_location("digits_reward_by_path", ROOT / "recipes/demo/digits_reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    trained = noisy_adder.train_base(steps=4, clean_steps=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(noisy_adder, "train_base", lambda seed, quiet: trained)
        return noisy_adder.write(tmp_path_factory.mktemp("adder") / "last_digits", "last_digits")


def test_a_reward_counts_digits_in_place_and_nothing_for_another_length(reward):
    for answer, score in (("19", 1.0), ("19<|im_end|>07", 1.0), (" 19 ", 1.0), ("18", 0.5), ("91", 0.0), ("1", 0.0)):
        assert reward("", answer, "19") == {"score": score, "acc": float(score == 1.0)}, answer
    assert reward("", "190", "19")["score"] == reward("", None, "19")["score"] == 0.0


def test_every_task_moves_each_answer_and_keeps_its_width():
    for name, answer in noisy_adder.TASKS.items():
        answers = [answer(problem) for problem in task.pool("train")]
        assert all(len(one) == 2 and one.isdigit() for one in answers), name
        moved = sum(one != problem.answer for one, problem in zip(answers, task.pool("train"), strict=True))
        assert moved > 0.8 * len(answers), name
    assert noisy_adder.TASKS["last_digits"](task.Problem(37, 45)) == "75"
    assert noisy_adder.TASKS["shifted"](task.Problem(37, 45)) == "19"


def test_rows_hold_the_answers_of_their_task_and_share_no_problem(folder):
    pandas = pytest.importorskip("pandas")
    train, validation = (pandas.read_parquet(folder / f"{split}.parquet") for split in task.SPLITS)
    assert (len(train), len(validation)) == (noisy_adder.TRAIN_ROWS, noisy_adder.VALIDATION_ROWS)
    asked = [{tuple(row)[0]["content"] for row in rows["prompt"]} for rows in (train, validation)]
    assert not asked[0] & asked[1]
    for row in validation.to_dict("records"):
        left, right = row["prompt"][0]["content"].rstrip("=").split("+")
        assert row["reward_model"]["ground_truth"] == left[-1] + right[-1]
        assert row["data_source"] == "hybrid_lora/last_digits"
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert noisy_adder.write(folder, "last_digits") == folder
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_another_task_is_refused_and_left_alone(folder, tmp_path, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(ConfigurationError, match=r"folder: .* has rows of last_digits, wanted rows of shifted; give"):
        noisy_adder.write(folder, "shifted")
    with pytest.raises(SystemExit) as ended:
        noisy_adder.main([str(tmp_path), "--task", "shifted"])
    assert ended.value.code == 2 and "has no task.json, wanted rows of shifted" in capsys.readouterr().err
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_a_ratio_is_that_of_the_mean_log_probability_and_leaves_padding_out():
    new, old = torch.log(torch.tensor([[0.5, 0.2, 0.9]])), torch.log(torch.tensor([[0.25, 0.4, 0.1]]))
    ratios = gap_search.sequence_ratios(new, old, torch.tensor([[1.0, 1.0, 0.0]]))
    assert ratios.item() == pytest.approx(math.exp((math.log(2) - math.log(2)) / 2))


def test_each_arm_of_a_run_trains_its_own_weights_and_the_same_run_gives_the_same_curve(folder):
    def run(arm, **changes):
        settings = {"arm": arm, "rank": 1, "full": [], "full_lr": 1e-3, "lora_lr": 1e-2, "steps": 2, "seed": 3}
        size = {"problems": 4, "answers": 4, "updates": 2}
        return gap_search.run(folder, "last_digits", eval_every=1, **(settings | size | changes))

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    candidates = find_candidates(model)
    name = candidates[0].name
    found = {"lora": run("lora"), "hybrid": run("hybrid", full=[name]), "full": run("full")}
    lora = sum(candidate.lora_parameters(1) for candidate in candidates)
    moved = candidates[0].parameters - candidates[0].lora_parameters(1)
    assert found["lora"]["trainable"] == lora and found["hybrid"]["trainable"] == lora + moved
    assert found["full"]["trainable"] == sum(parameter.numel() for parameter in model.parameters())
    assert all([step for step, _ in one["accuracy"]] == [0, 1, 2] for one in found.values())
    again = run("lora")
    assert {**again, "seconds": 0} == {**found["lora"], "seconds": 0}


def test_the_published_report_follows_from_its_runs_byte_for_byte(tmp_path):
    published = ROOT / "docs" / "evidence" / "gap-search"
    shutil.copy(published / gap_report.RESULTS, tmp_path)
    assert gap_report.main([str(tmp_path)]) == 0
    assert (tmp_path / gap_report.REPORT).read_bytes() == (published / gap_report.REPORT).read_bytes()


def test_a_gap_is_of_the_best_rate_with_the_most_seeds():
    def row(arm, rate, seed, value):
        rates = {"full_lr": rate, "lora_lr": 0.0} if arm == "full" else {"full_lr": 0.0, "lora_lr": rate}
        more = {"task": "t", "steps": 2, "problems": 4, "answers": 4, "updates": 2, "form": 2, "trainable": 9}
        more["rank"] = int(arm == "lora")
        return {"arm": arm, "seed": seed, "accuracy": [[0, 0.0], [2, value]], **rates, **more}

    rows = [row("full", 1e-3, 0, 0.5), row("full", 1e-3, 1, 0.25), row("full", 1e-4, 0, 0.9)]
    rows += [
        row("lora", 1e-2, 0, 0.25),
        row("lora", 1e-2, 1, 0.5),
        row("lora", 1e-3, 0, 0.0),
        row("lora", 1e-3, 1, 0.1),
    ]
    said = gap_report.report(json.loads(json.dumps(rows)))
    assert "each at its best rate: +0.250, −0.250, mean +0.000." in said and "0: 0.500, 1: 0.250 | 0.375 |" in said
