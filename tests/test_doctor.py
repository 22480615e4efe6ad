"""``hybrid-lora-doctor``: what is missing in the libraries is found, and named by the features that it breaks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_lora_plugin.cli import doctor
from hybrid_lora_plugin.verl_backend.contracts import CONTRACTS, EVERY_RUN, FEATURES, SYNC
from hybrid_lora_plugin.verl_backend.doctor import examination
from tests.support.altered_libraries import altered
from tests.support.verl_processes import ROOT, environment_of

pytest.importorskip("verl", reason="verl is not installed")
pytest.importorskip("vllm", reason="vllm is not installed")

PACKAGE = ROOT / "hybrid_lora_plugin"
EVERY_SYNC = SYNC.split()


def examined(folder: Path, capsys) -> tuple[int, dict]:
    """Exit status and JSON of the command on such a folder."""
    status = doctor.main(["check=source", f"sources=[{folder}]", "--json"])
    return status, json.loads(capsys.readouterr().out)


ROLLOUT = "verl.workers.rollout.vllm_rollout"


@pytest.mark.parametrize(
    ("module", "pattern", "other", "broken", "said"),
    [
        pytest.param(
            "vllm.model_executor.models.utils",
            "get_unstacked_mapper",
            "get_plain_mapper",
            ["adapter"],
            "WeightsMapper has no 'get_unstacked_mapper', nor WeightsMapper.get_rename_mapper",
            id="removed symbol of one sync mode",
        ),
        pytest.param(
            f"{ROLLOUT}.utils",
            r"peft_config: dict,\n        base_sync_done",
            "peft_config: dict,\n        base_done",
            EVERY_SYNC,
            "_update_weights: no argument 'base_sync_done' among (self, weights, peft_config, base_done)",
            id="changed signature",
        ),
        pytest.param(
            f"{ROLLOUT}.bucketed_weight_transfer",
            None,
            "",
            EVERY_SYNC,
            f"there is no module {ROLLOUT}.bucketed_weight_transfer",
            id="renamed module",
        ),
        pytest.param(
            f"{ROLLOUT}.vllm_async_server",
            "_park_until_admitted",
            "_wait_at_the_gate",
            ["server"],
            "vLLMHttpServer has no '_park_until_admitted'",
            id="private method of the server",
        ),
        pytest.param(
            "verl",
            'group="verl.plugins"',
            'group="verl.extensions"',
            ["registration"],
            "verl says 'verl.plugins' nowhere",
            id="literal",
        ),
        pytest.param(
            "verl.utils.import_utils",
            "def load_extern_object\\(",
            "def (",
            ["registration", "policy_probe"],
            "load_extern_object: a file on the way to it cannot be read (SyntaxError: ",
            id="text of another Python",
        ),
        pytest.param(
            "verl.utils.torch_functional",
            "def get_constant_schedule_with_warmup",
            "def get_constant_schedule",
            ["policy_probe"],
            "verl.utils.torch_functional has no 'get_constant_schedule_with_warmup'",
            id="symbol of one probe",
        ),
    ],
)
def test_what_is_gone_from_a_library_breaks_the_features_that_need_it(
    tmp_path, capsys, module, pattern, other, broken, said
):
    status, found = examined(altered(tmp_path, module, pattern, other), capsys)
    assert status == 1 and found["broken"] == broken
    assert all(set(entry["features"]) & set(broken) for entry in found["missing"])
    assert any(said in entry["said"] for entry in found["missing"])
    assert [name for name, feature in found["features"].items() if not feature["works"]] == broken


def test_a_name_that_another_version_has_is_enough(tmp_path, capsys):
    """vLLM 0.29 has the new name of it, which ``patches.name_unstacked_mapper`` puts where verl looks."""
    altered(tmp_path, "vllm.model_executor.models.utils", "get_unstacked_mapper", "get_rename_mapper")
    status, found = examined(tmp_path, capsys)
    assert (status, found["broken"], found["missing"]) == (0, [], [])
    note = found["notes"][0]
    assert "get_unstacked_mapper has another name in these libraries, WeightsMapper.get_rename_mapper" in note


def test_what_an_older_version_is_not_asked_for_is_not_missed_there(tmp_path, capsys):
    altered(tmp_path, "vllm.model_executor.models.utils", "get_unstacked_mapper", "get_plain_mapper")
    (tmp_path / "vllm-0.24.0.dist-info").mkdir()
    (tmp_path / "vllm-0.24.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.24.0\n")
    status, found = examined(tmp_path, capsys)
    assert (status, found["broken"]) == (0, [])
    known_in = {"tested": "0.28.0", "ran": "0.29.0", "read": "0.24.0"}
    assert {"name": "vllm", "version": "0.24.0"} | known_in in found["versions"]


def test_the_tables_say_what_is_wrong_to_a_stranger(tmp_path, capsys):
    altered(tmp_path, f"{ROLLOUT}.vllm_async_server", "_park_until_admitted", "_wait_at_the_gate")
    file = tmp_path / "doctor.json"
    assert doctor.main(["check=source", f"sources=[{tmp_path}]", f"json={file}"]) == 1
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 110
    assert re.search(r"^  server +1 MISSING +the rollout server generates", text, re.M)
    assert re.search(r"^  adapter +\d+ ok +hybrid_lora.sync=adapter$", text, re.M)
    assert "breaks server; used in verl_backend/receiver/server.py" in text
    assert "Not working here: server. The other features are intact." in text.splitlines()[-1]
    assert json.loads(file.read_text())["broken"] == ["server"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check=deep"], "check: 'deep' is not supported; choose one of source, import, run"),
        (["sources=[/nowhere]"], "check: 'import' imports what is installed"),
        (["check=source", "sources=[/nowhere]"], "sources: '/nowhere' is no folder"),
        (["chek=source"], "did you mean 'check'?"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(capsys, arguments, words):
    assert doctor.main(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out


# -- features of the table ------------------------------------------------------------------------------------------


def imported_with(module: str, seen: set[str]) -> set[str]:
    """Files of the package that are imported when ``module`` is."""
    import ast

    path = ROOT.joinpath(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    if not file.exists() or str(file) in seen:
        return seen
    seen.add(str(file))
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("hybrid_lora_plugin"):
            imported_with(node.module, seen)
            for alias in node.names:
                imported_with(f"{node.module}.{alias.name}", seen)
    return seen


@pytest.mark.parametrize(
    ("module", "least"),
    [("engine_registration", 20), ("sender.server_adapter", 9), ("receiver.server", 5), ("receiver.worker", 9)],
)
def test_a_symbol_that_every_run_imports_is_one_that_every_run_needs(module, least):
    """Else the doctor would call a run intact that ends at an import."""
    import ast

    core = {*EVERY_RUN}
    checked = 0
    for file in imported_with(f"hybrid_lora_plugin.verl_backend.{module}", set()):
        names = set()
        for node in ast.parse(Path(file).read_text()).body:
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        for contract in CONTRACTS:
            if contract.symbol in names and str(Path(file).relative_to(PACKAGE)) in contract.files:
                checked += 1
                needed = core & set(contract.features) or set(EVERY_SYNC) <= set(contract.features)
                assert needed, f"{file} imports {contract.symbol}, which is said to carry {contract.features} only"
    assert checked >= least


# -- looks that end early -------------------------------------------------------------------------------------------


def examined_with(found: dict, depth: str, monkeypatch):
    """The report where the process that imports verl and vLLM writes ``found``."""
    monkeypatch.setattr(examination.child, "look", lambda _: found)
    monkeypatch.setattr(examination, "check_sources", lambda *_: [])
    return examination.examine(depth)


def test_a_process_that_cannot_import_verl_leaves_nothing_intact(monkeypatch):
    ended = "the process ended with status -11: Segmentation fault"
    report = examined_with({"ended": ended}, "import", monkeypatch)
    assert report.broken == list(FEATURES) and report.as_text().count(ended) == 1


def test_what_a_run_was_at_when_it_ended_is_broken_and_what_came_before_is_not(monkeypatch):
    before = {
        "missing": [],
        "seconds": {"import": 1.0},
        "tried": ["engine", "loss"],
        "failed": {"loss": "RuntimeError: x"},
    }
    report = examined_with(before | {"trying": ["adapter"], "ended": "no end after 9 s"}, "run", monkeypatch)
    assert report.broken == ["adapter", "loss"]
    text = report.as_text()
    assert re.search(r"^  engine +\d+ ok +\d+ ok +ok ", text, re.M)
    assert re.search(r"^  adapter +\d+ ok +\d+ ok +FAILED ", text, re.M)
    assert re.search(r"^  server +\d+ ok +\d+ ok +not tried ", text, re.M)
    assert "run: no end after 9 s\n  breaks adapter" in text and "run: RuntimeError: x\n  breaks loss" in text


def test_a_trial_goes_on_behind_what_fails_and_keeps_the_reason():
    from hybrid_lora_plugin.verl_backend.doctor.trial import Progress

    kept = {}
    progress = Progress(lambda **parts: kept.update(parts))
    with progress.trying("engine", "cpu"):
        raise ValueError("first line\nlast line")
    with progress.trying("merge"):
        assert kept["trying"] == ("merge",)
    assert kept == {
        "trying": [],
        "tried": ["engine", "cpu", "merge"],
        "failed": dict.fromkeys(("engine", "cpu"), "ValueError: last line"),
    }
    assert progress.works("merge") and not progress.works("engine", "merge") and not progress.works("adapter")


# -- import and run -------------------------------------------------------------------------------------------------


@pytest.mark.verl
def test_the_whole_command_finds_every_feature_intact_here(tmp_path):
    """All three looks: the real engine's step, and a sync in every mode. The command itself imports nothing for it."""
    file = tmp_path / "doctor.json"
    code = (
        "import sys\nfrom hybrid_lora_plugin.cli.doctor import main\nstatus = main(sys.argv[1:])\n"
        "assert not {'torch', 'verl', 'vllm', 'ray', 'transformers', 'peft'} & set(sys.modules), sys.modules\n"
        "raise SystemExit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check=run", f"json={file}"],
        cwd=ROOT,
        env=environment_of(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "about a minute" in done.stderr
    assert f"All {len(FEATURES)} features are intact" in done.stdout and "MISSING" not in done.stdout
    found = json.loads(file.read_text())
    assert (
        found["broken"] == []
        and found["missing"] == []
        and found["devices"][0]["cores"] == len(os.sched_getaffinity(0))
    )
    tried = {name for name, feature in found["features"].items() if feature["looks"]["run"]["tried"]}
    assert tried == {"registration", "engine", "loss", "checkpoint", "cpu", *EVERY_SYNC}
