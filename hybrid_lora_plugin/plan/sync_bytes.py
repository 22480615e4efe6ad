"""What a weight sync sends in each mode: every tensor by name and shape, and the header and manifest around them.

``benchmarks/sync_sizes.py`` runs the plugin's own sender and comes to the same bytes (tests/test_plan_sync.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from hybrid_lora_plugin.names import plain_name, wire_factor
from hybrid_lora_plugin.plan.model import PlannedModel
from hybrid_lora_plugin.plan.run import HYBRID, Run
from hybrid_lora_plugin.plan.training import itemsize
from hybrid_lora_plugin.sync.element_list import ELEMENT_BYTES
from hybrid_lora_plugin.sync.modes import SYNC_MODES, sync_mode
from hybrid_lora_plugin.sync.wire import Entry, SyncHeader, bucket_mebibytes, packed, rows_of
from hybrid_lora_plugin.training.apply import parts_of

#: of the elements that train, the share that changes in 1 and in 4 optimizer steps at the paper's rates, by the
#: rollout's type: the most measured on SmolLM2-135M (docs/sync-fidelity.md); a model with smaller weights changes more
CHANGED = {"bfloat16": (0.010, 0.032), "float16": (0.054, 0.154)}
#: as long as the digests of an accelerator and of the host are
_KEYED, _HASHED = "keyed:" + "0" * 16, "xxh3:" + "0" * 32


@dataclass(frozen=True)
class SyncBytes:
    """One sync.

    Attributes:
        mode: ``hybrid_lora.sync``, or what verl itself does.
        sent: bytes, to each rollout worker or replica.
        first: of the first sync of a run, where that is another number.
        buffer: of the transfer buffer on each GPU.
        trainer: what the trainer holds of it besides on each GPU: the largest tensor, whole, on its way.
        assumed: what ``sent`` takes for granted; "" where it is exact.
    """

    mode: str
    sent: int
    first: int
    buffer: int
    trainer: int
    assumed: str = ""


def sync_bytes(model: PlannedModel, run: Run, mode: str) -> SyncBytes:
    """One sync of a hybrid run.

    Args:
        model: under an allocation.
        run: with a rollout engine of 16 or 32 bits.
        mode: of ``SYNC_MODES``.
    """
    dtype = getattr(torch, run.rollout.dtype)
    limit = run.rollout.bucket_bytes >> 20
    buffer = bucket_mebibytes(sync_mode(mode).payload_bytes(model.counts, dtype), limit) << 20
    whole = _stream_bytes(model, run, mode)
    trainer = _trainer_bytes(model, run, mode)
    if mode != "sparse_merge":
        return SyncBytes(mode, whole, whole, buffer, trainer)
    if run.rollout.dtype not in CHANGED:
        return SyncBytes(mode, whole, whole, buffer, trainer, "refused: it needs rollouts in 16 bits")
    share = changed_share(run.rollout.dtype, run.mini_batches)
    return SyncBytes(
        mode, _lists_bytes(model, run, share), whole, buffer, trainer, f"{share:.1%} of what trains changes in a step"
    )


def changed_share(dtype: str, steps: int) -> float:
    """The share of what trains that changes in so many optimizer steps: a power law through the two that are known."""
    one, four = CHANGED[dtype]
    return min(1.0, one * steps ** math.log(four / one, 4))


def all_modes(model: PlannedModel, run: Run) -> list[SyncBytes]:
    """Every mode of a hybrid run, or what verl itself sends."""
    if run.training == HYBRID:
        return [sync_bytes(model, run, mode) for mode in SYNC_MODES]
    return [_verls_own(model, run)]


def _verls_own(model: PlannedModel, run: Run) -> SyncBytes:
    held = itemsize(run.held_dtype)
    if run.rollout.adapter:
        sent = held * model.counts.lora
        return SyncBytes("verl, adapter", sent, sent + _state_bytes(model, held), run.rollout.bucket_bytes, sent)
    # A tied output head travels twice; with adapters verl casts what it has merged.
    width = held if run.training != "lora" else itemsize(run.rollout.dtype)
    sent = _state_bytes(model, width)
    largest = max(parameter.numel() for parameter in model.plain.parameters())
    return SyncBytes("verl, every weight", sent, sent, run.rollout.bucket_bytes, largest * held)


def _state_bytes(model: PlannedModel, width: int) -> int:
    return width * sum(tensor.numel() for tensor in model.plain.state_dict().values() if tensor.is_floating_point())


def _tensors(model: PlannedModel, run: Run, mode: str) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
    """Name, shape and type of what a sync streams, in its order."""
    dtype = getattr(torch, run.rollout.dtype)
    parts = parts_of(model.trained)
    tied = model.plain.get_output_embeddings().weight is model.plain.get_input_embeddings().weight
    # In the order of the state; what an adapter is on keeps its place.
    weights = {
        name: tensor.shape
        for name, tensor in model.plain.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    if not sync_mode(mode).partial:
        yield from ((name, shape, dtype) for name, shape in weights.items())
        return
    factors = torch.float32 if sync_mode(mode).receiver_merges else dtype
    adapted = set(parts.lora_modules)
    for name, shape in weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in adapted:
            yield wire_factor(module, "A"), torch.Size((run.lora_rank, shape[1])), factors
            yield wire_factor(module, "B"), torch.Size((shape[0], run.lora_rank)), factors
    full = {plain_name(name) for name in parts.trained}
    yield from ((name, shape, dtype) for name, shape in weights.items() if name in full)


def _stream_bytes(model: PlannedModel, run: Run, mode: str) -> int:
    """Bytes of a whole sync as the plugin sends it from an accelerator with ``sync_check=digest``."""
    parts, kind = parts_of(model.trained), sync_mode(mode)
    tensors = list(_tensors(model, run, mode))
    base: dict[str, str] = {}
    if kind.partial:
        full = {plain_name(name) for name in parts.trained}
        tied = model.plain.get_output_embeddings().weight is model.plain.get_input_embeddings().weight
        base = {
            name: _HASHED
            for name in model.plain.state_dict()
            if name not in full and not (tied and name == "lm_head.weight")
        }
    merged = {f"{parts.lora_modules[1]}.weight": _KEYED} if kind.receiver_merges else {}
    header = SyncHeader(
        run="0" * 12,
        number=1,
        mode=mode,
        dtype=run.rollout.dtype,
        digests=True,
        lora_rank=run.lora_rank,
        lora_alpha=float(run.lora_alpha),
        lora_modules=list(parts.lora_modules),
        base=base,
        merged=merged,
        payload_bytes=kind.payload_bytes(model.counts, getattr(torch, run.rollout.dtype)),
    )
    entries = [Entry(name, tuple(shape), str(dtype).removeprefix("torch."), _KEYED) for name, shape, dtype in tensors]
    manifest = {"run": header.run, "number": 1, "step": None, "tensors": rows_of(entries)}
    payload = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in tensors)
    return payload + packed(asdict(header)).nbytes + packed(manifest).nbytes


def _lists_bytes(model: PlannedModel, run: Run, share: float) -> int:
    """A later sync of ``sparse_merge`` in which that share of every weight that trains changed."""
    parts, dtype = parts_of(model.trained), getattr(torch, run.rollout.dtype)
    names = {f"{module}.weight" for module in parts.lora_modules} | {plain_name(name) for name in parts.trained}
    numbers = {name: tensor.numel() for name, tensor in model.plain.state_dict().items() if name in names}
    changed = {name: math.ceil(share * elements) for name, elements in numbers.items()}
    # As long as the numbers of a run are.
    row = {"changed": 10**6, "sent": 10**6, "new": -(2**62), "old": -(2**62), "in_full": -(2**62)}
    manifest = {
        "run": "0" * 12,
        "number": 100,
        "step": 100,
        "tensors": [[name, [count, 2], "int16", _KEYED] for name, count in changed.items()],
        "account": {"part": 10, "parts": 16, "tensors": dict.fromkeys(changed, row)},
    }
    header = SyncHeader(
        run="0" * 12,
        number=100,
        mode="sparse_merge",
        dtype=run.rollout.dtype,
        digests=True,
        base_number=99,
        lora_rank=run.lora_rank,
        lora_alpha=float(run.lora_alpha),
        lora_modules=list(parts.lora_modules),
        payload_bytes=model.counts.frozen * 2,
    )
    # Where half of a weight changed it is sent itself.
    lists = sum(min(ELEMENT_BYTES * count, dtype.itemsize * numbers[name]) for name, count in changed.items())
    return lists + packed(asdict(header)).nbytes + packed(manifest).nbytes


def _trainer_bytes(model: PlannedModel, run: Run, mode: str) -> int:
    """The most that one tensor takes on its way: gathered, merged in fp32 and rounded."""
    sent, held = itemsize(run.rollout.dtype), itemsize(run.held_dtype)
    full = {plain_name(name) for name in parts_of(model.trained).trained}
    adapted = {f"{name}.weight" for name in parts_of(model.trained).lora_modules}
    most = 0
    for name, parameter in model.plain.named_parameters():
        if name in full:
            width = 4 + sent
        elif sync_mode(mode).partial:
            continue
        elif name in adapted:
            # The base, the update, their sum and what is sent of it.
            width = held + 4 + 4 + sent
        else:
            width = held + (sent if run.held_dtype != run.rollout.dtype else 0)
        most = max(most, parameter.numel() * width)
    return most
