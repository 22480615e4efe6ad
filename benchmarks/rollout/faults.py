"""Faults of a weight sync, each drawn by seed: what is damaged, and what the error has to name.

A fault at the source happens before the trainer lists and digests what it sends: then the manifest agrees with the
damage, and something else has to notice. All others happen on the way.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from hybrid_lora_plugin.sync.modes import split_factor
from hybrid_lora_plugin.sync.wire import HEADER, MANIFEST, packed, unpacked

Pair = tuple[str, torch.Tensor]


@dataclass
class Fault:
    """One fault.

    ``place`` in [0, 1) says where in the stream; ``victims`` are the tensors' names, known after the sync.
    """

    kind: str
    place: float
    #: process to kill, for the kinds that kill the receiver
    process: int = 0

    def at_the_source(self, tensors: Iterable[Pair]) -> Iterator[Pair]:
        """The trainer's tensors, damaged before they are listed, for the kinds that are called ``source …``."""
        if not self.kind.startswith("source"):
            yield from tensors
            return
        pairs = list(tensors)
        yield from SOURCE[self.kind](pairs, self.place)


def with_fault(stream: Iterable[Pair], fault: Fault | None, before: list[Pair]) -> Iterator[Pair]:
    """A sync with ``fault`` on its way; ``before`` is an earlier sync, whole."""
    if fault is None or fault.kind.startswith("source"):
        yield from stream
        return
    if fault.kind in PROCESSES:
        yield from _stopped(iter(stream), fault)
        return
    pairs = [(name, tensor.clone()) for name, tensor in stream]
    yield from WIRE[fault.kind](pairs, fault.place, before)


def names_in(pairs: Iterable[Pair]) -> list[str]:
    """Names of the tensors proper."""
    return [name for name, _ in pairs if name not in (HEADER, MANIFEST)]


def _at(pairs: list[Pair], place: float, wanted=lambda name, tensor: True) -> int:
    """Index of the tensor at ``place`` among those that fit."""
    fitting = [i for i, (name, tensor) in enumerate(pairs) if name not in (HEADER, MANIFEST) and wanted(name, tensor)]
    return fitting[int(place * len(fitting))]


def _replaced(pairs: list[Pair], index: int, tensor: torch.Tensor) -> list[Pair]:
    return [*pairs[:index], (pairs[index][0], tensor), *pairs[index + 1 :]]


# -- on the way: (pairs with header and manifest, place, an earlier sync) -> pairs ----------------------------------


def _dropped(pairs, place, before):
    index = _at(pairs, place)
    return pairs[:index] + pairs[index + 1 :]


def _dropped_pair(pairs, place, before):
    """A module's both factors, or weight and bias."""
    name, _ = pairs[_at(pairs, place)]
    module = (split_factor(name) or (name.rpartition(".")[0],))[0]
    return [pair for pair in pairs if not pair[0].startswith(module + ".")]


def _dropped_header(pairs, place, before):
    return pairs[1:]


def _dropped_manifest(pairs, place, before):
    return pairs[:-1]


def _ended_early(pairs, place, before):
    return pairs[: _at(pairs, place)]


def _duplicated(pairs, place, before):
    index = _at(pairs, place)
    later = random.Random(place).randrange(index, len(pairs) - 1)
    return [*pairs[: later + 1], pairs[index], *pairs[later + 1 :]]


def _reordered(pairs, place, before):
    index = _at(pairs[:-2], place)
    return [*pairs[:index], pairs[index + 1], pairs[index], *pairs[index + 2 :]]


def _exchanged(pairs, place, before):
    """Two tensors of one shape under each other's names."""
    shapes = [tensor.shape for name, tensor in pairs if name not in (HEADER, MANIFEST)]
    first = _at(pairs, place, lambda name, tensor: shapes.count(tensor.shape) > 1)
    second = next(
        i
        for i, (name, tensor) in enumerate(pairs)
        if i != first and tensor.shape == pairs[first][1].shape and not torch.equal(tensor, pairs[first][1])
    )
    return _replaced(_replaced(pairs, first, pairs[second][1]), second, pairs[first][1])


def _truncated(pairs, place, before):
    index = _at(pairs, place)
    return _replaced(pairs, index, pairs[index][1][:-1].clone())


