"""The stream of a weight sync: no fault on the wire gets through."""

from __future__ import annotations

import dataclasses
import random
import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.digest import digest_of
from hybrid_lora_plugin.sync.received import ReceivedWeights, compare_entries
from hybrid_lora_plugin.sync.wire import (
    HEADER,
    MANIFEST,
    VERSION,
    Entry,
    OutgoingWeights,
    SyncHeader,
    packed,
    read_header,
    read_manifest,
    unpacked,
)
from tests.support.tensors import DTYPES, drawn, with_flipped_bit

RUN, NUMBER, STEP = "4f1c9a", 3, 17
UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
BIAS, IDS = "model.layers.0.self_attn.q_proj.bias", "model.some_buffer"
A, B = "model.layers.0.mlp.down_proj.lora_A.weight", "model.layers.0.mlp.down_proj.lora_B.weight"


def some_weights():
    """Tensors of several types; up and gate have one shape, so that only values tell them apart."""
    return {
        UP: drawn(6, 4, seed=1),
        GATE: drawn(6, 4, seed=2),
        BIAS: drawn(6, dtype=torch.bfloat16, seed=3),
        A: drawn(2, 6, seed=4),
        B: drawn(4, 2, seed=5),
        IDS: drawn(5, dtype=torch.int64, seed=6),
    }


def some_header(**changes):
    fields = dict(run=RUN, number=NUMBER, mode="receiver_merge", dtype="float32", digests=True)
    return SyncHeader(**(fields | changes))


def send(weights=None, step=STEP, before=None, **changes):
    outgoing = OutgoingWeights(some_header(**changes), (weights or some_weights()).items(), before=before)
    outgoing.step = step
    return outgoing


def receive(stream, run=RUN, number=NUMBER, step=STEP, read_back=lambda name: False):
    """A receiver's whole part in a sync, as ``verl_backend.receiver.worker`` plays it."""
    stream, loaded = iter(stream), {}
    received = ReceivedWeights(read_header(*next(stream)), run, number)
    for name, tensor in stream:
        pending = received.take_soon(name, tensor, read_back=read_back(name))
        if pending is not None:
            received.settle(name, pending)
            loaded[name] = tensor
    received.finish(step)
    return received.prove({name: digest_of(tensor) for name, tensor in loaded.items() if read_back(name)})


@pytest.mark.parametrize("read_back", [lambda name: False, lambda name: True, lambda name: name in (UP, BIAS)])
def test_what_is_sent_arrives_in_order_and_unchanged(read_back):
    weights = some_weights()
    outgoing = send(weights)
    pairs = list(outgoing)
    assert [name for name, _ in pairs] == [HEADER, *weights, MANIFEST]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pairs[1:-1])
    entries = receive(pairs, read_back=read_back)
    assert entries == outgoing.entries and [entry.name for entry in entries] == list(weights)
    assert [(entry.shape, entry.dtype) for entry in entries[:3]] == [
        ((6, 4), "float32"),
        ((6, 4), "float32"),
        ((6,), "bfloat16"),
    ]
    assert outgoing.digests == {name: digest_of(tensor) for name, tensor in weights.items()}
    assert outgoing.seconds > 0


def test_what_is_to_be_read_back_is_proven_by_that_alone():
    weights = some_weights()
    stream = iter(send(weights))
    received = ReceivedWeights(read_header(*next(stream)), RUN, NUMBER)
    for name, tensor in stream:
        pending = received.take_soon(name, tensor, read_back=name != MANIFEST)
        if pending is not None:
            received.settle(name, pending)
    assert all(entry.digest == "" for entry in received.finish(STEP))
    digests = {name: digest_of(tensor) for name, tensor in weights.items()}
    for damaged in (digests | {BIAS: digest_of(weights[BIAS] + 1)}, {n: d for n, d in digests.items() if n != BIAS}):
        with pytest.raises(WeightSyncError, match=f"{BIAS}: sent with digest .* in the rollout engine's model with"):
            received.prove(damaged)
    assert [entry.digest for entry in received.prove(digests)] == list(digests.values())


def test_a_sync_without_tensors_is_whole():
    outgoing = OutgoingWeights(some_header(), [])
    assert receive(outgoing) == [] and outgoing.changed == 0


