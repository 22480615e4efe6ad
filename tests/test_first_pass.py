"""What an engine computes in bfloat16 trains alike, whichever pass came first: FSDP2 settles there how it reduces."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from transformers import AutoModelForCausalLM  # noqa: E402

from hybrid_lora_plugin import load_allocation  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.first_pass_worker import ORDERS, STRATEGIES  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import run_engine  # noqa: E402

pytestmark = pytest.mark.verl

LAYERS = 3


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def results(request, tmp_path_factory):
    """All orders under both strategies, by one start of the ranks; a checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("first_pass")
    model = make_tiny_qwen2(folder / "fp32", layers=LAYERS)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder / "model")
    for file in (*model.glob("*token*"), *model.glob("chat_template*")):
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    allocation = make_allocation(folder / "model", folder / "allocation", ratio=0.1)
    layers = {name.split(".")[2] for name in load_allocation(allocation).full_names}
    assert 0 < len(layers) < LAYERS, "a unit with adapters alone, and one with a full module"
    return run_engine(
        folder / "run",
        request.param,
        worker="tests/support/first_pass_worker.py",
        model=folder / "model",
        allocation=allocation,
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_order_of_first_passes_trains_to_the_same_bits(results, strategy, order):
    plain = f"{strategy}, update"
    wanted, end = results[plain]["steps"], results[f"{plain}-end"]
    assert len(wanted) == 2 and wanted[1]["grad_norm"] > 0
    # The checkpoint is of the first step.
    assert results[f"{strategy}, {order}"]["steps"] == (wanted[1:] if "resume" in ORDERS[order] else wanted)
    ours = results[f"{strategy}, {order}-end"]
    assert all(torch.equal(tensor, ours[name]) for name, tensor in end.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reference_is_the_same_first_or_after_a_resume(results, strategy):
    first, resumed = (results[f"{strategy}, {order}"]["passes"] for order in ("reference", "resumed, then reference"))
    assert first["reference"] and first["reference"] == resumed["reference"]
    moved = results[f"{strategy}, resumed, then actor"]["passes"]["actor"]
    assert moved != first["reference"]


def test_fsdp2_still_settles_how_it_reduces_at_the_first_forward_pass(results):
    assert "to a tensor with grad_dtype" in results["PEFT's own switch"]
