"""The stream of one weight sync: its form, and the sending end; ``received`` checks what came out of it.

A stream of named tensors is all that verl's transports carry, so everything travels in it: first a header (which run,
which sync, how to read the rest), then the tensors, then a manifest that lists every tensor with shape, dtype and
digest in the order sent. Header and manifest are JSON in uint8 tensors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.digest import digest_of, digest_soon
from hybrid_lora_plugin.training.rounding import Rounding

if TYPE_CHECKING:
    from hybrid_lora_plugin.sync.sent_weights import Changes

HEADER, MANIFEST = "hybrid_lora.sync.header", "hybrid_lora.sync.manifest"
VERSION = 5
#: bytes of the digest in front of header and manifest, and what both together are a multiple of
_SEAL, _ALIGNMENT = 32, 64
#: room in a transfer buffer for header, manifest and alignment
_SLACK_MIB = 16


def bucket_mebibytes(payload_bytes: int, limit: int) -> int:
    """Size of a transfer buffer: ``limit`` MiB, or less where a whole sync is smaller (0 bytes: not known)."""
    return min(limit, (payload_bytes >> 20) + _SLACK_MIB) if payload_bytes else limit


@dataclass
class SyncHeader:
    """What the receiver has to know before the first tensor."""

    #: drawn once by the training run; two runs on one machine cannot take each other's weights
    run: str
    #: 1, 2, 3, … within the run
    number: int
    #: merge, sparse_merge, adapter or receiver_merge
    mode: str
    #: dtype the rollout engine computes in, e.g. "bfloat16"
    dtype: str
    #: whether tensors carry digests and are read back after loading
    digests: bool
    #: sync of the same run whose weights this one changes; 0 where it stands for itself
    base_number: int = 0
    lora_rank: int = 0
    lora_alpha: float = 0.0
    #: modules with an adapter, plain names
    lora_modules: list[str] = field(default_factory=list)
    #: digest of every original weight that the rollout engine keeps or merges into; see ``base_check``
    base: dict[str, str] = field(default_factory=dict)
    #: how merged and fully tuned weights become ``dtype``: stochastic or nearest, and the seed of the thresholds
    rounding_mode: str = "nearest"
    rounding_seed: int = 0
    #: bytes of all tensors together, or the most that they can be; 0 where nobody knows. No larger buffer is needed
    payload_bytes: int = 0
    #: digest of a merged weight by name, another one in each sync: the receiver's own merge must come to the same bits
    merged: dict[str, str] = field(default_factory=dict)
    #: where the receiver keeps the original weights it merges into: memory_map or pinned
    base_storage: str = "memory_map"
    #: fixed prompts with the trainer's log-probabilities and the limits; empty unless the check is asked for
    fixed_prompt: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def scaling(self) -> float:
        """LoRA's scaling s = alpha / rank."""
        return self.lora_alpha / self.lora_rank

    @property
    def rounding(self) -> Rounding:
        return Rounding(self.rounding_mode, self.rounding_seed)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Entry:
    """One tensor of a manifest or of a receiver's report."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    #: empty where the sync carries no digests
    digest: str = ""

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, digests: bool) -> Entry:
        return cls(
            name,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            digest_of(tensor) if digests else "",
        )

    @classmethod
    def soon(cls, name: str, tensor: torch.Tensor, digests: bool) -> Callable[[], Entry]:
        """``of``, with the digest computed meanwhile; the returned function waits for it."""
        digest = digest_soon(tensor) if digests else str
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        return lambda: cls(name, shape, dtype, digest())


def packed(content: dict[str, Any], device="cpu") -> torch.Tensor:
    """JSON and a digest of it as a uint8 tensor on ``device``, which any transport of tensors carries."""
    text = json.dumps(content).encode()
    # verl's checkpoint engines pack a bucket without gaps and view what follows by its dtype.
    text += b" " * (-(_SEAL + len(text)) % _ALIGNMENT)
    return torch.frombuffer(bytearray(_seal(text) + text), dtype=torch.uint8).to(device)


def _seal(text: bytes) -> bytes:
    """In front of header and manifest: a digit changed on the way would be valid JSON."""
    return xxhash.xxh3_128_hexdigest(text).encode()


def unpacked(tensor: torch.Tensor, what: str) -> dict[str, Any]:
    """What ``packed`` packed; WeightSyncError, calling it ``what``, where it is not that any more."""
    data = bytes(tensor.cpu().numpy()) if tensor.dtype == torch.uint8 else b""
    if data[:_SEAL] != _seal(data[_SEAL:]):
        raise WeightSyncError(
            f"the {what} of the sync is damaged: {tensor.nbytes} bytes, not those that were sent",
            see="tensors-changed-on-the-way",
        )
    return json.loads(data[_SEAL:])


def read_header(name: str, tensor: torch.Tensor) -> SyncHeader:
    """The header, from the first pair of a stream.

    Raises:
        WeightSyncError: the first tensor is another one, is damaged, or is of a version this plugin does not read.
    """
    if name != HEADER:
        raise WeightSyncError(
            f"the sync begins with {name!r}, wanted its header: the start of the stream was lost",
            see="sync-with-parts-missing-or-repeated",
        )
    content = unpacked(tensor, "header")
    if content.get("version") != VERSION:
        raise WeightSyncError(
            f"the sync has format version {content.get('version')}, this side reads {VERSION}; install one version of "
            "hybrid-lora-plugin for trainer and rollout engine",
            see="another-format-version",
        )
    return SyncHeader(**content)


def read_manifest(tensor: torch.Tensor) -> tuple[dict[str, Any], list[Entry]]:
    """A manifest, as its JSON and as the entries it lists."""
    content = unpacked(tensor, "manifest")
    return content, entries_of(content["tensors"])


def rows_of(entries: Iterable[Entry]) -> list[list]:
    """Entries as JSON holds them, one row each."""
    return [[entry.name, list(entry.shape), entry.dtype, entry.digest] for entry in entries]


def entries_of(rows: list[list]) -> list[Entry]:
    """What ``rows_of`` made rows of."""
    return [Entry(name, tuple(shape), dtype, digest) for name, shape, dtype, digest in rows]


class OutgoingWeights:
    """The stream of one sync as an iterator of (name, tensor), with its measurements once it is through.

    Args:
        header: of this sync.
        tensors: (name, whole tensor) pairs; drawn one at a time, and not kept.
        device: where header and manifest are put, for transports that carry one device only.
        before: digests by name of the previous sync, to count what changed.
        on_end: called with this stream when all of it has been drawn.
        changes: what ``tensors`` are made from, in a mode whose syncs build on each other.
    """

    def __init__(
        self,
        header: SyncHeader,
        tensors: Iterable[tuple[str, torch.Tensor]],
        device="cpu",
        before: dict[str, str] | None = None,
        on_end: Callable[[OutgoingWeights], None] = lambda stream: None,
        changes: Changes | None = None,
    ):
        self.header = header
        #: verl's global step, set by the colocated sender, which is told it
        self.step: int | None = None
        self.entries: list[Entry] = []
        self.bytes = 0
        self.seconds = 0.0
        self._before = before or {}
        self._on_end = on_end
        self.changes = changes
        self._stream = self._pairs(tensors, device)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._stream

    def __next__(self) -> tuple[str, torch.Tensor]:
        return next(self._stream)

    def _pairs(self, tensors, device) -> Iterator[tuple[str, torch.Tensor]]:
        started = time.perf_counter()
        yield HEADER, self._counted(packed(asdict(self.header), device))
        for name, tensor in tensors:
            tensor = tensor.contiguous()
            pending = Entry.soon(name, tensor, self.header.digests)
            yield name, self._counted(tensor)
            del tensor
            # Hashed while the sender copied it; the next one is drawn when this one is gone.
            self.entries.append(pending())
        yield MANIFEST, self._counted(packed(self.manifest(), device))
        self.seconds = time.perf_counter() - started
        self._on_end(self)

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes += tensor.nbytes
        return tensor

    def manifest(self) -> dict[str, Any]:
        """What the receiver must have seen: run, number, step and every tensor in order."""
        return {
            "run": self.header.run,
            "number": self.header.number,
            "step": self.step,
            "tensors": rows_of(self.entries),
        } | ({} if self.changes is None else {"account": self.changes.account})

    @property
    def digests(self) -> dict[str, str]:
        """Digest of every tensor sent so far, by name."""
        return {entry.name: entry.digest for entry in self.entries}

    @property
    def changed(self) -> int:
        """How many tensors differ from the previous sync; all of them in the first one."""
        if self.changes is not None and not self.changes.first:
            return self.changes.changed_tensors
        return sum(self._before.get(name) != digest for name, digest in self.digests.items())