# The larger ones are hashed in another thread.
@pytest.mark.parametrize("width", [4, 600])
def test_tensors_are_drawn_one_at_a_time_and_none_is_kept(width):
    alive = weakref.WeakSet()

    def weights():
        for index in range(5):
            # Whole tensors are large: the one before has to be gone when the next is put together.
            assert len(alive) == 0
            tensor = torch.full((width, width), float(index))
            alive.add(tensor)
            yield f"w{index}", tensor
            del tensor

    stream = OutgoingWeights(some_header(), weights())
    for _name, tensor in stream:
        del tensor
    assert len(stream.entries) == 5 and len(alive) == 0


def test_tensors_with_any_strides_travel_contiguous():
    weights = {"t": drawn(6, 4).t(), "s": drawn(6, 8)[:, ::2]}
    pairs = list(send(weights))
    assert all(tensor.is_contiguous() for _, tensor in pairs)
    receive(pairs)


FULL_HEADER = dict(
    run="ünïcode", number=12, mode="adapter", dtype="bfloat16", digests=True, lora_rank=6, lora_alpha=8.5,
    lora_modules=["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"],
    base={"model.norm.weight": "xxh3:00ff"}, payload_bytes=2**40 + 1, base_storage="pinned", base_number=11,
    rounding_mode="stochastic", rounding_seed=5,
    fixed_prompt={"tokens": [[1, 2, 3]], "log_probs": [[-0.1, -1e-300]], "limit": 0.1 + 0.2},
)  # fmt: skip


def test_every_field_of_a_header_survives_the_wire():
    header = SyncHeader(**FULL_HEADER)
    for field in dataclasses.fields(header):
        # A field that someone adds later is to be added above, too.
        assert field.name == "version" or getattr(header, field.name) != field.default, field.name
    name, tensor = next(OutgoingWeights(header, []))
    assert name == HEADER and tensor.dtype == torch.uint8 and tensor.dim() == 1
    assert read_header(name, tensor) == header
    assert header.scaling == 8.5 / 6 and header.torch_dtype == torch.bfloat16


def test_the_manifest_names_run_number_step_and_every_tensor():
    weights = some_weights()
    outgoing = send(weights)
    *_, (name, tensor) = outgoing
    content, entries = read_manifest(tensor)
    assert name == MANIFEST and content == outgoing.manifest()
    assert (content["run"], content["number"], content["step"]) == (RUN, NUMBER, STEP)
    assert entries == [Entry.of(name, tensor, True) for name, tensor in weights.items()]


def test_bytes_are_those_of_every_tensor_with_header_and_manifest():
    outgoing = send()
    seen = 0
    for _, tensor in outgoing:
        seen += tensor.nbytes
        assert outgoing.bytes == seen
    assert seen > sum(tensor.nbytes for tensor in some_weights().values())


def test_changed_counts_all_tensors_first_and_then_those_that_differ():
    weights = some_weights()
    first = send(weights)
    list(first)
    assert first.changed == len(weights)
    again = send(weights, before=first.digests)
    list(again)
    assert again.changed == 0
    moved = weights | {UP: with_flipped_bit(weights[UP], 77), B: -weights[B], "new": torch.ones(1)}
    third = send(moved, before=again.digests)
    list(third)
    assert third.changed == 3


def test_a_sync_that_nobody_announced_is_checked_against_itself():
    pairs = list(send(step=None))
    assert len(receive(pairs, run=None, number=None, step=None)) == len(some_weights())
    # A trainer that was not told the step cannot be asked for it.
    assert receive(pairs, step=99)


def test_the_end_of_a_stream_is_told_once_and_only_when_all_of_it_was_drawn():
    ended = []
    stream = OutgoingWeights(some_header(), some_weights().items(), on_end=ended.append)
    for _ in range(len(some_weights()) + 2):
        next(stream)
    # Drawn to its last tensor, but nobody has asked for more: the sender may still be busy with it.
    assert ended == []
    assert next(stream, None) is None and next(stream, None) is None
    assert ended == [stream]


@pytest.mark.parametrize("digests", [True, False])
def test_a_sync_of_the_run_that_came_before_is_stale_and_that_of_a_new_run_is_not(digests):
    # Where nothing was announced beside the stream, the receiver has only its memory.
    header = some_header(digests=digests)
    for number in (NUMBER, NUMBER + 1, NUMBER + 5):
        with pytest.raises(WeightSyncError, match=f"sync {NUMBER} again.* {number}.*stale"):
            ReceivedWeights(header, last=(RUN, number))
    for last in (None, (RUN, NUMBER - 1), (RUN, 1), ("other", NUMBER), ("other", NUMBER + 5)):
        ReceivedWeights(header, last=last)


