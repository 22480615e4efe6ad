"""Sync mode ``sparse_merge``: the bits of ``merge`` from the elements that changed, and nothing else taken for them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.element_list import LONGEST, decode, encode
from hybrid_lora_plugin.sync.element_sum import sum_at, sum_of, wrapped
from hybrid_lora_plugin.sync.live_weight import LiveWeight
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.received import ReceivedWeights
from hybrid_lora_plugin.sync.sent_weights import PARTS, SentWeights
from hybrid_lora_plugin.sync.sparse_merge import require_base
from hybrid_lora_plugin.sync.wire import (
    HEADER,
    MANIFEST,
    OutgoingWeights,
    SyncHeader,
    read_header,
    read_manifest,
)
from hybrid_lora_plugin.training.apply import parts_of, trainable_groups
from hybrid_lora_plugin.training.rounding import NEAREST, Rounding
from tests.support.sync_models import (
    SCALING,
    HuggingFaceRollout,
    TransferBuffer,
    full_names,
    header_for,
    tensors_of,
    tied_and_untied,
    update,
)

STOCHASTIC = Rounding("stochastic", 11)
SPARSE = sync_mode("sparse_merge")
each_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
#: of an update, so that about a hundredth of the elements in bfloat16 changes
SMALL = 1e-6


# -- lists ----------------------------------------------------------------------------------------------------------


def test_a_list_is_a_gap_and_a_value_of_16_bits_each():
    bits = torch.tensor([7, 8, 9, -1, 10], dtype=torch.int16)
    assert encode(torch.tensor([0, 1, 3]), bits).tolist() == [[0, 7], [0, 8], [1, -1]]
    assert encode(torch.tensor([], dtype=torch.int64), bits).shape == (0, 2)
    everything = encode(torch.arange(5), bits)
    assert everything[:, 0].tolist() == [0] * 5 and torch.equal(everything[:, 1], bits)


@pytest.mark.parametrize("gap", [1, 2, LONGEST // 2, LONGEST - 1, LONGEST, LONGEST + 1, 2 * LONGEST, 5 * LONGEST + 3])
@pytest.mark.parametrize("first", [0, 1, LONGEST - 1, LONGEST, 3 * LONGEST + 5])
def test_gaps_of_any_length_are_bridged_by_unchanged_elements(gap, first):
    bits = torch.randint(-(2**15), 2**15, (first + gap + 3,), dtype=torch.int16)
    wanted = torch.tensor([first, first + gap, first + gap + 1])
    indices, values = decode(encode(wanted, bits))
    assert set(wanted.tolist()) <= set(indices.tolist()) and torch.equal(values, bits[indices])
    bridges = -(-(first + 1) // LONGEST) + -(-gap // LONGEST) - 2
    assert len(indices) == 3 + bridges and (indices.diff() > 0).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_any_elements_survive_the_list(seed):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 400_000, (1,), generator=generator))
    bits = torch.randint(-(2**15), 2**15, (size,), dtype=torch.int16, generator=generator)
    share = 10.0 ** -float(6 * torch.rand(1, generator=generator))
    wanted = (torch.rand(size, generator=generator) < share).nonzero()[:, 0]
    indices, values = decode(encode(wanted, bits))
    assert torch.equal(values, bits[indices])
    assert set(wanted.tolist()) <= set(indices.tolist())
    assert len(indices) <= len(wanted) + size // LONGEST


# -- sums -----------------------------------------------------------------------------------------------------------


def drawn(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16, generator=generator)


def test_a_sum_is_that_of_its_parts_however_they_are_cut():
    bits = drawn(70, 50)
    whole = sum_of(bits).item()
    for cuts in ([0, 1, 70], [0, 35, 70], [0, 69, 70]):
        rows = [sum_of(bits[a:b], (a, 0)).item() for a, b in zip(cuts, cuts[1:], strict=False)]
        assert wrapped(sum(rows)) == whole
    columns = [sum_of(bits[:, a : a + 25], (0, a)).item() for a in (0, 25)]
    assert wrapped(sum(columns)) == whole
    indices = torch.arange(bits.numel())
    assert sum_at(indices // 50, indices % 50, bits.reshape(-1)).item() == whole
    # In several pieces, as a large weight is summed.
    large = drawn(3000, 700)
    assert sum_of(large).item() == wrapped(sum_of(large[:1000]).item() + sum_of(large[1000:], (1000, 0)).item())


def test_every_changed_bit_and_every_exchange_changes_a_sum():
    bits = drawn(6, 5)
    whole = sum_of(bits).item()
    for index in range(30):
        for bit in range(16):
            other = bits.clone()
            other.view(-1)[index] ^= (1 << bit) - (1 << 16) * (bit == 15)
            assert sum_of(other).item() != whole
    for changed in (bits.flip(0), bits.flip(1), bits.roll(1, 0), bits.roll(1, 1)):
        assert sum_of(changed).item() != whole
    square = drawn(6, 6)
    assert sum_of(square.t()).item() != sum_of(square).item()


# -- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dimension", [0, 1, None])
@pytest.mark.parametrize("shape", [(12, 8), (12,)])
def test_workers_write_their_parts_of_a_list_and_sum_to_the_whole(workers, dimension, shape):
    """Each worker's part lies within a packed parameter, as vLLM packs q, k and v."""
    if dimension == 1 and len(shape) == 1:
        pytest.skip("a bias has no columns")
    before, after = (
        drawn(12, 8, seed).view(torch.bfloat16)[:, 0 if len(shape) == 1 else slice(None)] for seed in (1, 2)
    )
    changed = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.3
    wanted = torch.where(changed, after, before)
    elements = encode(changed.reshape(-1).nonzero()[:, 0], wanted.contiguous().view(torch.int16).reshape(-1))
    parts = []
    for worker in range(workers):
        length = shape[dimension] // workers if dimension is not None else None
        mine = before if dimension is None else before.narrow(dimension, worker * length, length)
        packed = torch.cat([torch.zeros_like(mine), mine, torch.zeros_like(mine)])
        live = LiveWeight(packed.narrow(0, len(mine), len(mine)), shape, dimension, (worker * length) if length else 0)

        header = header_of_shards()
        receiver = SPARSE.receiver(header, SimpleNamespace(live=lambda name, live=live: live))
        receiver.take([("w", elements)])
        assert torch.equal(live.view, live.part_of(wanted)), "this worker's part"
        assert not packed[: len(mine)].any() and not packed[2 * len(mine) :].any(), "and nothing beside it"
        parts.append(receiver._part("w", {"sent": len(elements), "in_full": 0}))

    def of(tensor):
        bits = tensor.contiguous().view(torch.int16).reshape(shape[0], -1)
        indices = decode(elements)[0]
        columns = bits.shape[1]
        return sum_at(indices // columns, indices % columns, bits.reshape(-1)[indices]).item()

    bits = wanted.contiguous().view(torch.int16).reshape(shape[0], -1)
    row = {"changed": 1, "sent": len(elements), "old": of(before), "new": of(wanted), "in_full": sum_of(bits).item()}
    account = {"tensors": {"w": row}}
    reports = [{"parts": {"w": part}} for part in parts]
    SPARSE.check_reports(header, account, reports)
    for what in ("old", "new", "in_full"):
        with pytest.raises(WeightSyncError, match="^w: the rollout engine held|^w: the rollout engine holds"):
            SPARSE.check_reports(header, {"tensors": {"w": row | {what: row[what] ^ 1}}}, reports)
    if workers > 1 and dimension is not None:
        with pytest.raises(WeightSyncError, match="^w: the workers' parts have"):
            SPARSE.check_reports(header, account, reports[:-1])
    if workers > 1:
        with pytest.raises(WeightSyncError, match="^w: workers of one rollout engine"):
            SPARSE.check_reports(header, account, [*reports, {"parts": {"w": [*parts[0][:-1], 1]}}])


def header_of_shards():
    return SyncHeader(run="r1", number=2, mode="sparse_merge", dtype="bfloat16", digests=True, base_number=1)


# -- whole syncs ----------------------------------------------------------------------------------------------------


class Run:
    """A trainer and its rollout engine through one sync after another."""

    def __init__(self, hybrid, folder, dtype, rounding=STOCHASTIC, sent=None):
        self.hybrid, self.dtype, self.rounding = hybrid, dtype, rounding
        self.rollout = HuggingFaceRollout(folder, dtype)
        self.sent, self.number, self.holds = sent or SentWeights(), 0, None

    def stream(self, destination="here"):
        """The next sync as [(name, tensor)] in memory of their own, and its stream."""
        self.number += 1
        changes = self.sent.begin(self.number, destination)
        header = header_for(
            self.hybrid, "sparse_merge", self.dtype, self.number, base_number=changes.base_number,
            rounding_mode=self.rounding.mode, rounding_seed=self.rounding.seed,
        )  # fmt: skip
        tensors = SPARSE.outgoing(self.hybrid, SyncPlan(SCALING, self.dtype, "cpu", self.rounding, changes=changes))
        stream = OutgoingWeights(header, tensors, changes=changes)
        return [(name, tensor.clone()) for name, tensor in stream], stream

    def deliver(self, pairs, at_once=3):
        """The receiver's part, up to the proof; returns its report."""
        holds, self.holds = self.holds, None
        buckets = TransferBuffer(1 << 22).buckets(pairs, at_once)
        (first, *rest) = next(buckets)
        header = read_header(*first)
        received = ReceivedWeights(header, "r1")
        require_base(header, holds)
        receiver = SPARSE.receiver(header, self.rollout)
        receiver.take([pair for pair in rest if received.take(*pair) is not None])
        for bucket in buckets:
            receiver.take([pair for pair in bucket if received.take(*pair) is not None])
        received.finish()
        receiver.finish()
        report = json.loads(json.dumps(receiver.conclude(received.account)))
        SPARSE.check_reports(header, received.account, [report])
        self.holds = (header.run, header.number)
        return header

    def sync(self):
        pairs, stream = self.stream()
        self.deliver(pairs)
        return stream

    def check_bits(self):
        merged = tensors_of(self.hybrid, "merge", self.dtype, self.rounding)
        assert self.rollout.parameters.keys() == merged.keys()
        wrong = [name for name, tensor in merged.items() if not torch.equal(self.rollout.parameters[name], tensor)]
        assert wrong == []


@each_type
@pytest.mark.parametrize("rounding", [STOCHASTIC, NEAREST], ids=["stochastic", "nearest"])
@tied_and_untied
def test_rollout_holds_the_bits_of_merge_after_every_sync(case, dtype, rounding):
    hybrid, generator = case.hybrid(), torch.Generator().manual_seed(2)
    run = Run(hybrid, case.folder, dtype, rounding)
    run.sync()
    run.check_bits()
    shares = []
    for step in range(60):
        # From next to nothing to all of it.
        update(hybrid, generator, size=SMALL * 10 ** (1.5 * (step % 5) - 1))
        shares.append(run.sync().changes.share)
        run.check_bits()
    assert min(shares) < 0.01 and max(shares) > 0.9


@each_type
def test_bytes_follow_what_changed_and_never_exceed_those_of_merge(hybrid, tiny_qwen2, dtype):
    run, generator = Run(hybrid, tiny_qwen2, dtype), torch.Generator().manual_seed(2)
    first = run.sync()
    for size in (0, SMALL, 20 * SMALL, 1.0):
        update(hybrid, generator, size=size)
        pairs, stream = run.stream()
        run.deliver(pairs)
        payload = sum(tensor.nbytes for _, tensor in pairs[1:-1])
        lists = [tensor for _, tensor in pairs[1:-1] if tensor.dtype == torch.int16]
        assert payload <= first.header.payload_bytes
        assert sum(map(len, lists)) <= stream.changes.changed_elements
        if size == 0:
            assert payload == stream.changed == stream.changes.share == 0 and len(pairs) == 2
        if size == SMALL:
            assert payload == 4 * stream.changes.changed_elements and 0 < stream.changes.share < 0.1
            assert stream.changed == len(pairs) - 2
        if size == 1.0:
            assert not lists, "a weight of which half changed is shorter as it is"


def test_nothing_but_what_trains_travels_after_the_first_sync(hybrid, tiny_qwen2):
    run = Run(hybrid, tiny_qwen2, torch.bfloat16)
    names = {name for name, _ in run.stream()[0]} - {HEADER, MANIFEST}
    assert names == set(run.rollout.parameters)
    update(hybrid, torch.Generator().manual_seed(2), size=1e-3)
    names = {name for name, _ in run.stream()[0]} - {HEADER, MANIFEST}
    trained = {f"{module}.weight" for module in parts_of(hybrid).lora_modules} | set(full_names(hybrid))
    assert names == trained and any(name.endswith(".bias") for name in trained)


def test_everything_counts_as_changed_first_and_then_what_differs(hybrid, tiny_qwen2):
    run = Run(hybrid, tiny_qwen2, torch.bfloat16)
    first = run.sync()
    assert first.changed == len(first.entries) and first.changes.share == 1
    (_, parameter) = trainable_groups(hybrid)["full"][0]
    with torch.no_grad():
        parameter.view(-1)[3] += 1
    second = run.sync()
    assert second.changed == second.changes.changed_elements == 1
    # A whole sync that has to be sent again says what differs, too.
    run.sent.forget()
    third = run.sync()
    assert third.header.base_number == 0 and third.changed == 0 and third.changes.share == 0


def test_what_is_kept_is_two_bytes_for_each_element_that_trains(hybrid, tiny_qwen2):
    run = Run(hybrid, tiny_qwen2, torch.bfloat16)
    stream = run.sync()
    assert run.sent.bytes == 2 * stream.changes.elements


def test_trainer_is_left_as_it_was(hybrid, tiny_qwen2):
    run = Run(hybrid, tiny_qwen2, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    for _ in range(2):
        run.sync()
    assert all(torch.equal(tensor, before[name]) for name, tensor in hybrid.state_dict().items())


def test_weights_of_32_bits_are_refused(hybrid):
    with pytest.raises(WeightSyncError, match="is float32, wanted 16 bits.*hybrid_lora.sync=merge"):
        list(SPARSE.outgoing(hybrid, SyncPlan(SCALING, torch.float32, "cpu")))


# -- what a sync builds on ------------------------------------------------------------------------------------------


@pytest.fixture
def run(hybrid, tiny_qwen2):
    """Three syncs old."""
    made = Run(hybrid, tiny_qwen2, torch.bfloat16)
    for seed in range(3):
        update(hybrid, torch.Generator().manual_seed(seed), size=SMALL)
        made.sync()
    return made


def moved(run, seed=9, size=SMALL):
    update(run.hybrid, torch.Generator().manual_seed(seed), size=size)
    return run.stream()


def test_a_lost_sync_is_not_papered_over_by_the_next(run):
    moved(run)
    pairs, _ = moved(run, 10)
    with pytest.raises(
        WeightSyncError, match="sync 5 of run r1 has only what changed since sync 4, and the last .* sync 3"
    ):
        run.deliver(pairs)


def test_a_sync_on_top_of_one_that_failed_is_refused(run):
    pairs, _ = moved(run)
    with pytest.raises(WeightSyncError):
        run.deliver(pairs[:-2])
    pairs, _ = moved(run, 10)
    with pytest.raises(WeightSyncError, match="since sync 4, and no sync is proven here"):
        run.deliver(pairs)


def test_an_engine_that_joins_later_refuses_and_says_what_helps(run, tiny_qwen2):
    pairs, _ = moved(run)
    joined = Run(run.hybrid, tiny_qwen2, torch.bfloat16)
    with pytest.raises(WeightSyncError, match="no sync is proven here.*hybrid_lora.sync=merge"):
        joined.deliver(pairs)


def test_after_a_refusal_the_next_sync_is_whole(run):
    _, stream = moved(run)
    stream.changes.refused()
    pairs, stream = moved(run, 10)
    assert stream.header.base_number == 0
    run.deliver(pairs)
    run.check_bits()
    assert run.sync().header.base_number == stream.header.number


def test_after_a_stream_that_was_not_drawn_to_its_end_the_next_sync_is_whole(run):
    update(run.hybrid, torch.Generator().manual_seed(9), size=SMALL)
    changes = run.sent.begin(4, "here")
    tensors = SPARSE.outgoing(run.hybrid, SyncPlan(SCALING, run.dtype, "cpu", STOCHASTIC, changes=changes))
    next(tensors)
    tensors.close()
    run.number = 4
    assert run.sync().header.base_number == 0
    run.check_bits()


def test_a_new_trainer_begins_with_a_whole_sync(run, tiny_qwen2):
    resumed = Run(run.hybrid, tiny_qwen2, torch.bfloat16)
    resumed.rollout, resumed.number, resumed.holds = run.rollout, run.number, run.holds
    assert resumed.sync().header.base_number == 0
    resumed.check_bits()


def test_two_sets_of_engines_each_build_on_what_they_have(hybrid, tiny_qwen2):
    """As in verl's ``separate_async``: one set in every step, the other now and then, with the same weights."""
    generator, sent = torch.Generator().manual_seed(4), SentWeights()
    often, seldom = (Run(hybrid, tiny_qwen2, torch.bfloat16, sent=sent) for _ in range(2))
    number, based = 0, {"often": [], "seldom": []}
    for step in range(6):
        update(hybrid, generator, size=SMALL)
        for name, run in (("often", often), ("seldom", seldom)):
            if name == "seldom" and step in (1, 2, 4):
                continue
            run.number = number
            pairs, stream = run.stream(name)
            number = run.number
            run.deliver(pairs)
            run.check_bits()
            based[name].append(stream.header.base_number > 0)
    # The one that was left out gets everything, and that costs the other nothing: no weight moved in between.
    assert based == {"often": [False, True, True, True, True, True], "seldom": [False, False, False]}
    seldom.number = number
    assert seldom.stream("seldom")[1].header.base_number == seldom.holds[1], "twice with the same weights"


# -- faults ---------------------------------------------------------------------------------------------------------


def of_lists(pairs):
    return [index for index, (name, tensor) in enumerate(pairs) if tensor.dtype == torch.int16 and len(tensor) > 3]


def resent(run, pairs, index, tensor):
    """The stream as a trainer would send it that takes the damaged tensor for the right one."""
    damaged = [*pairs[1:index], (pairs[index][0], tensor), *pairs[index + 1 : -1]]
    header = read_header(*pairs[0])
    account = read_manifest(pairs[-1][1])[0]["account"]
    return list(OutgoingWeights(header, damaged, changes=SimpleNamespace(account=account)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: torch.cat([t[:2], t[3:]]), "elements changed, .* were to be sent, received a list of"),
        (lambda t: torch.cat([t, t[-1:]]), "elements changed, .* were to be sent|beyond the last"),
        (lambda t: t + torch.tensor([[1, 0]] + [[0, 0]] * (len(t) - 1), dtype=torch.int16), "held other values"),
        (lambda t: t + torch.tensor([[0, 1]] + [[0, 0]] * (len(t) - 1), dtype=torch.int16), "holds other values"),
        (lambda t: t.flip(0), "held other values|beyond the last"),
        (lambda t: t * 0 - 1, "beyond the last"),
        (lambda t: t[:, :1].contiguous(), "two columns"),
        (lambda t: t.float(), "received as float32"),
    ],
    ids=["dropped", "repeated", "gap shifted", "value changed", "reversed", "beyond the end", "no values", "dtype"],
)
def test_a_wrong_list_that_the_trainer_lists_itself_is_caught_and_named(run, change, words):
    pairs, _ = moved(run)
    index = of_lists(pairs)[2]
    with pytest.raises(WeightSyncError, match=f"^{pairs[index][0]}: .*({words})"):
        run.deliver(resent(run, pairs, index, change(pairs[index][1])))


def test_a_list_that_was_never_sent_is_named(run):
    pairs, _ = moved(run)
    index = of_lists(pairs)[1]
    header, account = read_header(*pairs[0]), read_manifest(pairs[-1][1])[0]["account"]
    left = [*pairs[1:index], *pairs[index + 1 : -1]]
    stream = OutgoingWeights(header, left, changes=SimpleNamespace(account=account))
    with pytest.raises(WeightSyncError, match=f"^{pairs[index][0]}: .* were to be sent, received nothing"):
        run.deliver(list(stream))


def test_a_damaged_element_among_those_that_change_is_noticed_at_once(run):
    pairs, _ = moved(run)
    name, elements = pairs[of_lists(pairs)[0]]
    element = decode(elements)[0][1]
    live = run.rollout.live(name).view
    live.view(torch.int16).view(-1)[element] ^= 1
    with pytest.raises(WeightSyncError, match=f"^{name}: the rollout engine held other values than sync 3 brought"):
        run.deliver(pairs)


@pytest.mark.parametrize("asked", [False, True], ids=["in turn", "at a checkpoint"])
def test_a_damaged_element_that_does_not_change_is_noticed_when_its_turn_comes(run, asked):
    name = full_names(run.hybrid)[0]
    run.rollout.live(name).view.view(torch.int16).view(-1)[5] ^= 1
    if asked:
        run.sent.read_all_back()
    passed = 0
    with pytest.raises(WeightSyncError, match=f"^{name}: the rollout engine holds other values.*in full"):
        while passed < PARTS:
            run.deliver(run.stream()[0])  # nothing trains meanwhile
            passed += 1
    assert passed == 0 or not asked


def test_every_weight_has_its_turn_once_in_sixteen_syncs(run):
    turns = [name for part in range(PARTS) for name in run.sent.in_turn(part)]
    assert len(turns) == len(set(turns)) == len(run.rollout.trained) and set(turns) == run.rollout.trained


def test_a_set_of_trained_weights_that_is_not_the_first_syncs_is_refused(run):
    pairs, _ = moved(run)
    run.rollout.trained = run.rollout.trained | {"model.norm.weight"}
    with pytest.raises(WeightSyncError, match="^model.norm.weight: one of the weights that train"):
        run.deliver(pairs)
