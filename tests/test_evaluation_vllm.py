"""``hybrid-lora-eval`` with the real vLLM on the CPU: an adapter with full weights, interrupted, then compared."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.support.benchmark_rows import ROWS
from tests.support.hybrid_checkpoint import make_hybrid_checkpoint
from tests.support.tiny_models import make_tiny_qwen2, write_jsonl
from tests.support.verl_processes import ROOT, environment_of

pytestmark = pytest.mark.verl
SAMPLED = 8
LONGEST = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Exports of one hybrid checkpoint, data in the sets' columns, and the folder of a run that was interrupted."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from hybrid_lora_plugin.training.export import export_checkpoint

    root = tmp_path_factory.mktemp("evaluation")
    # vLLM's CPU attention takes heads of 32.
    base = make_tiny_qwen2(
        root / "base", hidden=64, heads=2, kv_heads=1, max_position_embeddings=2048, tie_word_embeddings=False
    )
    actor = make_hybrid_checkpoint(base, root)
    for form in ("merged", "adapter"):
        export_checkpoint(actor, root / form, dtype="float32", format=form)
    for name in ("gsm8k", "mmlu_pro"):
        write_jsonl(root / f"{name}.jsonl", [ROWS[name]])
    write_jsonl(root / "aime25.jsonl", [ROWS["aime25"], {"problem": "long " * 200, "answer": "1", "id": "long"}])
    command = [sys.executable, "-m", "tests.support.evaluation_worker", str(root / "seen.json"), "3"]
    done = subprocess.run(
        [*command, *arguments_of(root)], cwd=ROOT, env=environment_of(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done, json.loads((root / "seen.json").read_text())


def arguments_of(root, **changes):
    options = {
        "model": root / "adapter",
        "output_dir": root / "run",
        "benchmarks": "[aime25,gsm8k,mmlu_pro]",
        "repeats": 2,
        "max_response_length": LONGEST,
        "max_prompt_length": 700,
        "sampling.temperature": 0,
        "engine.dtype": "float32",
        "engine.enforce_eager": "true",
        "engine.max_num_seqs": 2,
    } | {f"data.{name}": root / f"{name}.jsonl" for name in ("aime25", "gsm8k", "mmlu_pro")}
    return [f"{name}={value}" for name, value in (options | changes).items()]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_interruption_keeps_what_had_come_and_the_same_command_goes_on(place):
    root, done, seen = place
    assert (seen["interrupted"], seen["again"]) == (143, 0)
    assert 3 <= seen["kept"] < seen["whole"] == 2 * SAMPLED + 4
    assert "interrupted; what is in" in done.stderr and "Traceback" not in done.stderr
    # The copy of the base model with the full weights is there while it is needed, and then no more.
    assert ".model" not in seen["left"] and not (root / "run" / ".model").exists()
    asked = [one for one in lines(root / "run" / "responses" / "aime25.jsonl") if one["identity"] != "long"]
    assert len({(one["identity"], one["sample"]) for one in asked}) == SAMPLED


def test_vllm_serves_the_adapter_on_the_full_weights_which_is_the_merged_model(place):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hybrid_lora_plugin.evaluation.problems import PromptTokens, read_problems

    root, _, _ = place
    tokenizer = AutoTokenizer.from_pretrained(root / "merged")

    def load(name):
        return AutoModelForCausalLM.from_pretrained(root / name)

    without_adapter = load("base")
    without_adapter.load_state_dict(load_file(root / "adapter" / "full_weights.safetensors"), strict=False)
    models = [load("merged"), load("base"), PeftModel.from_pretrained(load("base"), root / "adapter"), without_adapter]
    served, texts = [], [[] for _ in models]
    for name in ("gsm8k", "mmlu_pro", "aime25"):
        problem = read_problems(name, [str(root / f"{name}.jsonl")])[0]
        prompt = torch.tensor([PromptTokens(tokenizer, "cot")(problem)])
        response = next(
            one
            for one in lines(root / "run" / "responses" / f"{name}.jsonl")
            if one["identity"] == problem.identity and one["sample"] == 0
        )
        assert response["prompt_tokens"] == prompt.shape[1]
        served.append(response["text"])
        for model, said in zip(models, texts, strict=True):
            ids = model.generate(input_ids=prompt, max_new_tokens=LONGEST, do_sample=False, pad_token_id=0)
            said.append(tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True))
    merged, *others = texts
    assert served == merged and served not in others


def test_what_was_cut_not_asked_and_without_an_answer_is_counted(place):
    root, _, _ = place
    results = json.loads((root / "run" / "results.json").read_text())["results"]
    assert results["aime25"]["counts"] == {
        "responses": 2 * SAMPLED, "correct": 0, "unparsed": SAMPLED, "timed_out": 0, "cut": SAMPLED,
        "not_asked": SAMPLED,
    }  # fmt: skip
    assert results["gsm8k"]["tokens"] == LONGEST and results["aime25"]["of"] == 2
    assert (root / "run" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "adapter" in (root / "run" / "results.md").read_text()


def test_another_setting_is_refused_by_name_before_an_engine_starts(place, capsys):
    from hybrid_lora_plugin.cli.eval import main

    root, _, _ = place
    for change, says in (
        ({"sampling.temperature": 1}, "sampling: "),
        ({"model": root / "merged"}, "model: "),
        ({"repeats": 3}, "repeats of aime25: 3"),
        ({"prompt": "io"}, 'prompt: "io"'),
        ({"max_response_length": 25}, "max_response_length: 25"),
        ({"limit": 1}, "problems of aime25: "),
    ):
        assert main(arguments_of(root, **change)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("hybrid-lora-eval: ") and says in line and "another output_dir" in line


def test_a_finished_run_starts_no_engine_is_judged_again_and_compared(place, capsys, monkeypatch):
    from hybrid_lora_plugin.cli.eval import main
    from hybrid_lora_plugin.verl_backend.generation import Generator

    root, _, _ = place
    before = (root / "run" / "results.json").read_text()
    monkeypatch.setattr(Generator, "_start", lambda generator: pytest.fail("an engine starts"))
    assert main(arguments_of(root)) == 0
    assert (root / "run" / "results.json").read_text() == before
    file = root / "run" / "judgements" / "gsm8k.jsonl"
    file.write_text(file.read_text().replace('"correct": false', '"correct": true'))
    capsys.readouterr()
    assert main([f"rescore={root / 'run'}"]) == 0
    assert "GSM8K: 2 responses judged; 0 are right now and 2 no longer" in capsys.readouterr().out
    assert (root / "run" / "results.json").read_text() == before
    assert main([f"compare=[{root / 'run'},{root / 'run'}]", f"output_dir={root / 'compared'}"]) == 0
    assert "the same on every problem" in capsys.readouterr().out
    assert {path.suffix for path in (root / "compared").iterdir()} == {".json", ".md", ".png"}
    assert main([f"compare=[{root / 'run'},{root / 'run'}]", f"output_dir={root / 'compared'}"]) == 2
    assert "give a new folder" in capsys.readouterr().err