# -- faults ---------------------------------------------------------------------------------------------------------


def place(pairs, name):
    return next(index for index, (other, _) in enumerate(pairs) if other == name)


def dropped(name):
    return lambda pairs: [pair for pair in pairs if pair[0] != name]


def replaced(name, change):
    """The tensor ``name`` becomes ``change(tensor)``."""
    return lambda pairs: [(other, change(tensor) if other == name else tensor) for other, tensor in pairs]


def inserted(name, tensor, after):
    return lambda pairs: [
        *pairs[: place(pairs, after) + 1],
        (name, tensor),
        *pairs[place(pairs, after) + 1 :],
    ]


def duplicated(pairs):
    return inserted(UP, pairs[place(pairs, UP)][1], after=A)(pairs)


def exchanged_names(pairs):
    names = {UP: GATE, GATE: UP}
    return [(names.get(name, name), tensor) for name, tensor in pairs]


def exchanged_values(pairs):
    tensors = dict(pairs)
    values = tensors | {UP: tensors[GATE], GATE: tensors[UP]}
    return [(name, values[name]) for name, _ in pairs]


def exchanged_places(pairs):
    one, other = place(pairs, BIAS), place(pairs, B)
    pairs = list(pairs)
    pairs[one], pairs[other] = pairs[other], pairs[one]
    return pairs


def moved_to_the_front(pairs):
    pairs = list(pairs)
    pairs.insert(1, pairs.pop(place(pairs, IDS)))
    return pairs


def exchanged_manifests(**changes):
    """The manifest of another sync of the same weights."""
    return replaced(MANIFEST, lambda _: list(send(**changes))[-1][1])


def edited(name, **changes):
    """Fields of header or manifest written over by a sender that means it, not by a fault on the way."""
    return replaced(name, lambda tensor: packed(unpacked(tensor, name) | changes, "cpu"))


def overwritten(name, old, new):
    """Text in header or manifest changed on the way."""

    def change(tensor):
        before = bytes(tensor.numpy())
        assert old in before
        return of_text(before.replace(old, new, 1))

    return replaced(name, change)


def listed_again(index):
    """The manifest with one of its entries again at the end."""

    def change(tensor):
        content = unpacked(tensor, MANIFEST)
        return packed(content | {"tensors": [*content["tensors"], content["tensors"][index]]}, "cpu")

    return replaced(MANIFEST, change)


def of_text(text):
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


# Found without digests, by name, place, shape and type.
STRUCTURAL = {
    "a dropped tensor": (dropped(UP), UP),
    "the first tensor dropped with the header": (lambda pairs: pairs[2:], f"{GATE}.*header"),
    "a dropped bias": (dropped(BIAS), BIAS),
    "a dropped factor": (dropped(B), B),
    "a dropped header": (dropped(HEADER), f"{UP}.*header"),
    "a dropped manifest": (dropped(MANIFEST), f"{IDS}.*manifest"),
    "a stream cut in the middle": (lambda pairs: pairs[:4], f"{BIAS}.*manifest"),
    "nothing but a header": (lambda pairs: pairs[:1], "nothing.*manifest"),
    "a duplicated tensor": (duplicated, f"{UP}.*twice"),
    "two names exchanged": (exchanged_names, f"{UP}|{GATE}"),
    "two tensors in each other's place": (exchanged_places, f"{BIAS}|{B}"),
    "the last tensor first": (moved_to_the_front, IDS),
    "a truncated tensor": (replaced(UP, lambda tensor: tensor[:-1]), f"{UP}.*shape"),
    "a truncated factor": (replaced(A, lambda tensor: tensor[:, :3]), f"{A}.*shape"),
    "an emptied tensor": (replaced(UP, lambda tensor: tensor[:0]), f"{UP}.*shape"),
    "a wrong dtype of the same bytes": (replaced(UP, lambda t: t.view(torch.int32)), f"{UP}.*float32.*int32"),
    "a wrong dtype of as many bytes": (replaced(BIAS, torch.Tensor.half), f"{BIAS}.*bfloat16.*float16"),
    "a cast tensor": (replaced(A, torch.Tensor.bfloat16), f"{A}.*float32.*bfloat16"),
    "a wrong shape of the same bytes": (replaced(UP, lambda tensor: tensor.reshape(4, 6)), f"{UP}.*6, 4.*4, 6"),
    "a flattened tensor": (replaced(UP, torch.flatten), f"{UP}.*shape"),
    "a transposed tensor": (replaced(UP, torch.t), f"{UP}.*shape"),
    "an additional axis": (replaced(BIAS, lambda tensor: tensor[None]), f"{BIAS}.*shape"),
    "an extra tensor": (inserted("model.extra", torch.ones(2), after=GATE), "model.extra"),
    "a second header": (inserted(HEADER, torch.ones(2, dtype=torch.uint8), after=GATE), HEADER),
    "a tensor after the manifest": (inserted("model.late", torch.ones(2), after=MANIFEST), "model.late.*manifest"),
    "a second manifest": (lambda pairs: [*pairs, pairs[-1]], f"{MANIFEST}.*manifest"),
    "a renamed tensor": (lambda pairs: [(n.replace("up_proj", "up_pro"), t) for n, t in pairs], "up_pro"),
}

