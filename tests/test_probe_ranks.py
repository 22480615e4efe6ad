"""``hybrid-lora-probe`` under torchrun: FSDP2 over gloo ranks gives the allocation of a single process."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from hybrid_lora_plugin.allocation import load_allocation
from hybrid_lora_plugin.cli.probe import main
from tests.support.processes import free_port
from tests.support.tiny_models import sums, write_jsonl

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 240


def arguments(model, rows, folder, **changes):
    values = {
        "model.path": model,
        "data.files": rows,
        "output_dir": folder,
        "lora.rank": 3,
        # With checks: every rank must stop where the others do.
        "probe.warmup_steps": "auto",
        "probe.max_warmup_steps": 10,
        "probe.warmup_check_steps": 3,
        "probe.partitions": "auto",
        "probe.max_partitions": 8,
        # Neither 2 nor 4 divides it: some ranks have a row less, or none.
        "probe.batch_size": 5,
        "probe.max_length": 64,
        "probe.lr": 5e-3,
        "budget.ratio": 0.3,
    }
    return [f"{name}={value}" for name, value in (values | changes).items()]


def torchrun(ranks, command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}",
         "-m",
         "hybrid_lora_plugin.cli.probe", *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process):
    """What it printed; a process that hangs is ended, so that it cannot slow down the tests after it."""
    try:
        return process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", sums(60))


@pytest.fixture(scope="module")
def alone(tiny_qwen2, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert main(arguments(tiny_qwen2, rows, folder)) == 0
    return folder


def assert_same(folder, alone):
    got, want = load_allocation(folder), load_allocation(alone)
    assert got.full_names == want.full_names and got.lora_names == want.lora_names
    for name in ("warmup_steps", "warmup_auto", "partitions", "partitions_auto"):
        assert getattr(got.probe, name) == getattr(want.probe, name), name
    learned, alone_learned = (dataclasses.asdict(allocation.probe.held_out) for allocation in (got, want))
    assert learned == pytest.approx(alone_learned, rel=1e-5) and learned["after"] < learned["before"]
    for module, other in zip(got.modules, want.modules, strict=True):
        assert module.score == pytest.approx(other.score, rel=1e-5), module.name
    measured = load_file(folder / "sensitivities.safetensors")
    for name, values in load_file(alone / "sensitivities.safetensors").items():
        # Single values may be what is left of larger ones: the largest of a tensor is the measure of its rounding.
        assert ((measured[name] - values).abs() / values.abs()).max() < 1e-4, name
        assert (measured[name] - values).abs().max() < 1e-5 * values.abs().max(), name


@pytest.mark.parametrize(
    "ranks, changes",
    [(2, {}), (4, {"probe.micro_batch_tokens": 40, "probe.gradient_checkpointing": "true"})],
    ids=["2", "4"],
)
def test_a_sharded_probe_gives_the_allocation_of_one_process(tiny_qwen2, rows, alone, tmp_path, ranks, changes):
    process = torchrun(ranks, arguments(tiny_qwen2, rows, tmp_path / "out", **changes))
    out, err = finished(process)
    assert process.returncode == 0, err
    assert out.count("allocation written") == 1 and f"{ranks} × cpu" in err
    assert_same(tmp_path / "out", alone)


def test_an_interrupted_sharded_probe_continues_on_another_number_of_ranks(tiny_qwen2, rows, tmp_path):
    # Long enough to be interrupted for certain.
    steps = {"probe.max_warmup_steps": 200, "probe.lr": 1e-3, "probe.warmup_check_steps": 60}
    process = torchrun(2, arguments(tiny_qwen2, rows, tmp_path / "out", **steps))
    for line in process.stderr:
        if "warm-up 1/" in line:
            break
    # As a cluster's scheduler or torchrun itself ends it.
    process.send_signal(signal.SIGTERM)
    _, err = finished(process)
    assert process.returncode != 0 and not (tmp_path / "out").exists()
    with safe_open(tmp_path / "out.partial" / "warmup.safetensors", framework="pt") as saved:
        assert 0 < int(saved.metadata()["step"]) < 200, err
    assert main(arguments(tiny_qwen2, rows, tmp_path / "out", **steps)) == 0
    assert main(arguments(tiny_qwen2, rows, tmp_path / "straight", **steps)) == 0
    resumed, straight = load_allocation(tmp_path / "out"), load_allocation(tmp_path / "straight")
    assert resumed.full_names == straight.full_names


def test_a_mistake_is_printed_once_and_no_rank_is_left_waiting(tiny_qwen2, rows, tmp_path):
    given = arguments(tiny_qwen2, rows, tmp_path / "out", criterion="full_pruning")
    process = torchrun(2, [argument for argument in given if not argument.startswith("probe.lr=")])
    out, err = finished(process)
    assert process.returncode != 0
    assert err.count("hybrid-lora-probe: criterion: full_pruning") == 1 and "2 processes" in err
    assert not (tmp_path / "out").exists()
