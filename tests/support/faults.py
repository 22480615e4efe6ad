"""Faults of a weight sync, each drawn by seed: what is damaged where, and what the error has to name.

A fault can strike in three places. At the *source*, before the trainer lists and digests what it sends: the manifest
then agrees with the damage, and something else has to notice. On the *network* between the trainer and the adapter
that feeds the engine. In the *transport* from that adapter into vLLM's worker, where the adapter has seen a whole sync
already. Two kinds of fault are in no stream at all: a weight that is lost inside the engine, and a process that stops.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from hybrid_lora_plugin.names import split_factor
from hybrid_lora_plugin.sync.wire import HEADER, MANIFEST, packed, unpacked

Pair = tuple[str, torch.Tensor]
MODES = ("merge", "sparse_merge", "adapter", "receiver_merge")
PARTIAL = ("adapter", "receiver_merge")
SPARSE = ("sparse_merge",)
ON_THE_WAY = ("network", "transport")
OTHER_RUN = "anotherrun"


@dataclass
class Fault:
    """One fault, drawn before anything runs."""

    kind: str
    mode: str
    #: draws everything else: which tensor, which bit
    seed: int
    #: source, network, transport or engine
    where: str
    #: kind of tensor to hit: weight, bias, lora_A, lora_B; another where none of it fits
    part: str = "weight"
    #: trainer rank whose stream, or engine worker, is hit
    rank: int = 0
    #: process to stop, for the kinds that stop the receiver
    process: int = 0
    #: seconds that a silent sender sleeps
    pause: float = 0.0
    #: texts of which the error must have one; known once the fault has struck
    named: list[str] = field(default_factory=list)
    #: the damaged tensor, or what else was hit; known once the fault has struck
    victim: str = ""

    def applied(self, pairs: Iterable[Pair], before: list[Pair]) -> Iterator[Pair]:
        """The stream with this fault in it; ``before`` is an earlier sync, whole."""
        kind = KINDS[self.kind]
        if kind.stops:
            yield from _stopping(list(pairs), self)
            return
        damaged, victims, words = kind.damage(list(pairs), _Draw(self), before)
        self.victim, self.named = ", ".join(victims), [*victims, *words]
        yield from damaged


@dataclass(frozen=True)
class Kind:
    """What is known of all faults of one kind."""

    #: (pairs, draw, an earlier sync) -> (damaged pairs, names of damaged tensors, other texts that identify the fault)
    damage: Callable[[list[Pair], _Draw, list[Pair]], tuple[list[Pair], list[str], list[str]]] | None = None
    modes: tuple[str, ...] = MODES
    where: tuple[str, ...] = ON_THE_WAY
    #: for the kinds that stop a process in the middle of a transfer: the texts of which the error must have one
    stops: tuple[str, ...] = ()
    #: waits for a limit: drawn once for each mode
    slow: bool = False
    #: costs a replica: not drawn with the others
    kill: bool = False
    #: fewest trainer ranks that it takes
    ranks: int = 1


class _Draw:
    """Choices of one fault."""

    def __init__(self, fault: Fault):
        self.random = random.Random(fault.seed)
        self.part, self.where = fault.part, fault.where

    def index(self, pairs: list[Pair], fits: Callable[[str, torch.Tensor], bool] = lambda name, tensor: True) -> int:
        """Index of a tensor that fits, of the asked part if one of it does."""
        fitting = [i for i, (name, tensor) in enumerate(pairs) if name not in (HEADER, MANIFEST) and fits(name, tensor)]
        return self.random.choice([i for i in fitting if part_of(pairs[i][0]) == self.part] or fitting)


def part_of(name: str) -> str:
    """weight, bias, lora_A or lora_B."""
    factor = split_factor(name)
    if factor:
        return f"lora_{factor[1]}"
    return "bias" if name.endswith(".bias") else "weight"


def _replaced(pairs: list[Pair], index: int, tensor: torch.Tensor, name: str | None = None) -> list[Pair]:
    return [*pairs[:index], (name or pairs[index][0], tensor), *pairs[index + 1 :]]


def _flipped(tensor: torch.Tensor, draw: _Draw) -> torch.Tensor:
    tensor = tensor.clone()
    data = tensor.reshape(-1).view(torch.uint8)
    data[draw.random.randrange(data.numel())] ^= 1 << draw.random.randrange(8)
    return tensor


# -- on the way: pairs with header and manifest ---------------------------------------------------------------------


def _dropped(pairs, draw, before):
    index = draw.index(pairs)
    return pairs[:index] + pairs[index + 1 :], [pairs[index][0]], []


def _dropped_module(pairs, draw, before):
    """Both factors of a module, or its weight and bias."""
    name = pairs[draw.index(pairs)][0]
    module = (split_factor(name) or (name.rpartition(".")[0],))[0]
    lost = [name for name, _ in pairs if name.startswith(module + ".")]
    return [pair for pair in pairs if pair[0] not in lost], lost, []


def _dropped_header(pairs, draw, before):
    return pairs[1:], [], ["header"]


def _dropped_manifest(pairs, draw, before):
    return pairs[:-1], [], ["without its manifest"]


def _ended_early(pairs, draw, before):
    index = draw.index(pairs[:1] + pairs[2:]) + 1
    return pairs[:index], [pairs[index - 1][0]], []


def _duplicated(pairs, draw, before):
    index = draw.index(pairs)
    later = draw.random.randrange(index, len(pairs) - 1)
    return [*pairs[: later + 1], pairs[index], *pairs[later + 1 :]], [pairs[index][0]], []


def _reordered(pairs, draw, before):
    index = draw.index(pairs[:-2])
    first, second = pairs[index : index + 2]
    return [*pairs[:index], second, first, *pairs[index + 2 :]], [first[0], second[0]], []


def _exchanged(pairs, draw, before):
    """Two tensors, of one shape if there are, under each other's names."""

    def others(tensor: torch.Tensor) -> list[int]:
        return [i for i, (_, o) in enumerate(pairs) if o.shape == tensor.shape and not torch.equal(o, tensor)]

    if any(others(tensor) for name, tensor in pairs if name not in (HEADER, MANIFEST)):
        first = draw.index(pairs, lambda name, tensor: bool(others(tensor)))
        second = draw.random.choice(others(pairs[first][1]))
    else:  # lists of elements are hardly ever of one length
        first = draw.index(pairs)
        second = draw.index(pairs, lambda name, tensor: name != pairs[first][0])
    swapped = _replaced(_replaced(pairs, first, pairs[second][1]), second, pairs[first][1])
    return swapped, [pairs[first][0], pairs[second][0]], []