# In what is said about the tensors rather than in them.
OF_THE_FORMAT = {
    "a manifest of another run": (exchanged_manifests(run="other"), f"{RUN}.*other"),
    "a manifest of another sync": (exchanged_manifests(number=2), f"{NUMBER}.* 2"),
    "a manifest of another step": (exchanged_manifests(step=STEP - 1), f"step {STEP - 1}.*step {STEP}"),
    "another run": (lambda _: list(send(run="other")), f"run other.*run {RUN}"),
    "a stale number": (lambda _: list(send(number=NUMBER - 1)), f"{NUMBER - 1}.*{NUMBER}.*stale"),
    "another step": (lambda _: list(send(step=STEP - 1)), f"step {STEP - 1}.*step {STEP}.*stale"),
    "another format version": (edited(HEADER, version=VERSION + 1), f"version {VERSION + 1}.*{VERSION}"),
    "no format version": (edited(HEADER, version=None), "version None"),
    "a truncated header": (replaced(HEADER, lambda tensor: tensor[:-1]), "header.*damaged"),
    "an empty header": (replaced(HEADER, lambda tensor: tensor[:0]), "header.*damaged"),
    "a header of zeros": (replaced(HEADER, torch.zeros_like), "header.*damaged"),
    "a header that is no text": (replaced(HEADER, lambda tensor: tensor | 0x80), "header.*damaged"),
    "a header that is no object": (replaced(HEADER, lambda _: of_text(b"[1]")), "header"),
    "a header of another type": (replaced(HEADER, torch.Tensor.bfloat16), "header"),
    "a header with a misspelt field": (overwritten(HEADER, b'"mode"', b'"node"'), "header"),
    "a truncated manifest": (replaced(MANIFEST, lambda tensor: tensor[:-1]), "manifest.*damaged"),
    "an empty manifest": (replaced(MANIFEST, lambda tensor: tensor[:0]), "manifest.*damaged"),
    "a manifest of zeros": (replaced(MANIFEST, torch.zeros_like), "manifest.*damaged"),
    "a manifest that is no object": (replaced(MANIFEST, lambda _: of_text(b"[1]")), "manifest"),
    "a manifest of another type": (replaced(MANIFEST, torch.Tensor.bfloat16), "manifest"),
    "a manifest without tensors": (edited(MANIFEST, tensors=[]), f"{UP}.*never sent"),
    "a manifest with a misspelt list": (overwritten(MANIFEST, b'"tensors"', b'"sensors"'), "manifest"),
    "a manifest with a misspelt run": (overwritten(MANIFEST, b'"run"', b'"ruN"'), "manifest"),
    "a manifest with a misspelt step": (overwritten(MANIFEST, b'"step"', b'"stop"'), "manifest"),
    "a manifest that lists its first tensor twice": (listed_again(0), UP),
    "a manifest that lists its last tensor twice": (listed_again(-1), IDS),
}

