"""The shifted sums and the search for a gap: right answers, rewards by digit, and what each arm of a run trains."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from hybrid_lora_plugin.candidates import find_candidates
from recipes.demo import shifted_sums, task
from recipes.evidence import gap_search
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
    trained = shifted_sums.train_base(steps=4, clean_steps=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shifted_sums, "train_base", lambda seed, quiet: trained)
        return shifted_sums.write(tmp_path_factory.mktemp("sums") / "shifted")


def test_a_reward_counts_digits_in_place_and_nothing_for_another_length(reward):
    for answer, score in (("19", 1.0), ("19<|im_end|>07", 1.0), (" 19 ", 1.0), ("18", 0.5), ("91", 0.0), ("1", 0.0)):
        assert reward("", answer, "19") == {"score": score, "acc": float(score == 1.0)}, answer
    assert reward("", "190", "19")["score"] == reward("", None, "19")["score"] == 0.0


def test_every_task_moves_each_answer_and_keeps_its_width():
    for name, answer in gap_search.TASKS.items():
        answers = [answer(problem) for problem in task.pool("train")]
        assert all(len(one) == 2 and one.isdigit() for one in answers), name
        moved = sum(one != problem.answer for one, problem in zip(answers, task.pool("train"), strict=True))
        assert moved > 0.85 * len(answers), name
    assert gap_search.TASKS["shifted"](task.Problem(37, 45)) == "19"


def test_rows_hold_the_shifted_answers_and_share_no_problem(folder):
    pandas = pytest.importorskip("pandas")
    train, validation = (pandas.read_parquet(folder / f"{split}.parquet") for split in task.SPLITS)
    assert (len(train), len(validation)) == (shifted_sums.TRAIN_ROWS, shifted_sums.VALIDATION_ROWS)
    asked = [{tuple(row)[0]["content"] for row in rows["prompt"]} for rows in (train, validation)]
    assert not asked[0] & asked[1]
    for row in validation.to_dict("records"):
        left, right = row["prompt"][0]["content"].rstrip("=").split("+")
        assert int(row["reward_model"]["ground_truth"]) == (int(left) + int(right) + 37) % 100
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert shifted_sums.write(folder) == folder
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_ratio_is_that_of_the_mean_log_probability_and_leaves_padding_out():
    new, old = torch.log(torch.tensor([[0.5, 0.2, 0.9]])), torch.log(torch.tensor([[0.25, 0.4, 0.1]]))
    ratios = gap_search.sequence_ratios(new, old, torch.tensor([[1.0, 1.0, 0.0]]))
    assert ratios.item() == pytest.approx(math.exp((math.log(2) - math.log(2)) / 2))


def test_each_arm_of_a_run_trains_its_own_weights_and_the_same_run_gives_the_same_curve(folder):
    def run(arm, **changes):
        settings = {"arm": arm, "rank": 1, "full": [], "full_lr": 1e-3, "lora_lr": 1e-2, "steps": 2, "seed": 3}
        return gap_search.run(folder, "shifted", eval_every=1, **(settings | changes))

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
