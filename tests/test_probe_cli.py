"""The command: help, argument errors, exit statuses, and a message that leads on."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest

from hybrid_lora_plugin.cli import probe as command
from hybrid_lora_plugin.cli.arguments import help_text, options, parse
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.config_field import documented
from hybrid_lora_plugin.errors import UsageError
from hybrid_lora_plugin.probing import prepare, stages


def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = command.main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def write_rows(file, rows=40):
    file.write_text("".join(json.dumps({"prompt": f"{i}+1=", "response": str(i + 1)}) + "\n" for i in range(rows)))
    return file


@pytest.fixture
def arguments(tiny_qwen2, tmp_path):
    values = {
        "model.path": tiny_qwen2,
        "probe.files": write_rows(tmp_path / "rows.jsonl"),
        "output_dir": tmp_path / "out",
        "probe.warmup_steps": 4,
        "probe.partitions": 3,
        "probe.batch_size": 2,
        "probe.max_length": 64,
        "lora.rank": 2,
        "probe.lr": 0.005,
        "budget.ratio": 0.3,
    }

    def make(**changes):
        changed = values | {name.replace("__", "."): value for name, value in changes.items()}
        return [f"{name}={value}" for name, value in changed.items() if value is not None]

    return make


def test_success_prints_folder_budget_number_of_modules_and_the_next_command(arguments, tmp_path):
    status, out, err = run(*arguments())
    assert status == 0
    allocation = json.loads((tmp_path / "out" / "allocation.json").read_text())
    full = sum(module["assignment"] == "full" for module in allocation["modules"])
    assert f"allocation written to {tmp_path / 'out'}" in out
    assert f"= {allocation['budget']['limit']:,}; used {allocation['budget']['used']:,}" in out
    assert f"full fine-tuning: {full} of 14 modules" in out
    assert f"+hybrid_lora=enabled hybrid_lora.allocation={tmp_path / 'out'}" in out
    assert "warm-up 1/4" in err and "ETA" in err


def test_help_explains_every_option_with_default_unit_choices_and_source():
    status, out, _ = run("--help")
    assert status == 0
    flat = " ".join(out.split())
    for name, _, spec in options(ProbeCommandConfig):
        assert f"\n  {name}=" in out
        assert " ".join(spec.metadata["help"].split()) in flat
        assert spec.metadata["source"] in flat
        assert not spec.metadata["unit"] or f"Unit: {spec.metadata['unit']}." in flat
        assert not spec.metadata["choices"] or f"Choices: {', '.join(spec.metadata['choices'])}." in flat
    assert "probe.warmup_steps=500" in out and "output_dir=null" in out


@pytest.mark.parametrize(
    "argument, message",
    [
        ("probe.warmup_step=3", "unknown option 'probe.warmup_step'; did you mean 'probe.warmup_steps'?"),
        ("warmup_steps=3", "unknown option 'warmup_steps'; did you mean 'probe.warmup_steps'?"),
        ("--output_dir=x", "unknown option '--output_dir'; did you mean 'output_dir'?"),
        ("zzzzqqqq=1", "unknown option 'zzzzqqqq' (--help lists all)"),
        ("probe=3", "unknown option 'probe'"),
        ("probe.files.0=a", "unknown option 'probe.files.0'; did you mean 'probe.files'?"),
        ("output_dir", "output_dir: no value; write output_dir=VALUE"),
        ("probe.lr=fast", "probe.lr: 'fast' is not usable; give a number"),
        ("probe.seed=1.5", "probe.seed: '1.5' is not usable; give a whole number"),
        ("model.trust_remote_code=perhaps", "give true or false"),
        ("probe.files=[a", "probe.files: '[a' cannot be read; give a list"),
        ("budget.ratio=0", "budget.ratio: 0.0 is not usable; give a fraction"),
        ("budget.ratio=1.5", "budget.ratio: 1.5 is not usable"),
        ("criterion=hybird", "criterion: 'hybird' is not supported; choose one of hybrid"),
        ("direction=up", "choose one of auto, lowest, highest"),
        ("probe.partitions=1", "probe.partitions: 1 is not usable; give at least 2"),
        ("model.dtype=float16", "choose one of auto, float32, bfloat16"),
    ],
)
def test_a_mistaken_argument_gives_one_line_and_status_2(arguments, argument, message):
    status, out, err = run(*arguments(), argument)
    assert status == 2 and out == ""
    assert err.startswith("hybrid-lora-probe: ") and err.count("\n") == 1
    assert message in err


def test_what_must_be_given_is_asked_for(arguments):
    for name in ("model.path", "output_dir", "probe.files"):
        status, _, err = run(*arguments(**{name.replace(".", "__"): None}))
        assert (
            status == 2 and err.startswith(f"hybrid-lora-probe: {name}: n") and "give" in err and err.count("\n") == 1
        )


BAD_DATA = {
    "missing file": (None, "is not a file"),
    "empty file": ("", "is empty"),
    "row without response": ('{"prompt": "a"}\n', "row 1 of"),
    "not JSON": ("{\n", "row 1 of"),
    "too few rows": (
        '{"prompt": "a", "response": "b"}\n',
        "1 usable rows (0 more do not fit probe.max_length), but 8 are needed",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_give_one_line_and_status_2(arguments, tmp_path, case):
    text, message = BAD_DATA[case]
    file = tmp_path / "bad.jsonl"
    if text is not None:
        file.write_text(text)
    status, _, err = run(*arguments(probe__files=file))
    assert status == 2 and err.startswith("hybrid-lora-probe: probe.files: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(probe__max_length=5), "probe.max_length: 5 tokens cut away the response of all 40 rows"),
        (dict(probe__warmup_steps=0), "probe.warmup_steps: max|B| is 0"),
        (dict(budget__ratio=0.0001), "nothing would be fully fine-tuned; give at least"),
        (dict(probe__lr=1e30), "probe.lr: "),
    ],
    ids=["max_length", "no warm-up", "budget", "diverged"],
)
def test_settings_that_lead_nowhere_give_a_last_line_that_says_so_and_status_2(arguments, changes, message):
    status, out, err = run(*arguments(**changes))
    assert status == 2 and out == ""
    assert err.splitlines()[-1].startswith("hybrid-lora-probe: ") and message in err.splitlines()[-1]


def test_a_model_that_cannot_be_loaded_gives_one_line_and_status_2(arguments, tmp_path):
    (tmp_path / "nothing").mkdir()
    status, _, err = run(*arguments(model__path=tmp_path / "nothing"))
    assert status == 2 and err.startswith("hybrid-lora-probe: model: ") and "has no config.json" in err


def test_a_dry_run_shows_a_row_with_its_trained_tokens_and_the_counts_and_writes_nothing(arguments, tmp_path):
    """With the tokenizer and the model's config alone: its weights are gone."""
    (model,) = [argument.removeprefix("model.path=") for argument in arguments() if argument.startswith("model.path=")]
    folder = tmp_path / "without weights"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    line = arguments(model__path=folder, output_dir=None, probe__dry_run="true", probe__max_length=28)
    before = sorted(tmp_path.iterdir())
    status, out, err = run(*line)
    assert (status, err) == (0, "") and sorted(tmp_path.iterdir()) == before
    row = re.search(r"user\s*(\d+)\+1=<\|im_end\|>\s*<\|im_start\|>assistant\s*>>>(\d+)<\|im_end\|><<<", out)
    assert int(row[2]) == int(row[1]) + 1
    assert "40 rows: 6 held out, 8 for the warm-up" in out
    status, _, err = run(*line, "probe.files=none.jsonl")
    assert status == 2 and err.count("\n") == 1 and "is not a file or folder" in err


