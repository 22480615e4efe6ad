"""``sync_check=logprobs`` with a real rollout engine in bfloat16: rounding to nearest is refused, thresholds pass."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from tests.support.policy_worker import CASES  # noqa: E402
from tests.support.verl_processes import run  # noqa: E402

pytestmark = pytest.mark.verl


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("policy") / "seen.json"
    run(["tests/support/policy_worker.py", str(out)])
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_update_lost_in_rounding_is_refused_with_its_cure(seen, case):
    error = seen[f"{case}, nearest"].get("error", "")
    assert "of the trainer's way from the base model" in error and "hybrid_lora.sync_rounding=stochastic" in error
    assert error.endswith("[docs/troubleshooting.md#rollout-policy-behind-the-trainers]")


@pytest.mark.parametrize("case", CASES)
def test_the_same_update_passes_with_thresholds(seen, case):
    metrics = seen[f"{case}, stochastic"]
    assert metrics["sync_policy_judged"] == 1, metrics
    assert metrics["sync_policy_slope"] == pytest.approx(1, abs=0.2)
    assert metrics["sync_policy_kl_ratio"] < 0.15
