"""The demo's whole command with rollouts in 16 bits: policy probe, ``verl.trainer.main_ppo``, sparse syncs, export.

``make demo`` itself runs in fp32 beside this in CI; together they are the end-to-end test.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("verl", reason="verl is not installed")

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from recipes.demo.__main__ import demo  # noqa: E402
from recipes.demo.verl_run import read_metrics  # noqa: E402
from tests.support import held_weights  # noqa: E402
from tests.support.verl_processes import ROOT  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.ray]

STEPS = 3
SETTINGS = [
    "actor_rollout_ref.rollout.dtype=bfloat16",
    "hybrid_lora.sync_rounding=stochastic",
    "hybrid_lora.sync=sparse_merge",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(held_weights.FOLDER, str(folder))
        patched.setenv("VERL_USE_EXTERNAL_MODULES", held_weights.__name__)
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        status = demo(folder / "out", STEPS, ROOT / ".cache", objective="policy", overrides=SETTINGS)
    return {"status": status, "folder": folder, "run": folder / "out" / "run-1"}


def test_every_claim_of_the_demo_holds(run):
    assert run["status"] == 0, (run["run"] / "report.md").read_text()


def test_every_sync_after_the_first_sends_only_what_changed(run):
    """The first one comes before step 1."""
    steps = {step.number: step.metrics for step in read_metrics(run["run"] / "metrics.jsonl")}
    for number in range(1, STEPS + 1):
        assert 0 < steps[number]["hybrid_lora/sync_elements_changed"] < 0.9, number


def test_exported_model_has_the_bits_that_vllm_held_after_the_last_sync(run):
    held = load_file(run["folder"] / held_weights.FILE)
    with safe_open(run["folder"] / held_weights.FILE, "pt") as file:
        # The probe has syncs of its own, in mode merge.
        assert int(file.metadata()["builds_on"]) == int(file.metadata()["number"]) - 1 == STEPS
    exported = load_file(run["run"] / "exported" / "model.safetensors")
    assert set(held) == set(exported) and {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    for name, tensor in exported.items():
        assert torch.equal(tensor, held[name]), name
    # And they are another model's than before.
    base = load_file(ROOT / ".cache" / "demo-base-model" / "model.safetensors")
    moved = [name for name, tensor in exported.items() if not torch.equal(tensor, base[name].to(torch.bfloat16))]
    assert len(moved) > len(exported) / 2
