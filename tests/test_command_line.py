"""What all commands do around their own work: texts as typed, options without an effect, versions, signals, imports."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from hybrid_lora_plugin import __version__
from hybrid_lora_plugin.cli import command as commands
from hybrid_lora_plugin.cli.arguments import expand_home, options, parse
from hybrid_lora_plugin.config import (
    CRITERIA,
    WITHOUT_PROBE,
    WITHOUT_WARMUP,
    AllocateCommandConfig,
    CompareCommandConfig,
    DataCommandConfig,
    DoctorCommandConfig,
    EvaluateCommandConfig,
    ExportCommandConfig,
    ProbeCommandConfig,
)
from hybrid_lora_plugin.config_effect import COMMAND, PROBE, SELECTION, without_effect
from hybrid_lora_plugin.config_evidence import EvidenceCommandConfig
from hybrid_lora_plugin.config_plan import PlanCommandConfig
from hybrid_lora_plugin.config_selection import NAMING
from hybrid_lora_plugin.config_trial import TrialRunsCommandConfig
from tests.support.verl_processes import ROOT

CONFIGS = {
    "probe": ProbeCommandConfig,
    "allocate": AllocateCommandConfig,
    "compare": CompareCommandConfig,
    "data": DataCommandConfig,
    "export": ExportCommandConfig,
    "doctor": DoctorCommandConfig,
    "eval": EvaluateCommandConfig,
    "plan": PlanCommandConfig,
    "evidence": EvidenceCommandConfig,
    "trial": TrialRunsCommandConfig,
}


def main_of(name):
    return importlib.import_module(f"hybrid_lora_plugin.cli.{name}").main


# -- texts ------------------------------------------------------------------------------------------------------------

# fmt: off
TEXTS = [
    "007", "1e3", "0x10", "1_000", "true", "No", "~", "~/x", "12:30", "a#b", "a # b", "a: b", "{a}", "a,b", "${x}",
    "???",
    "null.json", "'quoted'", "*.jsonl", "- a", "&a", "!x", "|", ">", "%", "@", "a=b", "ä", " padded ", "a\nb", "",
]
# fmt: on


def text_options(kind):
    return [name for name, type_, _ in options(kind) if type_ in (str, str | None)]


@pytest.mark.parametrize("command", CONFIGS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_arrives_as_it_was_typed(command, text):
    for name in text_options(CONFIGS[command]):
        config = parse([f"{name}={text}"], CONFIGS[command])
        for part in name.split("."):
            config = getattr(config, part)
        assert config == text, name


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith("[")])
def test_a_single_text_is_a_list_of_one_and_a_list_holds_texts(text):
    def files(value):
        return parse([f"probe.files={value}"], ProbeCommandConfig).probe.files

    assert files(text) == [text]
    if not set(text) & set(",'\"[]") and text.strip():
        assert files(f"[{text},x]") == [text.strip(), "x"]
    if "'" not in text:
        assert files(f"['{text}',x]") == [text, "x"]


def test_lists_have_quotes_brackets_and_an_end():
    def files(value):
        return parse([f"probe.files={value}"], ProbeCommandConfig).probe.files

    assert files("[]") == [] and files("[ a , b ]") == ["a", "b"]
    assert files("[org/name:train[:500],b]") == ["org/name:train[:500]", "b"]
    assert files("""["a,b",'c"d']""") == ["a,b", 'c"d']
    for unreadable in ("[a", "[a]b", "['a]", "[a[b]"):
        with pytest.raises(ValueError, match="cannot be read; give a list"):
            files(unreadable)


def test_null_leaves_an_option_out_where_it_may_be_left_out():
    assert parse(["output_dir=x", "output_dir=null"], ProbeCommandConfig).output_dir is None
    assert parse(["criterion=null"], ProbeCommandConfig).criterion == "null"
    assert parse(["probe.micro_batch_size=null"], ProbeCommandConfig).probe.micro_batch_size is None


def test_the_home_folder_is_where_a_shell_has_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    given = ["model.path=~/m", "output_dir=~", "probe.files=[~/a,b~/c]", "model.gguf_file=a~/b"]
    config = expand_home(parse(given, ProbeCommandConfig))
    assert (config.model.path, config.output_dir) == ("/home/somebody/m", "/home/somebody")
    assert (config.probe.files, config.model.gguf_file) == (["/home/somebody/a", "b~/c"], "a~/b")


@pytest.mark.parametrize("folder", ["007", "true", "12:30", "a # b", "a: b", "~x"])
def test_a_folder_gets_the_name_that_was_typed(tmp_path, monkeypatch, tiny_qwen2, folder):
    monkeypatch.chdir(tmp_path)
    arguments = [f"model.path={tiny_qwen2}", f"output_dir={folder}", "criterion=spread", "lora.rank=2"]
    assert main_of("probe")([*arguments, "budget.ratio=0.5"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == [folder]


# -- options without an effect ----------------------------------------------------------------------------------------


def test_every_rule_is_about_options_that_there_are_and_every_criterion_is_known():
    from hybrid_lora_plugin.scoring import get_criterion

    known = [name for name, _, _ in options(ProbeCommandConfig)]
    for effect in (*COMMAND, *PROBE, *SELECTION):
        assert any(name.startswith(effect.option) for name in known), effect.option
    assert {name for name in CRITERIA if get_criterion(name).method is None} == set(WITHOUT_PROBE)
    for name in CRITERIA:
        read = {f"control.{option}" for option in get_criterion(name).options}
        config = ProbeCommandConfig(criterion=name)
        controls = [option for option in known if option.startswith("control.")]
        assert set(controls) - {option for option, _ in without_effect(config, controls, SELECTION)} == read
        assert (name in NAMING) == bool(without_effect(config, ["budget.ratio"], SELECTION))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_the_rate_of_a_warm_up_is_read_from_is_what_the_rules_say(criterion):
    from hybrid_lora_plugin.probing.method import warmup_rate
    from hybrid_lora_plugin.scoring import get_criterion

    method = get_criterion(criterion).method
    for init in ("default", "adalora"):
        config = ProbeCommandConfig(criterion=criterion)
        config.probe.init = init
        rates = {"probe.lr": 1.0, "probe.full_lr": 2.0, "probe.adalora.lr": 3.0}
        config.probe.lr, config.probe.full_lr, config.probe.adalora.lr = rates.values()
        unread = {name for name, _ in without_effect(config, rates, (*COMMAND, *PROBE))}
        expected = set(rates)
        if method is not None and criterion not in WITHOUT_WARMUP:
            expected -= {name for name, rate in rates.items() if rate == warmup_rate(config.probe, method)}
        assert unread == expected, (criterion, init)


# -- before anything is loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", CONFIGS)
def test_every_command_says_its_version(command, capsys):
    for arguments in (["--version"], ["output_dir=x", "--version"]):
        assert main_of(command)(arguments) == 0
        assert capsys.readouterr().out == f"hybrid-lora-{command} {__version__}\n"


REQUIRED = {
    "probe": "model.path, output_dir, probe.files: not given; write model.path=",
    "allocate": "artifact, output_dir: not given; write artifact=FOLDER",
    "compare": "allocations: not given; write allocations=[",
    "data": "set, output_dir: not given; write set=gsm8k output_dir=FOLDER",
    "export": "checkpoint, output_dir: not given; write checkpoint=FOLDER",
    "eval": "model, output_dir: not given; write model=FOLDER",
    "plan": "recipe: not given; write recipe=NAME, or a command",
    "trial": "allocations, output_dir: not given; write allocations=[FOLDER,FOLDER]",
}


@pytest.mark.parametrize("command", CONFIGS)
def test_missing_options_typos_and_values_are_found_before_anything_heavy_is_imported(command):
    """All in one process: what it has imported at its end no answer has needed."""
    calls = [["--help"], ["--version"], ["output_dri=x"], ["sources"]]
    calls += [[]] if command in REQUIRED else [["check=deep"]]
    code = (
        "import sys, time; begun = time.perf_counter()\n"
        f"from hybrid_lora_plugin.cli.{command} import main\n"
        f"print([main(argv) for argv in {calls!r}][2:], file=sys.stderr)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'omegaconf', 'yaml', 'safetensors', 'verl', 'hydra', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    *lines, statuses, imported = done.stderr.splitlines()
    assert (statuses, imported) == ("[2, 2, 2]", "[]"), done.stderr
    assert len(lines) == 3 and all(line.startswith(f"hybrid-lora-{command}: ") for line in lines)
    if command in REQUIRED:
        assert REQUIRED[command] in lines[-1]


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_an_import_ends_a_command_without_a_traceback(tmp_path, tiny_qwen2, signum):
    """Torch's place is taken by a module that takes its time, as torch does on a slow disk."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import sys, time\nprint('importing', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    (tmp_path / "rows.jsonl").write_text("{}\n")
    arguments = [f"model.path={tiny_qwen2}", f"output_dir={tmp_path / 'out'}", f"probe.files={tmp_path / 'rows.jsonl'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrid_lora_plugin.cli.probe", *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signum)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (128 + signum, "hybrid-lora-probe: interrupted, nothing was written\n")


def test_a_signal_while_something_is_written_lets_it_be_cleaned_up(capsys):
    cleaned = []

    @commands.command("hybrid-lora-test")
    def main(argv=None):
        with commands.writing():
            try:
                signal.raise_signal(signal.SIGTERM)
                time.sleep(5)
            finally:
                cleaned.append(True)
        return 0

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert main([]) == 143 and cleaned == [True]
    assert capsys.readouterr().err == "hybrid-lora-test: interrupted, nothing was written\n"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_that_the_shell_ignores_is_ignored():
    """As in ``nohup``, where it must not end what runs on."""

    @commands.command("hybrid-lora-test")
    def main(argv=None):
        signal.raise_signal(signal.SIGINT)
        return 7

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main([]) == 7
    finally:
        signal.signal(signal.SIGINT, before)


# -- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_a_full_disk_behind_standard_output_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hybrid_lora_plugin.cli.allocate", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


def test_a_reader_who_leaves_is_no_error():
    code = f"{sys.executable} -m hybrid_lora_plugin.cli.probe --help | head -1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("usage: ") and done.stderr == ""
