"""Ranks without a shared disk: what they need they find on their own, and what one lacks ends all of them at once."""

from __future__ import annotations

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from hybrid_lora_plugin import load_allocation  # noqa: E402
from hybrid_lora_plugin.errors import ConfigurationError  # noqa: E402
from hybrid_lora_plugin.verl_backend.checkpoint_files import require_writable  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import run_engine  # noqa: E402

pytestmark = pytest.mark.verl


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disks")
    model = make_tiny_qwen2(folder / "model")
    return folder, model, make_allocation(model, folder / "allocation")


@pytest.fixture(scope="module")
def results(setting):
    """All cases on two ranks, by one start of them."""
    folder, model, allocation = setting
    worker = "tests/support/own_disks_worker.py"
    return run_engine(folder / "run", 2, worker=worker, model=model, allocation=allocation)


def test_an_allocation_that_rank_0_alone_can_read_is_every_ranks(results, setting):
    assert results["allocations"] == 2 * [list(load_allocation(setting[2]).full_names)]


def test_a_checkpoint_on_disks_of_their_own_resumes_bit_for_bit(results):
    first, second = results["files"]
    assert "hybrid_lora" in first and "hybrid_lora" not in second
    assert results["resumed"] is True and results["without our folder"] == ["", ""]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("allocation of rank 1", ["AllocationError", "on_rank_1", "#allocation-cannot-be-read"]),
        ("blocked on rank 1", ["trainer.default_local_dir: 'blocked'", "#checkpoint-place-not-usable"]),
        ("model missing on rank 1", ["model_world_size_2_rank_1.pt", "rank 1 of 2", "#checkpoint-place-not-usable"]),
        ("optim missing on rank 1", ["optim_world_size_2_rank_1.pt", "rank 1 of 2", "#checkpoint-place-not-usable"]),
        ("another alpha", ["hybrid_lora.lora.alpha=8", "#checkpoint-of-another-setting"]),
        ("damaged on rank 0", ["hybrid_lora' cannot be read", "#checkpoint-cannot-be-read"]),
        ("another base on rank 1", ["model.layers.1.", "#checkpoint-of-another-base-model"]),
        ("rank 0 cannot save", ["on rank 0: NotADirectoryError"]),
    ],
)
def test_what_fails_on_one_rank_ends_all_with_the_same_line(results, case, words):
    first, second = results[case]
    assert first == second and "\n" not in first and all(word in first for word in words), first


def test_a_folder_for_checkpoints_is_made_and_left_empty(tmp_path):
    require_writable(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="trainer.default_local_dir: '.*file' cannot be written on"):
        require_writable(str(tmp_path / "file"))
