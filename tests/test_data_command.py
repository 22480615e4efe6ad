"""``hybrid-lora-data`` as a user types it: what it says, refuses and leaves, and that verl loads what it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hybrid_lora_plugin.cli.data import main
from tests.support.hub_server import COMMIT, hub_of
from tests.support.mixture_rows import sums, write_lines, write_parquet
from tests.support.verl_processes import ROOT

ONLINE = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}


@pytest.fixture
def source(tmp_path):
    return write_parquet(tmp_path / "math.parquet", sums(60))


def arguments(source, folder, *more):
    given = [
        "set=mixture_of_thoughts",
        "configs=[math]",
        "decontaminate=[]",
        f"source={source}",
        f"output_dir={folder}",
    ]
    return [*given, *more]


def test_it_says_what_was_read_dropped_and_written(source, tmp_path, capsys):
    write_parquet(source, [*sums(60), *sums(5)])
    assert main(arguments(source, tmp_path / "out", "validation=0.2", "format=sft")) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["65 rows read", "  5 dropped: a question that was there before"]
    assert out[2].startswith("NOT decontaminated")
    assert out[3].startswith(f"{tmp_path}/out/train.parquet: ") and out[-1].startswith("next: hybrid-lora-probe ")
    assert main(arguments(source, tmp_path / "out")) == 2
    assert "out is there already; give a new folder, or remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, message",
    [
        (["set=gsm8k", "configs=[math]"], "configs: has no effect with set=gsm8k; leave it out"),
        (["set=gsm8k", "code_tests=x"], "code_tests: has no effect with set=gsm8k; leave it out"),
        (["set=math500", "validation=0.1"], "validation: has no effect with set=math500, which is only evaluated"),
        (["set=gpqa", "decontaminate=[]"], "decontaminate: has no effect with set=gpqa, which is only evaluated"),
        (["set=gsm8k", "decontaminate=[]", "ngram=9"], "ngram: has no effect with decontaminate=[]; leave it out"),
        (["set=gsm"], "set: 'gsm' is not supported; choose one of"),
        (["set=mixture_of_thoughts", "configs=[maths]"], "configs: ['maths'] is not usable; give parts such as"),
        (["set=mixture_of_thoughts", "configs=[all,math]"], "configs: ['all', 'math'] is not usable"),
        (["set=mixture_of_thoughts", "format=sft", "code_tests=x"], "code_tests: has no effect with format=sft"),
        (["set=mixture_of_thoughts", "format=sft", "prompt=io"], "prompt: has no effect on conversations"),
        (["set=gsm8k", "format=sft", "evaluation=[gsm8k]"], "evaluation: is written for reinforcement learning"),
        (["set=gsm8k", "validation=1"], "validation: 1.0 is not usable; give a share in [0, 1), e.g. 0.005"),
        (["set=gsm8k", "ngram=3"], "ngram: 3 is not usable; give at least 4 words"),
        (["set=gsm8k", "limit=0"], "limit: 0 is not usable; give at least 1 row"),
        (["set=gsm8k", "decontaminate=[gsm]", "source=SOURCE"], "decontaminate: 'gsm' is no evaluation set; give one"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(given, message, source, tmp_path, capsys):
    given = [each.replace("SOURCE", str(source)) for each in given]
    assert main([*given, f"output_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["math.parquet"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_done_and_the_same_command_goes_on(tmp_path, signum):
    source = write_parquet(tmp_path / "math.parquet", sums(12_000), group=1000)
    words = arguments(source, tmp_path / "out", "validation=0.1", "format=sft")
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrid_lora_plugin.cli.data", *words],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "out.partial" / "00000.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    kept = tmp_path / "out.partial"
    assert process.returncode == 128 + signum and error.count("\n") == 1
    assert error.startswith(f"hybrid-lora-data: interrupted, what is done is kept in {kept}; to continue, run: hybrid-")
    assert not (tmp_path / "out").exists()
    assert main(words) == 0 and main([*words[:-3], f"output_dir={tmp_path / 'whole'}", *words[-2:]]) == 0
    assert not kept.exists()
    whole, again = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "out"))
    assert whole == again


def test_the_hub_is_streamed_at_one_commit_and_goes_on_where_it_was(tmp_path):
    """By the real libraries, from a server on this machine; each in a process, as they read their address once."""
    card = [
        f"- config_name: {part}\n  data_files:\n  - split: train\n    path: {part}/*\n" for part in ("math", "code")
    ]
    for name in ("open-r1/Mixture-of-Thoughts", "open-r1/gated"):
        repository = tmp_path / "hub" / name
        write_parquet(repository / "math" / "train-00000-of-00001.parquet", sums(1500))
        write_parquet(repository / "code" / "train-00000-of-00001.parquet", sums(5))
        (repository / "README.md").write_text(f"---\nconfigs:\n{''.join(card)}---\n")
    words = ["set=mixture_of_thoughts", "configs=[math]", "decontaminate=[]", "format=sft"]
    code = (
        "import os, sys\nfrom hybrid_lora_plugin.cli.data import main\n"
        "from hybrid_lora_plugin.preparation.runner import Watch\n"
        "from hybrid_lora_plugin.cli import data_progress\n"
        "class Dies(Watch):\n"
        "    def rows(self, read, kept, share):\n"
        "        if read == 1200: os._exit(9)\n"
        "if sys.argv[1] == 'dies': data_progress.watch_for = Dies\n"
        f"raise SystemExit(main([*{words!r}, *sys.argv[2:]]))"
    )
    with hub_of(tmp_path / "hub") as address:
        environment = os.environ | ONLINE | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}

        def command(*given):
            command = [sys.executable, "-c", code, *given]
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

        whole, out = (f"output_dir={tmp_path / name}" for name in ("whole", "out"))
        assert command("lives", whole).returncode == 0
        assert command("dies", out).returncode == 9 and (tmp_path / "out.partial" / "00000.json").exists()
        assert command("lives", out).stdout.startswith("1,500 rows read, some of them before an interruption\n")
        gated = command("lives", "source=open-r1/gated/math:train", f"output_dir={tmp_path / 'gated'}")
    assert {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()
    }
    sheet = json.loads((tmp_path / "out" / "datasheet.json").read_text())
    assert sheet["source"]["math"] == [{"name": "open-r1/Mixture-of-Thoughts/math:train", "commit": COMMIT}]
    assert gated.returncode == 2 and gated.stderr.count("\n") == 1, gated.stderr
    assert "accept its conditions on its page and run `hf auth login`, or give a file of it" in gated.stderr


@pytest.mark.verl
def test_verls_own_dataset_loads_the_rows(source, tmp_path, tiny_qwen2):
    """Also files of two sets together, which have the same columns."""
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    from tests.support.benchmark_rows import ROWS

    write_parquet(source, sums(12))
    test = write_lines(tmp_path / "test.jsonl", [ROWS["mmlu_pro"]])
    words = arguments(source, tmp_path / "out", "validation=0.2", f"evaluation=[mmlu_pro={test}]")
    assert main(words) == 0
    files = [str(tmp_path / "out" / name) for name in ("train.parquet", "validation.parquet", "test_mmlu_pro.parquet")]
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    config = OmegaConf.create({"max_prompt_length": 512, "cache_dir": str(tmp_path / "cache"), "return_raw_chat": True})
    rows = RLHFDataset(files, tokenizer, config)
    assert len(rows) == 13
    batch = collate_fn([rows[index] for index in range(13)])
    assert batch["reward_model"][-1] == {"style": "rule", "ground_truth": "B"}
    assert batch["extra_info"][-1]["options_count"] == 3 and batch["data_source"][-1] == "TIGER-Lab/MMLU-Pro"
    assert batch["raw_prompt"][0][0]["content"].startswith("Ada has 0 marbles")
    sheet = json.loads((tmp_path / "out" / "datasheet.json").read_text())
    assert [file["rows"] for file in sheet["files"]] == [1, 12 - len(rows_held_out(sheet)), len(rows_held_out(sheet))]


def rows_held_out(sheet):
    return range(sheet["total"]["kept"].get("validation", 0))
