"""``hybrid-lora-trial``: rounds of a verl command, with a program in verl's place that writes what verl writes."""

from __future__ import annotations

import json
import re
import sys

import pytest

from hybrid_lora_plugin import load_allocation
from hybrid_lora_plugin.cli.probe import main as probe
from hybrid_lora_plugin.cli.trial import main
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.trial_runs import scores_of

#: It resumes from its own checkpoint, as verl does, and refuses a step that it has taken: what it trains is a count.
PROGRAM = """
import json, os, pathlib, sys
given = dict(word.partition("=")[::2] for word in sys.argv[1:])
folder = pathlib.Path(given["trainer.default_local_dir"])
folder.mkdir(parents=True, exist_ok=True)
kept, end = folder / "latest_checkpointed_iteration.txt", int(given["trainer.total_training_steps"])
step = int(kept.read_text()) if kept.exists() else 0
name = pathlib.Path(given["hybrid_lora.allocation"]).name
only = given.get("trainer.val_only") == given["trainer.val_before_train"] == "true"
assert only == (step == end), "nothing is left to train, and it would end without a validation"
with open(given["log"], "a") as log:
    log.write(f"{name} {step} {end}\\n")
if given.get("late") == f"{name}@{end}" and not only:
    kept.write_text(str(end))
    sys.exit("killed while it validated")
if given.get("fail") == f"{name}@{end}" and not pathlib.Path(given["log"] + ".mended").exists():
    sys.exit("no GPU left")
quality = {"a": 0.5, "b": 0.501, "c": 0.1}[name] + end / 1000
dump = pathlib.Path(given["trainer.validation_data_dir"])
dump.mkdir(parents=True, exist_ok=True)
with open(dump / f"{end}.jsonl", "w") as file:
    for prompt in range(40):
        for answer in range(2):
            noise = ((prompt * 7 + len(name) * 3 + ord(name) * prompt) % 11 - 5) / 100
            row = {"input": f"prompt {prompt}", "gts": str(prompt), "output": "x", "step": end}
            file.write(json.dumps(row | {"score": quality + noise + answer / 10, "uid": "u"}) + "\\n")
assert given["trainer.resume_mode"] == "auto" and given["trainer.save_freq"] == str(end)
assert os.environ["VERL_FILE_LOGGER_PATH"].endswith(f"metrics_{end}.jsonl")
kept.write_text(str(end))
"""


@pytest.fixture(scope="module")
def folders(tiny_qwen2, tmp_path_factory):
    root = tmp_path_factory.mktemp("allocations")
    for name, kind in zip("abc", ("up_proj", "o_proj", "q_proj"), strict=True):
        rule = ["criterion=spread", f"control.type={kind}", "lora.rank=2", "budget.ratio=0.3", "budget.overflow=skip"]
        assert probe([f"model.path={tiny_qwen2}", f"output_dir={root / name}", *rule]) == 0
    return root


@pytest.fixture
def trial(folders, tmp_path, capsys):
    (tmp_path / "verl.py").write_text(PROGRAM)

    def run(*more, options=(), names="abc", status=0):
        allocations = f"[{','.join(str(folders / name) for name in names)}]"
        command = [sys.executable, str(tmp_path / "verl.py"), f"log={tmp_path / 'log'}", *more]
        own = [f"allocations={allocations}", f"output_dir={tmp_path / 'out'}", "steps=4", "rounds=2", *options]
        capsys.readouterr()
        assert main([*own, "--", *command]) == status
        return capsys.readouterr()

    run.log = lambda: (tmp_path / "log").read_text().splitlines()
    run.folder = tmp_path
    return run


def test_the_worse_ones_are_dropped_and_the_others_resumed_and_the_result_is_an_allocation(trial, folders):
    said = trial("trainer.total_training_steps=200").out
    assert trial.log() == ["a 0 4", "b 0 4", "c 0 4", "a 4 8", "b 4 8"]
    first = said.splitlines()[0]
    assert "3 allocations, 2 round(s) to 4, 8 steps with 3, 2 of them: 20 training steps" in first
    assert "10 % of the 200 steps of your run, 5 starts" in first
    assert load_allocation(trial.folder / "out") == load_allocation(folders / "a")
    record = json.loads((trial.folder / "out" / "trial.json").read_text())
    assert record["chosen"] == "a" and record["alike"] == ["a", "b"] and record["prompts"] == 40
    assert [one["dropped"] for one in record["candidates"]] == [0, 0, 1]
    assert "trainer.total_training_steps=200" not in record["command"] and "+hybrid_lora=enabled" in record["command"]
    assert "data.seed=1" in record["command"] and "trial: data.seed=1, so that all runs have one order" in said
    worst = record["candidates"][2]["difference"]
    assert worst["high"] < -0.3 and len(record["candidates"][2]["scores"]) == 1
    assert "Not distinguished: after 8 steps 40 validation prompts cannot tell a and b apart; a is used" in said
    page = (trial.folder / "out" / "trial.md").read_text()
    assert page.count("| round 1 |") == 1 and page.count("| used |") == 1
    assert not (trial.folder / "out.partial").exists()


def test_what_is_done_is_not_run_again_and_another_trial_is_not_continued(trial):
    said = trial("fail=b@8", status=2)
    assert "the run of b ended with status 1" in said.err and "no GPU left" in said.err and "log_8.txt" in said.err
    assert trial.log() == ["a 0 4", "b 0 4", "c 0 4", "a 4 8", "b 4 8"]
    assert "steps: " in trial("fail=b@8", options=["steps=5"], status=2).err
    (trial.folder / "log.mended").touch()
    trial("fail=b@8")
    assert trial.log()[5:] == ["b 4 8"]
    assert (trial.folder / "out" / "allocation.json").exists()
    assert "holds an allocation already" in trial("fail=b@8", status=2).err


def test_a_clear_winner_is_one(trial):
    said = trial("data.seed=7", names="ac").out
    assert "data.seed=1" not in said
    assert "After 8 steps a has the highest score on 40 validation prompts" in said


def test_a_run_that_ended_behind_its_last_checkpoint_is_validated_alone(trial):
    assert "killed while it validated" in trial("late=b@8", status=2).err
    trial("late=b@8")
    assert trial.log()[4:] == ["b 4 8", "b 8 8"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": "aa"}, "all of them tune the same modules"),
        ({"options": ["score=uid"]}, "score: 'uid' is no number in .*give one of score"),
        ({"options": ["rounds=0"]}, "rounds: 0 is not usable"),
    ],
)
def test_what_cannot_be_compared_is_named(trial, change, words):
    assert re.search(words, trial(**change, status=2).err)


def test_scores_are_means_over_answers_by_prompt_and_ground_truth(tmp_path):
    rows = [("p", "1", 1.0), ("p", "1", 0.0), ("p", "2", 1.0), ("q", "1", "0.25")]
    file = tmp_path / "4.jsonl"
    file.write_text("".join(json.dumps({"input": i, "gts": g, "acc": a}) + "\n" for i, g, a in rows))
    assert sorted(scores_of(file, "acc").values()) == [0.25, 0.5, 1.0]
    with pytest.raises(ConfigurationError, match="verl wrote no"):
        scores_of(tmp_path / "8.jsonl", "acc")
    with pytest.raises(ConfigurationError, match="score: 'score' is no number"):
        scores_of(file, "score")


def test_a_command_is_wanted_behind_two_dashes(folders, tmp_path, capsys):
    own = [f"allocations=[{folders / 'a'},{folders / 'b'}]", f"output_dir={tmp_path / 'out'}"]
    assert main(own) == 2
    assert "no command behind --" in capsys.readouterr().err