def _flipped_bit(pairs, place, before):
    index = _at(pairs, place)
    tensor = pairs[index][1].clone()
    data = tensor.reshape(-1).view(torch.uint8)
    draw = random.Random(place)
    position, bit = draw.randrange(data.numel()), draw.randrange(8)
    data[position] ^= 1 << bit
    return _replaced(pairs, index, tensor)


def _stale(pairs, place, before):
    """One tensor of an earlier sync among those of this one."""
    old = dict(before)
    index = _at(pairs, place, lambda name, tensor: name in old and not torch.equal(old[name], tensor))
    return _replaced(pairs, index, old[pairs[index][0]])


def _stale_sync(pairs, place, before):
    """All of an earlier sync, complete and consistent."""
    return list(before)


def _wrong_shape(pairs, place, before):
    index = _at(pairs, place, lambda name, tensor: tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1])
    tensor = pairs[index][1]
    return _replaced(pairs, index, tensor.reshape(tensor.shape[::-1]).clone())


def _wrong_dtype(pairs, place, before):
    index = _at(pairs, place)
    tensor = pairs[index][1]
    return _replaced(pairs, index, tensor.to(torch.float16 if tensor.dtype != torch.float16 else torch.float32))


def _other_run(pairs, place, before):
    """Another training run's header."""
    content = unpacked(pairs[0][1], "header")
    content["run"] = "anotherrun"
    return [(HEADER, packed(content)), *pairs[1:]]


def _damaged_manifest(pairs, place, before):
    data = pairs[-1][1].clone()
    data[int(place * data.numel())] ^= 4
    return [*pairs[:-1], (MANIFEST, data)]


WIRE = {
    "dropped": _dropped,
    "dropped pair": _dropped_pair,
    "dropped header": _dropped_header,
    "dropped manifest": _dropped_manifest,
    "ended early": _ended_early,
    "duplicated": _duplicated,
    "reordered": _reordered,
    "exchanged": _exchanged,
    "truncated": _truncated,
    "flipped bit": _flipped_bit,
    "stale tensor": _stale,
    "stale sync": _stale_sync,
    "wrong shape": _wrong_shape,
    "wrong dtype": _wrong_dtype,
    "other run": _other_run,
    "damaged manifest": _damaged_manifest,
}


# -- at the source: (pairs without header and manifest, place) -> pairs -----------------------------------------------


def _source_dropped(pairs, place):
    index = _at(pairs, place)
    return pairs[:index] + pairs[index + 1 :]


def _source_shard(pairs, place):
    """Half of a tensor, as a rank would send that forgot to gather it."""
    index = _at(pairs, place, lambda name, tensor: tensor.shape[0] % 2 == 0)
    return _replaced(pairs, index, pairs[index][1][: pairs[index][1].shape[0] // 2].clone())


def _source_other_rank(pairs, place):
    """Every factor of an adapter of half the rank; where none is sent, half of one weight."""
    if not any(split_factor(name) for name, _ in pairs):
        return _source_shard(pairs, place)
    halved = []
    for name, tensor in pairs:
        factor = split_factor(name)
        if factor:
            rank = min(tensor.shape)
            tensor = (tensor[: rank // 2] if factor[1] == "A" else tensor[:, : rank // 2]).clone()
        halved.append((name, tensor))
    return halved


def _source_unknown(pairs, place):
    index = _at(pairs, place)
    name, tensor = pairs[index]
    return [
        *pairs[:index],
        (name.replace("layers.0", "layers.77").replace("layers.1", "layers.77"), tensor),
        *pairs[index + 1 :],
    ]


SOURCE = {
    "source dropped": _source_dropped,
    "source shard": _source_shard,
    "source other rank": _source_other_rank,
    "source unknown name": _source_unknown,
}


# -- processes ------------------------------------------------------------------------------------------------


def _stopped(stream: Iterator[Pair], fault: Fault) -> Iterator[Pair]:
    """Something happens to a process when part of the stream has gone out."""
    count = 2 + int(fault.place * 6)
    for _, pair in zip(range(count), stream, strict=False):
        yield pair
    if fault.kind == "sender killed":
        os._exit(1)
    if fault.kind == "receiver killed":
        os.kill(fault.process, signal.SIGKILL)
    if fault.kind == "sender silent":
        time.sleep(fault.process)
    yield from stream


PROCESSES = ("sender killed", "receiver killed", "sender silent")
#: not in a stream: weights that no sync sends change in the engine, as a sleep that discards them would do
ENGINE = ("engine lost a weight",)