# Found by digests only.
OF_VALUES = {
    "a flipped bit": (replaced(UP, lambda tensor: with_flipped_bit(tensor, 100)), f"{UP}.*digest"),
    "a flipped sign": (replaced(A, lambda tensor: with_flipped_bit(tensor, 31)), f"{A}.*digest"),
    "a double sign flip": (replaced(GATE, lambda tensor: tensor * torch.tensor([1, -1, 1, -1])), f"{GATE}.*digest"),
    "zeros for values": (replaced(B, torch.zeros_like), f"{B}.*digest"),
    "rows exchanged": (replaced(UP, lambda tensor: tensor.flip(0)), f"{UP}.*digest"),
    "two values exchanged": (exchanged_values, f"{UP}.*digest"),
    "the tail overwritten by the next bucket": (
        replaced(A, lambda tensor: torch.cat([tensor[:1], drawn(1, 6, seed=9)])),
        f"{A}.*digest",
    ),
    "an integer off by one": (replaced(IDS, lambda tensor: tensor + 1), f"{IDS}.*digest"),
}


@pytest.mark.parametrize("fault", STRUCTURAL | OF_THE_FORMAT | OF_VALUES)
def test_fault_on_the_wire_is_caught_and_named(fault):
    change, text = (STRUCTURAL | OF_THE_FORMAT | OF_VALUES)[fault]
    with pytest.raises(WeightSyncError, match=text):
        receive(change(list(send())))


@pytest.mark.parametrize("fault", STRUCTURAL)
def test_structural_fault_is_caught_without_digests(fault):
    change, text = STRUCTURAL[fault]
    with pytest.raises(WeightSyncError, match=text):
        receive(change(list(send(digests=False))))


@pytest.mark.parametrize("fault", OF_VALUES)
def test_wrong_values_pass_without_digests(fault):
    # What sync_check=off gives up; if this test fails, the documentation promises too little.
    change, _ = OF_VALUES[fault]
    entries = receive(change(list(send(digests=False))))
    assert [entry.name for entry in entries] == list(some_weights()) and {entry.digest for entry in entries} == {""}


@pytest.mark.parametrize("changes", [dict(run="other"), dict(number=NUMBER - 1), dict(step=STEP - 1)], ids=str)
def test_stale_sync_is_caught_without_digests(changes):
    with pytest.raises(WeightSyncError, match="stale|another training run"):
        receive(list(send(digests=False, **changes)))


def test_every_flipped_bit_of_every_tensor_is_caught_and_named():
    pairs = list(send())
    for index, (name, tensor) in enumerate(pairs[1:-1], 1):
        for bit in range(tensor.nbytes * 8):
            damaged = [*pairs[:index], (name, with_flipped_bit(tensor, bit)), *pairs[index + 1 :]]
            with pytest.raises(WeightSyncError, match=name):
                receive(damaged)


def outcomes_of_flips(name, pairs):
    """What a receiver makes of each flipped bit of header or manifest, where that is no WeightSyncError."""
    index = place(pairs, name)
    wrong = {}
    for bit in range(pairs[index][1].numel() * 8):
        damaged = with_flipped_bit(pairs[index][1], bit)
        text = bytes(damaged.numpy())[max(0, bit // 8 - 12) : bit // 8 + 8]
        try:
            receive([*pairs[:index], (name, damaged), *pairs[index + 1 :]])
        except WeightSyncError:
            continue
        except Exception as error:
            wrong[bit] = f"{type(error).__name__}: {text!r}"
        else:
            wrong[bit] = f"accepted: {text!r}"
    return wrong


@pytest.fixture(scope="module")
def flipped_header():
    """Outcomes for a header with every field, as the first sync of a run sends it."""
    return outcomes_of_flips(HEADER, list(send(**(FULL_HEADER | dict(run=RUN, number=NUMBER)))))


def test_no_flipped_bit_of_a_header_is_accepted(flipped_header):
    # A changed lora_alpha would scale every merged weight, and nothing later would notice.
    assert [outcome for outcome in flipped_header.values() if outcome.startswith("accepted")] == []


def test_every_flipped_bit_of_a_header_that_is_seen_is_a_sync_error(flipped_header):
    assert [outcome for outcome in flipped_header.values() if not outcome.startswith("accepted")] == []


def test_every_flipped_bit_of_a_manifest_is_a_sync_error():
    assert list(outcomes_of_flips(MANIFEST, list(send())).values()) == []


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"lora_alpha": 8.5', b'"lora_alpha": 9.5'),
        (b'"lora_rank": 6', b'"lora_rank": 2'),
        (b'"dtype": "bfloat16"', b'"dtype": "float16"'),
        (b'"mode": "adapter"', b'"mode": "receiver_merge"'),
        (b"layers.1", b"layers.0"),
    ],
)
def test_changed_field_of_a_header_is_caught(old, new):
    # Each of these would merge or load something else than was trained.
    pairs = list(send(**(FULL_HEADER | dict(run=RUN, number=NUMBER))))
    with pytest.raises(WeightSyncError, match="header"):
        receive(overwritten(HEADER, old, new)(pairs))