def _truncated(pairs, draw, before):
    index = draw.index(pairs)
    return _replaced(pairs, index, pairs[index][1][:-1].clone()), [pairs[index][0]], []


def _flipped_bit(pairs, draw, before):
    index = draw.index(pairs)
    return _replaced(pairs, index, _flipped(pairs[index][1], draw)), [pairs[index][0]], []


def _stale_tensor(pairs, draw, before):
    """One tensor of an earlier sync among those of this one."""
    old = dict(before)
    index = draw.index(pairs, lambda name, tensor: name in old and not torch.equal(old[name], tensor))
    return _replaced(pairs, index, old[pairs[index][0]]), [pairs[index][0]], []


def _stale_sync(pairs, draw, before):
    """All of an earlier sync, complete and consistent."""
    return list(before), [], ["the weights are stale"]


def _wrong_shape(pairs, draw, before):
    """As many elements in another shape."""
    index = draw.index(pairs, lambda name, tensor: tensor.dim() == 1 or tensor.shape[0] != tensor.shape[1])
    tensor = pairs[index][1]
    other = tensor[None] if tensor.dim() == 1 else tensor.reshape(tensor.shape[::-1])
    return _replaced(pairs, index, other.clone()), [pairs[index][0]], []


def _wrong_dtype(pairs, draw, before):
    index = draw.index(pairs)
    return _replaced(pairs, index, pairs[index][1].half()), [pairs[index][0]], []


