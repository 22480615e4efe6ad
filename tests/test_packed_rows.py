"""Packed rows are compared with rows by themselves before a run's first step: verl's ``use_remove_padding``."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from hybrid_lora_plugin.errors import split_reference  # noqa: E402
from hybrid_lora_plugin.verl_backend.packed_rows import PackedRows  # noqa: E402
from tests.support import host_flash_attention  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.packed_worker import BOUNDLESS  # noqa: E402
from tests.support.tiny_families import make_family  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import run_engine  # noqa: E402

pytestmark = pytest.mark.verl

PACKED = {"model_options": {"use_remove_padding": True}}
FUSED = {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}
#: those that replace a method of a class for good come last
SETTINGS = {
    "float32": PACKED,
    "bfloat16": PACKED | {"param_dtype": "bf16"},
    "eager": PACKED | {"attention": "eager"},
    "fsdp1": PACKED | {"strategy": "fsdp"},
    "fsdp1-offload": PACKED | {"strategy": "fsdp", "sharding": {"param_offload": True}},
    "padded": {},
    "padded-boundless": {"attention": BOUNDLESS},
    "boundless": PACKED | {"attention": BOUNDLESS},
    "boundless-bfloat16": PACKED | {"attention": BOUNDLESS, "param_dtype": "bf16"},
    "ulysses": PACKED | {"attention": host_flash_attention.NAME, "sharding": {"ulysses_sequence_parallel_size": 2}},
    "fused": {"model_options": PACKED["model_options"] | FUSED},
}
RECURRENT = ("falcon_h1", "falcon_h1-bfloat16", "qwen3_5_text")
OF_RANKS = {1: {name: setting for name, setting in SETTINGS.items() if name != "ulysses"}, 2: SETTINGS}
PASSING = ("float32", "bfloat16", "eager", "fsdp1", "fsdp1-offload", "ulysses", "fused")
CASES = [(ranks, name) for ranks, settings in OF_RANKS.items() for name in settings]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = make_tiny_qwen2(folder / "model", layers=2)
    recurrent = {}
    for name in RECURRENT:
        family, _, dtype = name.partition("-")
        if not dtype:
            made = make_family(family, folder / family)
            own = {"model": made, "allocation": make_allocation(made, folder / f"{family}-allocation")}
        recurrent[name] = PACKED | own | {"attention": "eager"} | ({"param_dtype": "bf16"} if dtype else {})
    common = dict(worker="tests/support/packed_worker.py", model=model)
    common["allocation"] = make_allocation(model, folder / "allocation")
    return {
        ranks: run_engine(folder / f"ranks-{ranks}", ranks, settings=recurrent | settings, **common)
        for ranks, settings in OF_RANKS.items()
    }


def figures(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d\.\de[+-]\d\d", line)]


@pytest.mark.parametrize(("ranks", "name"), [case for case in CASES if case[1] in PASSING])
def test_packed_rows_that_are_rows_by_themselves_pass_in_one_line(said, ranks, name):
    first, *others = said[ranks][name]
    assert others == [[]] * (ranks - 1), "the first rank says it"
    (line,) = first
    difference, carried = figures(line)
    assert line.startswith("hybrid_lora: packed rows: ") and carried == 0
    assert difference < (0.1 if name == "bfloat16" else 1e-5), line


@pytest.mark.parametrize(
    ("ranks", "name"),
    [case for case in CASES if case[1].startswith("boundless")]
    + [(ranks, name) for ranks in OF_RANKS for name in RECURRENT],
)
def test_what_reads_no_boundaries_is_refused_on_every_rank(said, ranks, name):
    lines = said[ranks][name]
    assert all(line == lines[0] for line in lines)
    text, anchor = split_reference(lines[0][0])
    assert anchor == "packed-rows-differ"
    assert text.startswith("refused: actor_rollout_ref.model.use_remove_padding: True, but packed rows leak")
    assert (name.partition("-")[0] if name in RECURRENT else BOUNDLESS) in text and text.endswith(
        "give actor_rollout_ref.model.use_remove_padding=false"
    )
    (moved,) = figures(text)
    assert moved > 1e-3


@pytest.mark.parametrize("ranks", OF_RANKS)
def test_a_run_that_does_not_pack_is_asked_nothing(said, ranks):
    assert said[ranks]["padded"] == said[ranks]["padded-boundless"] == [[]] * ranks


@pytest.mark.parametrize(
    ("carried", "repeated", "leaks"),
    [
        (0.0, 0.0, False),
        (1e-5, 0.0, True),
        (8.5e-3, 0.0, True),
        # A kernel that adds up in no fixed order.
        (2e-2, 1e-2, False),
        (8e-2, 1e-2, True),
        (float("nan"), 0.0, True),
    ],
)
def test_what_moves_a_row_is_told_from_what_a_repetition_moves(carried, repeated, leaks):
    assert PackedRows(difference=1e-6, carried=carried, repeated=repeated).leaks is leaks