def test_what_is_cut_is_in_progress_report_and_artifact(arguments, tmp_path):
    rows = [{"prompt": f"{i}+1=", "response": "x" * 40, "source": "s"} for i in range(40)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, err = run(*arguments(probe__files=tmp_path / "long.jsonl", probe__max_length=40))
    assert status == 0
    told = json.loads((tmp_path / "out" / "allocation.json").read_text())["probe"]["data"]["told"]
    assert any("14 rows cut at probe.max_length=40" in sentence for sentence in told)
    assert "columns that nothing reads: source" in told
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(sentence in err and f"| rows | {sentence} |" in report for sentence in told)


def dated(model, folder):
    """A copy of a model whose template prints the day."""
    shutil.copytree(model, folder)
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}\n" + template.read_text())
    return folder


def test_a_day_later_an_unfinished_probe_continues_and_a_new_one_says_so(arguments, tiny_qwen2, tmp_path, monkeypatch):
    days = iter((date(2026, 7, 26), date(2026, 7, 27), date(2026, 7, 28)))

    class Today(date):
        @classmethod
        def today(cls):
            return next(days)

    monkeypatch.setattr(prepare, "date", Today)
    line = arguments(model__path=dated(tiny_qwen2, tmp_path / "dated"))
    with monkeypatch.context() as stopped:
        stopped.setattr(stages.Probe, "_score", lambda self, stop: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert run(*line)[0] == 130
    status, _, err = run(*line)
    assert status == 0 and "prints the date: 2026-07-26" in err
    artifact = json.loads((tmp_path / "out" / "allocation.json").read_text())
    assert artifact["probe"]["data"]["date"] == "2026-07-26"

    def tokens_of(*more):
        line = arguments(model__path=tmp_path / "dated", output_dir=tmp_path / "again")
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        status, _, err = run(*line, *more)
        assert status == 0
        data = json.loads((tmp_path / "again" / "allocation.json").read_text())["probe"]["data"]
        return data["tokens_sha256"], err

    first = artifact["probe"]["data"]["tokens_sha256"]
    assert tokens_of("probe.date=2026-07-26")[0] == first
    later, err = tokens_of()
    assert later != first and "prints the date: 2026-07-27" in err
    status, _, err = run(*arguments(), "probe.date=tomorrow")
    assert status == 2 and "probe.date: 'tomorrow' is not usable; give a day such as 2026-07-26, or null" in err


def test_an_existing_artifact_is_not_overwritten(arguments):
    assert run(*arguments())[0] == 0
    status, _, err = run(*arguments())
    assert (
        status == 2 and "holds an allocation already; give another folder or delete it" in err and err.count("\n") == 1
    )


def test_ctrl_c_keeps_the_state_says_how_to_resume_and_the_same_command_continues(arguments, tmp_path):
    """A real process and a real signal."""
    line = [sys.executable, "-m", "hybrid_lora_plugin.cli.probe", *arguments(probe__warmup_steps=3000)]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = []
    for text in process.stderr:
        seen.append(text)
        if text.startswith("warm-up"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(seen) + rest
    last = rest.splitlines()[-1]
    assert (
        last.startswith("hybrid-lora-probe: interrupted, state kept in")
        and "to continue, run: hybrid-lora-probe model.path=" in last
    )
    assert (tmp_path / "out.partial" / "warmup.safetensors").exists() and not (tmp_path / "out").exists()
    status, _, err = run(*arguments())
    assert status == 2 and "probe.warmup_steps" in err and "delete" in err


def test_files_may_be_a_list_or_a_single_name():
    def files(text):
        return parse([f"probe.files={text}"], ProbeCommandConfig).probe.files

    assert files("[a.jsonl,b.parquet]") == ["a.jsonl", "b.parquet"]
    assert files("a.jsonl") == ["a.jsonl"] and files("a: b, {c}.jsonl") == ["a: b, {c}.jsonl"]


def test_arguments_become_the_dataclass_with_its_types():
    config = parse(
        ["probe.lr=1e-3", "model.path=null", "budget.ratio=1", "output_dir=17", "output_dir=18"], ProbeCommandConfig
    )
    assert isinstance(config, ProbeCommandConfig)
    assert (
        config.probe.lr == 1e-3
        and config.model.path is None
        and config.budget.ratio == 1.0
        and config.output_dir == "18"
    )


@dataclass
class OtherConfig:
    """Another command's options."""

    path: str | None = documented(None, "Where.", source="plugin")
    count: int = documented(3, "How many.", source="own choice", unit="pieces")


def test_other_commands_can_use_the_same_parser_and_help():
    assert parse(["count=4"], OtherConfig) == OtherConfig(count=4)
    text = help_text("other", "Does it.", "other count=1", OtherConfig)
    assert (
        "usage: other key=value" in text
        and "count=3\n      How many. Unit: pieces. Source of the default: own choice." in text
    )
    with pytest.raises(UsageError, match="did you mean 'count'"):
        parse(["cuont=4"], OtherConfig)
