"""The computed page-locked memory of a rollout worker: whole models are counted, and the page has that table."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen2Config

from benchmarks.host_memory import (
    BEGIN,
    END,
    MIB,
    asleep,
    checkpoint_shapes,
    engine_bytes,
    page_locked,
    pinned_base,
    segments,
    table,
)
from benchmarks.pages import written_into
from benchmarks.sync_sizes import SHAPES
from hybrid_lora_plugin.candidates import find_candidates, meta_model
from hybrid_lora_plugin.probing.loading import parameter_count

PAGE = Path(__file__).parents[1] / "docs/weight-sync.md"


@pytest.mark.parametrize("name", SHAPES)
def test_a_worker_alone_holds_the_whole_model_and_two_hold_it_between_them(name):
    model = meta_model(Qwen2Config(**SHAPES[name]))
    linear = sum(2 * c.out_features * c.in_features for c in find_candidates(model))
    assert asleep(SHAPES[name])[0] == 2 * parameter_count(model) and pinned_base(SHAPES[name])[0] == linear
    whole, half = (sorted(set(engine_bytes(SHAPES[name], workers))) for workers in (1, 2))
    assert all(size in whole or 2 * size in whole for size in half)
    layer = model.model.layers[0]
    for last, shape in checkpoint_shapes(SHAPES[name]).items():
        assert tuple(next(m for n, m in layer.named_modules() if n.endswith(last)).weight.shape) == shape


def test_pieces_of_device_memory_and_of_the_host():
    # Small tensors share a piece of 2 MiB, those below 10 MiB one of 20 MiB, larger ones have their own.
    assert segments([100, MIB, MIB]) == [2 * MIB, 2 * MIB]
    assert segments([9 * MIB, 9 * MIB, 9 * MIB]) == [20 * MIB, 20 * MIB]
    assert segments([10 * MIB, 11 * MIB + 1]) == [10 * MIB, 12 * MIB]
    assert [page_locked(size) for size in (1, 4096, 4097, 20 * MIB)] == [1, 4096, 8192, 32 * MIB]


def test_page_has_the_table_as_it_is_computed():
    page = PAGE.read_text(encoding="utf-8")
    assert written_into(page, table(), BEGIN, END) == page, (
        "run `python -m benchmarks.host_memory --write docs/weight-sync.md`"
    )