def random_fault(rng, pairs):
    """One drawn fault of a stream, and the names of which the error has to mention one."""
    tensors = pairs[1:-1]
    name, tensor = tensors[index := rng.randrange(len(tensors))]
    kind = rng.choice(["drop", "duplicate", "exchange names", "move", "truncate", "flip", "dtype", "shape", "extra"])
    damaged, names = list(tensors), {name}
    if kind == "drop":
        del damaged[index]
    elif kind == "duplicate":
        damaged.insert(rng.randrange(len(damaged) + 1), (name, tensor))
    elif kind == "exchange names":
        other = rng.choice([i for i in range(len(tensors)) if i != index])
        damaged[index], damaged[other] = (tensors[other][0], tensor), (name, tensors[other][1])
        names = {name, tensors[other][0]}
    elif kind == "move":
        to = rng.choice([i for i in range(len(tensors)) if i != index])
        damaged.insert(to, damaged.pop(index))
        names = {name for name, _ in tensors[min(to, index) : max(to, index) + 1]}
    elif kind == "truncate":
        damaged[index] = (name, tensor[: rng.randrange(len(tensor))])
    elif kind == "flip":
        flipped = tensor
        for bit in rng.sample(range(tensor.nbytes * 8), rng.randint(1, 3)):
            flipped = with_flipped_bit(flipped, bit)
        damaged[index] = (name, flipped)
    elif kind == "dtype":
        same_size = {
            torch.float32: torch.int32,
            torch.bfloat16: torch.float16,
            torch.float16: torch.bfloat16,
            torch.int64: torch.float64,
            torch.int32: torch.float32,
            torch.uint8: torch.int8,
        }
        damaged[index] = (name, tensor.view(same_size[tensor.dtype]))
    elif kind == "shape":
        damaged[index] = (name, tensor.reshape(1, *tensor.shape) if rng.random() < 0.5 else tensor.unsqueeze(-1))
    else:
        damaged.insert(rng.randrange(len(damaged) + 1), ("model.extra", tensor))
        names = {"model.extra"}
    return [pairs[0], *damaged, pairs[-1]], names


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32))
def test_any_random_fault_in_random_weights_is_caught_and_named(seed):
    rng = random.Random(seed)
    weights = {}
    for index in range(rng.randint(2, 6)):
        shape = [rng.randint(1, 5) for _ in range(rng.randint(1, 3))]
        weights[f"model.{index}.weight"] = drawn(*shape, dtype=rng.choice(DTYPES), seed=rng.randrange(2**31))
    pairs = list(send(weights))
    receive(pairs)
    damaged, names = random_fault(rng, pairs)
    with pytest.raises(WeightSyncError, match="|".join(map(re.escape, names))):
        receive(damaged)


def test_reports_are_compared_like_streams():
    # The engine's report of what it loaded goes through the same comparison, in the trainer.
    sent = [Entry.of(name, tensor, True) for name, tensor in some_weights().items()]
    compare_entries(sent, list(sent), "sent", "loaded", see="engine-holds-other-weights")
    with pytest.raises(WeightSyncError, match=f"{sent[2].name}: was sent.* not loaded"):
        compare_entries(sent, sent[:2] + sent[3:], "sent", "loaded", see="engine-holds-other-weights")
    with pytest.raises(WeightSyncError, match=f"{sent[1].name}: was loaded.* never sent"):
        compare_entries(sent[:1] + sent[2:], sent, "sent", "loaded", see="engine-holds-other-weights")
    with pytest.raises(WeightSyncError, match=f"{sent[0].name}: sent with digest"):
        compare_entries(
            sent,
            [dataclasses.replace(sent[0], digest="xxh3:0"), *sent[1:]],
            "sent",
            "loaded",
            see="engine-holds-other-weights",
        )
    with pytest.raises(WeightSyncError, match=f"{sent[0].name}|{sent[1].name}"):
        compare_entries(sent, [sent[1], sent[0], *sent[2:]], "sent", "loaded", see="engine-holds-other-weights")
