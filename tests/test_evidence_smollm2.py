"""The protocol of recipes/evidence/smollm2.py, on a tiny model in its place: what is trained and checked."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.matching import trainable_parameters
from hybrid_lora_plugin.evidence.protocol import Arm, Choice, Run, Start
from recipes.evidence.smollm2 import TASKS, SmolLm2Protocol, right

START = Start("tiny", "base_seven", 7)


def protocol(path, **changes):
    settings = {
        "path": str(path), "batch_size": 4, "held_out": 8, "generated": 4, "new_tokens": 3, "eval_every": 2,
        "probe": {"warmup_steps": 3, "partitions": 2, "batch_size": 4, "lr": 1e-3},
    }  # fmt: skip
    made = SmolLm2Protocol(settings | changes, Path("unused"), "cpu", ["tiny"], ["base_seven"])
    made.prepare(lambda line: None)
    return made


def test_answers_are_what_the_questions_ask_for():
    generator = random.Random(0)
    for _ in range(200):
        question, answer = TASKS["base_seven"](generator)
        a, b = (int(digits, 7) for digits in re.findall(r"\d+", question.partition(",")[2]))
        assert int(answer, 7) == a + b
    assert right("it is 12, no: 15", "15") and right("7 + 8 = 15.", "so 15.")
    assert not right("15 or 16", "15") and not right("fifteen", "15")


def test_each_arm_trains_its_modules_alone_and_the_same_run_gives_the_same_bits(tiny_qwen2):
    ours, seen = protocol(tiny_qwen2), {}
    names = [one.name for one in ours.candidates("tiny")]
    attention, mlp = (tuple(name for name in names if part in name) for part in ("self_attn", "mlp"))
    choices = {
        "hybrid": Choice(tuple(names[:2]), 2), "lora": Choice((), 2), "dora": Choice((), 2, dora=True),
        "full": Choice(tuple(names), 0), "lora:mlp": Choice((), 2, frozen=attention),
        "hybrid:mlp": Choice((mlp[0],), 2, frozen=attention), "full:mlp": Choice(mlp, 0, frozen=attention),
    }  # fmt: skip
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    runs = [Run(arm, START, choice, 1e-3, 1e-2, 4) for arm, choice in choices.items()]
    ours.train(runs, lambda run, outcome: seen.__setitem__(run.arm, outcome))
    for arm, outcome in seen.items():
        choice, steps, values = choices[arm], *zip(*outcome.curve, strict=True)
        assert steps == (0, 2, 4) and values[0] == seen["full"].curve[0][1] and values[-1] < values[0], arm
        assert not outcome.diverged and 0 <= outcome.measures["exact_match"] <= 1
        counted = trainable_parameters(ours.candidates("tiny"), choice.full, choice.rank, choice.frozen)
        assert outcome.trainable_parameters == counted or choice.dora and outcome.trainable_parameters > counted
    assert seen["lora:mlp"].trainable_parameters < seen["lora"].trainable_parameters
    for name in ("lora:mlp", "hybrid:mlp"):
        model, _ = ours._trained_model(choices[name], 7)
        adapted = {one.partition(".lora_A")[0].removeprefix("base_model.model.") for one, _ in model.named_parameters()
                   if "lora_A" in one}  # fmt: skip
        assert adapted == {*mlp} - {*choices[name].full}
    weights = sum(parameter.numel() for parameter in ours.model.parameters())
    assert seen["full"].flops > seen["hybrid"].flops > seen["lora"].flops
    tokens = seen["lora"].flops / (4 * weights + 2 * seen["lora"].trainable_parameters)
    assert tokens == int(tokens) > 0
    assert all(torch.equal(value, before[name]) for name, value in ours.model.state_dict().items())
    again = {}
    protocol(tiny_qwen2).train(runs[:1], lambda run, outcome: again.__setitem__(run.arm, outcome))
    assert again["hybrid"] == seen["hybrid"]


def test_arms_of_a_start_begin_with_the_same_adapters_and_see_the_same_rows(tiny_qwen2):
    ours = protocol(tiny_qwen2)
    names = [one.name for one in ours.candidates("tiny")]
    factors = []
    for full in ((), (names[0],)):
        model, trained = ours._trained_model(Choice(full, 2), 7)
        assert len(trained["full"]) == (2 if full else 0)  # a weight and a bias
        factors.append({name: value for name, value in model.named_parameters() if "lora_A" in name})
    both = factors[0].keys() & factors[1].keys()
    assert len(both) == len(names) - 1 and all(torch.equal(factors[0][name], factors[1][name]) for name in both)
    held_out = set(ours._held_out_problems("base_seven"))
    drawn = ours._problems("base_seven", "train/7", 100)
    assert not held_out & set(drawn) and drawn == ours._problems("base_seven", "train/7", 100)
    assert drawn != ours._problems("base_seven", "train/8", 100)


def test_modules_are_chosen_by_a_probe_of_the_start(tiny_qwen2):
    ours = protocol(tiny_qwen2)
    arms = [
        Arm(name, "hybrid", {"criterion": name, "budget.ratio": 0.3, "budget.overflow": "skip"}, rank=2)
        for name in ("hybrid", "gradient_norm", "random")
    ]
    chosen, names = ours.choose(START, arms), {one.name for one in ours.candidates("tiny")}
    assert set(chosen) == {"hybrid", "gradient_norm", "random"}
    assert all(full and set(full) < names for full in chosen.values())


def test_what_cannot_work_is_named(tiny_qwen2, tmp_path):
    with pytest.raises(ConfigurationError, match=r"settings.path: no model in .+`python -m recipes.evidence.smollm2 "):
        protocol(tmp_path)
    with pytest.raises(ConfigurationError, match="tasks: 'sorting' is unknown; give some of word_problems"):
        SmolLm2Protocol({"path": str(tiny_qwen2)}, tmp_path, "cpu", ["tiny"], ["sorting"])
    with pytest.raises(ConfigurationError, match="bases: .+ are 2"):
        SmolLm2Protocol({"path": str(tiny_qwen2)}, tmp_path, "cpu", ["tiny", "other"], ["base_seven"])
