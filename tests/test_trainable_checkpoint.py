"""``hybrid_lora.save=trainable``: what a checkpoint holds, and another process that goes on, on 1 or 2 ranks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from safetensors.torch import load_file  # noqa: E402

from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.verl_backend import requirements  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import run_engine  # noqa: E402

pytestmark = [pytest.mark.verl, pytest.mark.ranks]

WORKER = "tests/support/trainable_state_worker.py"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainable")
    model = make_tiny_qwen2(folder / "model", tie_word_embeddings=False)
    allocation = make_allocation(model, folder / "allocation")

    def run(name, ranks, **more):
        return run_engine(folder / name, ranks, worker=WORKER, model=model, allocation_folder=str(allocation), **more)

    return run


@pytest.fixture(scope="module")
def one(start):
    return start("one", 1)


@pytest.fixture(scope="module")
def two(start):
    return start("two", 2)


def test_a_checkpoint_holds_what_trains_and_its_state_and_nothing_of_the_base(one):
    folder = one["folder"] / "checkpoint"
    assert sorted(f.name for f in folder.glob("*.pt")) == ["extra_state_world_size_1_rank_0.pt"]
    trained, state = (load_file(folder / "hybrid_lora" / f"{n}.safetensors") for n in ("trainables", "optimizer"))
    elements = sum(tensor.numel() for tensor in trained.values())
    held = sum(tensor.nbytes for tensor in [*trained.values(), *state.values()])
    # Weights and two moments of four bytes each, and a step for each weight.
    assert held == 12 * elements + 4 * len(trained)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert size < held + 20_000


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_process_holds_the_same_and_goes_on_bit_for_bit(start, request, ranks):
    before = request.getfixturevalue("one" if ranks == 1 else "two")
    wrong = {name: str(before["folder"] / name) for name in ("another base", "cut optimizer", "cut weights")}
    # Under the other option: what a checkpoint is decides, not what the run saves from now on.
    after = start(f"again{ranks}", ranks, resume=str(before["folder"] / "checkpoint"), wrong=wrong, save="full")
    assert after["held"].keys() == before["held"].keys()
    for part, wanted in before["held"].items():
        assert after["held"][part] == wanted, part
    assert after["steps"] == before["steps"]
    assert all(torch.equal(after["end"][name], tensor) for name, tensor in before["end"].items())
    assert "not the base model of the checkpoint" in after["refused"]["another base"]
    for name in ("cut optimizer", "cut weights"):
        assert "cannot be read" in after["refused"][name] and "\n" not in after["refused"][name]


@pytest.mark.parametrize(("saved", "ranks"), [("one", 2), ("two", 1)])
def test_another_number_of_ranks_goes_on_within_the_order_of_sums(start, request, saved, ranks):
    before = request.getfixturevalue(saved)
    after = start(f"{saved}-to-{ranks}", ranks, resume=str(before["folder"] / "checkpoint"))
    for part in ("groups", "schedule", "allocation", "base"):
        assert after["held"][part] == before["held"][part], part
    for name, sums in before["held"]["optimizer"].items():
        assert after["held"]["optimizer"][name] == pytest.approx(sums, rel=1e-9, abs=1e-12), name
    for first, second in zip(before["steps"], after["steps"], strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)
    for name, tensor in before["end"].items():
        torch.testing.assert_close(after["end"][name], tensor, rtol=0, atol=1e-5, msg=name)


def test_fsdp1_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"hybrid_lora.save: 'trainable' .*strategy=fsdp; give fsdp2 there"):
        requirements.check_save("trainable", "fsdp")
