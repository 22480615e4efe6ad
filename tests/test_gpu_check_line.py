"""The GPU check from its command to its page, on a CPU with a tiny model: the same stages, in bf16."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from tests.support.verl_processes import ROOT  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.ray]


def test_a_check_proves_its_line_shows_a_failed_run_and_writes_one_page(tmp_path):
    """Two steps of ``merge`` with export; verl's own LoRA has no node ``hybrid_lora``, so the last argument ends that
    run before Ray starts."""
    arguments = ["--device", "cpu", "--layers", "2", "--hidden", "64", "--vocabulary", "2048", "--steps", "2"]
    arguments += [
        "--minutes",
        "90",
        "--runs",
        "merge,verl_lora",
        "--output",
        str(tmp_path),
        "hybrid_lora.sync_timeout=241",
        # At the paper's rate two steps move the policy by less than bfloat16's log-probabilities can tell.
        "hybrid_lora.lora.lr=1e-3",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "recipes.gpu_check", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    page, figures = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "figures.json").read_text())
    states = {name: stage["state"] for name, stage in figures["stages"].items()}
    assert states == {
        "model": "done", "probe": "done", "merge": "done", "export": "done", "verl_lora": "failed",
        "sparse_merge": "skipped", "adapter": "skipped", "receiver_merge": "skipped", "bypass": "skipped",
    }, page  # fmt: skip

    failed = [check for check in figures["checks"] if not check["holds"]]
    assert failed == [] and len(figures["checks"]) == 8, failed
    steps = [step["metrics"] for step in figures["runs"]["merge"]]
    assert len(steps) == 2 and all(step["hybrid_lora/sync_digest_ok"] == 1 for step in steps)
    assert all(step["critic/score/max"] > step["critic/score/min"] for step in steps), "updates are real"

    assert page.startswith("# GPU check, on a CPU: a test of the check itself: CPU (")
    assert "8 of 8 checks hold, 1 of 9 stages failed, 4 of 9 stages were skipped" in page
    assert "| verl | 0.9.1 | ==0.9.1 |  |" in page and "every verl run also had hybrid_lora.sync_timeout=241" in page
    assert "### verl_lora failed" in page and "Could not override 'hybrid_lora.sync_timeout'" in page
    log = next(line for line in page.splitlines() if line.startswith("Its whole output is in"))
    assert log.endswith("/verl_lora.log`.") and (tmp_path / "run-1/verl_lora.log").exists()
    assert (tmp_path / "curves.png").exists() and "| `merge` | 2 of 2 |" in page
    assert not (tmp_path / "run-1/weights").exists(), "gigabytes on a GPU's machine"