def _other_run(pairs, draw, before):
    """The header of another training run; in the transport all of its sync, which is consistent in itself."""

    def of_other_run(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return packed(unpacked(tensor, name) | {"run": OTHER_RUN})

    exchanged = (HEADER,) if draw.where == "network" else (HEADER, MANIFEST)
    return [(name, of_other_run(name, t) if name in exchanged else t) for name, t in pairs], [], [OTHER_RUN]


def _other_base(pairs, draw, before):
    """A sync that was made for the weights before the last."""
    content = unpacked(pairs[0][1], HEADER)
    changed = packed(content | {"base_number": content["base_number"] - 1})
    return _replaced(pairs, 0, changed), [], ["has only what changed since sync"]


def _damaged_header(pairs, draw, before):
    return _replaced(pairs, 0, _flipped(pairs[0][1], draw)), [], ["header"]


def _damaged_manifest(pairs, draw, before):
    return _replaced(pairs, len(pairs) - 1, _flipped(pairs[-1][1], draw)), [], ["manifest"]


# -- at the source: pairs without header and manifest ---------------------------------------------------------------


def _wrong_dtype_sent(pairs, draw, before):
    """A tensor that has lost precision; a norm's ones would not."""
    index = draw.index(pairs, lambda name, tensor: not torch.equal(tensor, tensor.half().to(tensor.dtype)))
    return _replaced(pairs, index, pairs[index][1].half()), [pairs[index][0]], []


def _shard(pairs, draw, before):
    """Half of a tensor, as a rank would send that forgot to gather it."""
    index = draw.index(pairs, lambda name, tensor: tensor.shape[0] % 2 == 0)
    tensor = pairs[index][1]
    return _replaced(pairs, index, tensor[: tensor.shape[0] // 2].clone()), [pairs[index][0]], []


def _adapter_of_another_rank(pairs, draw, before):
    """Every factor, of half the LoRA rank."""
    changed, factors = [], []
    for name, tensor in pairs:
        factor = split_factor(name)
        if factor:
            rank = tensor.shape[0 if factor[1] == "A" else 1] // 2
            tensor = (tensor[:rank] if factor[1] == "A" else tensor[:, :rank]).clone()
            factors.append(name)
        changed.append((name, tensor))
    return changed, factors, []


def _unknown_name(pairs, draw, before):
    """A tensor under the name of a layer that the model does not have."""
    index = draw.index(pairs, lambda name, tensor: ".layers." in name)
    name = pairs[index][0]
    before_layer, _, rest = name.partition(".layers.")
    unknown = f"{before_layer}.layers.77.{rest.partition('.')[2]}"
    return _replaced(pairs, index, pairs[index][1], unknown), [unknown, name], []


def _other_values(pairs, draw, before):
    """A rank with other weights than the others: everything it sends is consistent in itself."""
    index = draw.index(pairs)
    tensor = pairs[index][1]
    return _replaced(pairs, index, tensor + (0.5 if tensor.is_floating_point() else 1)), [pairs[index][0]], []


def _dropped_element(pairs, draw, before):
    """A list of elements that lacks one, so that all behind it go elsewhere."""
    index = draw.index(pairs, _is_list)
    elements = pairs[index][1]
    lost = draw.random.randrange(len(elements))
    return _replaced(pairs, index, torch.cat([elements[:lost], elements[lost + 1 :]])), [pairs[index][0]], []


def _shifted_gap(pairs, draw, before):
    index = draw.index(pairs, _is_list)
    elements = pairs[index][1].clone()
    elements[draw.random.randrange(len(elements)), 0] += 1
    return _replaced(pairs, index, elements), [pairs[index][0]], []


def _is_list(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.int16


# -- processes ------------------------------------------------------------------------------------------------------


def _stopping(pairs: list[Pair], fault: Fault) -> Iterator[Pair]:
    """Something happens to a process when part of the stream has gone out."""
    index = random.Random(fault.seed).randrange(len(pairs) // 3, len(pairs) - 1)
    fault.victim, fault.named = pairs[index][0], list(KINDS[fault.kind].stops)
    yield from pairs[:index]
    if fault.kind == "sender killed":
        os._exit(1)
    if fault.kind == "receiver killed":
        os.kill(fault.process, signal.SIGKILL)
    if fault.kind == "receiver silent":
        os.kill(fault.process, signal.SIGSTOP)
    if fault.kind == "sender silent":
        time.sleep(fault.pause)
    yield from pairs[index:]


_SOURCE = {"where": ("source",)}
_ENGINE = {"where": ("engine",), "modes": PARTIAL + SPARSE}
_PROCESS = {"where": ("transport",), "slow": True}

KINDS = {
    "tensor dropped": Kind(_dropped),
    "module dropped": Kind(_dropped_module),
    "header dropped": Kind(_dropped_header),
    "manifest dropped": Kind(_dropped_manifest),
    "ended early": Kind(_ended_early),
    # In the transport verl puts a bucket's tensors into a dictionary: there are no two of one name.
    "tensor duplicated": Kind(_duplicated, where=("network",)),
    "tensors reordered": Kind(_reordered),
    "tensors exchanged": Kind(_exchanged),
    "tensor truncated": Kind(_truncated),
    "bit flipped": Kind(_flipped_bit),
    "stale tensor": Kind(_stale_tensor),
    "stale sync": Kind(_stale_sync),
    "wrong shape": Kind(_wrong_shape),
    "wrong dtype": Kind(_wrong_dtype),
    "other run": Kind(_other_run),
    "header damaged": Kind(_damaged_header),
    "manifest damaged": Kind(_damaged_manifest),
    "tensor never sent": Kind(_dropped, **_SOURCE),
    "wrong dtype sent": Kind(_wrong_dtype_sent, **_SOURCE),
    "shard sent": Kind(_shard, **_SOURCE),
    "adapter of another rank": Kind(_adapter_of_another_rank, modes=PARTIAL, **_SOURCE),
    "unknown name sent": Kind(_unknown_name, **_SOURCE),
    "element dropped": Kind(_dropped_element, modes=SPARSE, **_SOURCE),
    "gap shifted": Kind(_shifted_gap, modes=SPARSE, **_SOURCE),
    "other base": Kind(_other_base, modes=SPARSE),
    "ranks differ": Kind(_other_values, ranks=2, **_SOURCE),
    "engine lost a weight": Kind(**_ENGINE),
    "sender silent": Kind(stops=("nothing from the trainer",), **_PROCESS),
    "receiver silent": Kind(stops=("nothing from the rollout engine",), **_PROCESS),
    "sender killed": Kind(stops=("trainer closed the connection",), kill=True, **_PROCESS),
    "receiver killed": Kind(
        stops=("rollout engine closed the connection", "rollout engine failed"), kill=True, **_PROCESS
    ),
}


# -- drawing -------------------------------------------------------------------------------------------------------


def combinations(modes: tuple[str, ...], tensor_parallel: int, slow: bool = True) -> list[tuple[str, str]]:
    """Every kind of fault in every mode that it applies to, those that kill a process left out."""
    return [
        (kind, mode)
        for kind, known in KINDS.items()
        for mode in modes
        if mode in known.modes and not known.kill and known.ranks <= tensor_parallel and (slow or not known.slow)
    ]


def draw_faults(
    count: int, seed: int, modes: tuple[str, ...] = MODES, tensor_parallel: int = 1, slow: bool = True
) -> list[Fault]:
    """``count`` faults in random order, every combination of kind and mode among them.

    Args:
        slow: also those that wait for a limit, once for each mode.

    Raises:
        ValueError: fewer than there are combinations.
    """
    draw = random.Random(seed)
    chosen = combinations(modes, tensor_parallel, slow)
    if count < len(chosen):
        raise ValueError(f"{count} faults, wanted at least {len(chosen)}: one of every kind in every mode")
    quick = combinations(modes, tensor_parallel, slow=False)
    chosen += [draw.choice(quick) for _ in range(count - len(chosen))]
    draw.shuffle(chosen)
    return [draw_fault(kind, mode, draw.randrange(10**6), tensor_parallel) for kind, mode in chosen]


def draw_fault(kind: str, mode: str, seed: int, tensor_parallel: int = 1) -> Fault:
    """One fault of that kind: where on the way it strikes, on which rank, and what kind of tensor."""
    draw = random.Random(seed)
    parts = ["weight", "bias", "lora_A", "lora_B"] if mode in PARTIAL else ["weight", "bias"]
    return Fault(
        kind,
        mode,
        seed,
        where=draw.choice(KINDS[kind].where),
        part=draw.choice(parts),
        rank=draw.randrange(tensor_parallel),
    )
