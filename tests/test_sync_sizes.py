"""The computed table of sync sizes: it is what the plugin streams, and docs/sync-cost.md shows it as it is now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import sync_sizes
from benchmarks.pages import written_into
from benchmarks.sync_sizes import BEGIN, END, MODES, LiveBytes, PaperModel, table
from hybrid_lora_plugin.sync.base_weights import base_digests
from hybrid_lora_plugin.sync.hybrid_weights import original_weights
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.wire import OutgoingWeights, SyncHeader
from hybrid_lora_plugin.training.apply import apply_allocation, parts_of
from tests.support.tiny_models import tiny_qwen2_config

PAGE = Path(__file__).parents[1] / "docs/sync-cost.md"
HOST_DIGEST = "xxh3:" + "0" * 32


def tiny(tied, **changes):
    config = tiny_qwen2_config(97, layers=2, hidden=64, tie_word_embeddings=tied, **changes)
    return PaperModel("tiny", config, rank=4, ratio=0.3)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def paper(request):
    return tiny(request.param)


def real_stream(paper, name):
    """The same sync with a model that has weights, digests and all."""
    plain = AutoModelForCausalLM.from_config(paper.config, dtype=torch.float32)
    model, mode = apply_allocation(plain, paper.allocation, rank=4, alpha=8), sync_mode(name)
    plan = SyncPlan(2.0, torch.bfloat16, "cpu")
    merged = mode.merged_digest(model, parts_of(model).lora_modules[1], plan) if mode.receiver_merges else {}
    header = SyncHeader(
        run="0123456789ab", number=1, mode=name, dtype="bfloat16", digests=True, lora_rank=4, lora_alpha=8.0,
        lora_modules=list(parts_of(model).lora_modules),
        base=base_digests(original_weights(model, "cpu")) if mode.partial else {},
        payload_bytes=mode.payload_bytes(parts_of(model).counts, torch.bfloat16), merged=merged,
    )  # fmt: skip
    stream = OutgoingWeights(header, mode.outgoing(model, plan))
    return stream, [(name, tensor.nbytes) for name, tensor in stream]


@pytest.mark.parametrize("mode", MODES)
def test_computed_bytes_are_those_streamed(paper, mode):
    computed = paper.sync(mode, HOST_DIGEST)
    stream, pairs = real_stream(paper, mode)
    sizes = [size for _, size in pairs[1:-1]]
    assert (computed.sent, computed.tensors, computed.largest) == (stream.bytes, len(sizes), max(sizes))
    assert computed.formula == sum(sizes)


@pytest.fixture(scope="module", params=sorted(sync_sizes.SHAPES))
def real(request):
    return PaperModel(request.param, sync_sizes.Qwen2Config(**sync_sizes.SHAPES[request.param]))


@pytest.mark.parametrize("mode", ["adapter", "receiver_merge"])
def test_real_models_stay_within_two_percent_of_the_formula_and_fifteen_of_verls_merge(real, mode):
    size, factors = real.sync(mode), {"adapter": 2, "receiver_merge": 4}[mode]
    assert size.sent <= 1.02 * (2 * real.counts.full + factors * real.counts.lora)
    assert size.sent <= 0.15 * real.verl_merge_bytes()
    # 10 % is the limit, and the greedy rule stops less than one module below it.
    assert 0.09 < real.counts.full / real.allocation.model.candidate_parameters <= 0.1


@pytest.mark.parametrize("dtype", sync_sizes.CHANGED)
def test_changed_elements_of_real_models_stay_within_the_wanted_bytes(real, dtype):
    for steps, share in sync_sizes.CHANGED[dtype].items():
        sent, formula = real.changed_elements_bytes(share, dtype)
        assert formula <= sent <= 1.002 * formula
        assert sent <= sync_sizes.WANTED[dtype][steps] * real.verl_merge_bytes()


def test_shares_of_changed_elements_are_the_largest_that_were_measured():
    """In the fidelity page's tables of SmolLM2."""
    page = (PAGE.parent / "sync-fidelity.md").read_text(encoding="utf-8")
    _, found, rest = page.partition("**SmolLM2-135M, supervised gradients**")
    assert found
    rows = re.findall(r"^\| \d+ \| (\d+) \| ([\d.]+)% \| ([\d.]+)% \|$", rest, re.M)
    assert len(rows) >= 6
    for place, dtype in enumerate(sync_sizes.CHANGED, start=1):
        for steps, share in sync_sizes.CHANGED[dtype].items():
            largest = max(float(row[place]) / 100 for row in rows if int(row[0]) == steps)
            assert share == pytest.approx(largest, rel=0.05)


def test_verls_merge_sends_a_tied_head_twice():
    tied, untied = (tiny(tied).verl_merge_bytes() for tied in (True, False))
    assert (
        tied == untied == 2 * sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny(False).config).parameters())
    )


def test_only_receiver_merge_needs_the_original_weights(paper):
    kept = {mode: paper.sync(mode).bases for mode in MODES}
    wrapped = sum(2 * m.in_features * m.out_features for m in paper.allocation.modules if m.assignment == "lora")
    assert kept == {"merge": 0, "adapter": 0, "receiver_merge": wrapped}


def test_live_bytes_counts_what_is_alive_at_one_time():
    model = torch.nn.Linear(2, 2, bias=False)
    with LiveBytes(model) as live:
        first = torch.zeros(1000, dtype=torch.float64, device="meta")
        first.view(10, 100)  # shares its storage
        del first
        second = torch.zeros(500, dtype=torch.float64, device="meta") + 1
        model.weight.detach()
    assert second.nbytes == 4000 and live.peak == 8000


def test_page_has_the_tables_as_they_are_computed_now():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert written_into(page, table(), BEGIN, END) == page, (
        "run: python -m benchmarks.sync_sizes --write docs/sync-cost.md"
    )
