"""The whole line of the recipes on a CPU, by their scripts: data, probe, GSPO and SFT in verl, export, evaluation."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("verl", reason="verl is not installed")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from tests.support.verl_processes import ROOT, environment_of  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.ray]

MODEL, SELECTION, STEPS = "qwen2_5_1_5b", "hybrid_lora", 2


class Line:
    """The scripts with the stand-ins, in a folder of their own."""

    def __init__(self, folder):
        self.folder, self.data, self.output = folder, folder / "data", folder / "out"
        self._environment = environment_of(
            TASK="stand_ins", MACHINE="cpu", PYTHON=sys.executable, DATA=str(self.data), OUTPUT=str(self.output)
        )

    def script(self, name, *arguments):
        """What a script prints."""
        done = subprocess.run(
            ["bash", str(ROOT / "recipes" / f"{name}.sh"), *arguments],
            cwd=self.folder, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            stdin=subprocess.DEVNULL, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{name}: exit status {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout

    def run(self, algorithm):
        """A run's folder, once it is trained, exported and evaluated, and what its training printed."""
        said = self.script("run", MODEL, algorithm, SELECTION)
        self.script("export", MODEL, algorithm, SELECTION)
        self.script("evaluate", MODEL, algorithm, SELECTION)
        return self.output / f"stand_ins-{MODEL}-{algorithm}-{SELECTION}", said

    def evaluation(self, algorithm):
        return self.output / "evaluations" / f"stand_ins-{MODEL}-{algorithm}-{SELECTION}"


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    line = Line(tmp_path_factory.mktemp("line"))
    line.script("prepare_data")
    line.script("probe", MODEL, SELECTION)
    return line


@pytest.fixture(scope="module")
def gspo(line):
    return line.run("gspo")


@pytest.fixture(scope="module")
def sft(line):
    return line.run("sft")


def steps_of(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def check_export(line, folder):
    """The best checkpoint as a model whose weights are other ones than before."""
    best = json.loads((folder / "checkpoints" / "best_checkpoint.json").read_text())
    assert best["step"] in range(1, STEPS + 1)
    base = load_file(line.data / "stand_ins" / "model" / "model.safetensors")
    exported = load_file(folder / "exported" / "model.safetensors")
    assert exported.keys() == base.keys()
    assert any(not torch.equal(exported[name].float(), base[name]) for name in base)
    return best


def test_gspo_trains_by_the_rewards_of_the_prepared_rows(line, gspo):
    folder, said = gspo
    steps = [step["data"] for step in steps_of(folder) if step["step"] > 0]
    assert len(steps) == STEPS and "hybrid_lora: best checkpoint" in said
    for step in steps:
        assert step["hybrid_lora/sync_digest_ok"] == 1 and step["training/rollout_probs_diff_max"] < 1e-4
        assert step["critic/advantages/max"] > 0 > step["critic/advantages/min"]
        assert step["actor/update_norm_full"] > 0 and step["actor/update_norm_lora"] > 0
    best = check_export(line, folder)
    assert best["metric"] == "val-core/open-r1/Mixture-of-Thoughts/acc/mean@1"


def test_sft_trains_on_the_prepared_conversations(line, sft):
    folder, _ = sft
    losses = [step["data"]["val/loss"] for step in steps_of(folder) if "val/loss" in step["data"]]
    assert len(losses) == STEPS and losses[1] < losses[0]
    best = check_export(line, folder)
    assert (best["metric"], best["step"]) == ("val/loss", STEPS)


@pytest.mark.parametrize("algorithm", ["gspo", "sft"])
def test_an_export_is_evaluated_on_every_problem(algorithm, line, request):
    request.getfixturevalue(algorithm)
    results = json.loads((line.evaluation(algorithm) / "results.json").read_text())["results"]
    assert set(results) == {"math500", "gsm8k"}
    assert all(result["counts"]["responses"] == result["problems"] == 4 for result in results.values())


def test_two_evaluations_are_compared(line, gspo, sft, capsys):
    from hybrid_lora_plugin.cli.eval import main

    both = ",".join(str(line.evaluation(algorithm)) for algorithm in ("gspo", "sft"))
    assert main([f"compare=[{both}]"]) == 0
    assert "gspo hybrid_lora" in capsys.readouterr().out
