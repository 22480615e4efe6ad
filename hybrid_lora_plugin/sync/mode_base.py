"""What a sync mode is: the sending and the receiving end of one way to bring trained weights to a rollout engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.parameter_counts import ParameterCounts
from hybrid_lora_plugin.sync.base_weights import CheckpointWeights
from hybrid_lora_plugin.sync.live_weight import LiveWeight
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.sync.sent_weights import SentWeights
from hybrid_lora_plugin.sync.wire import SyncHeader


class RolloutModel(Protocol):
    """The rollout engine's side, as a mode needs it; ``verl_backend.receiver.vllm_model`` has it for vLLM."""

    #: where received tensors are worked on
    device: torch.device
    #: what the engine's weights were loaded from
    checkpoint: CheckpointWeights

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Put whole tensors under plain names into the live model, and remember what must then be there."""

    def load_part(self, name: str, part: torch.Tensor) -> None:
        """Put this worker's part of a weight where ``live`` has it, and remember what must then be there."""

    def replace_adapter(self, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], header: SyncHeader) -> None:
        """Make A [r, d_in] and B [d_out, r] by module the engine's only adapter, and remember them."""

    def live(self, name: str) -> LiveWeight:
        """Where a plain weight lies, to be read and written in place; WeightSyncError in a layout unknown here."""

    # -- for modes that build on an earlier sync

    #: weights that train, from the last whole sync
    trained: frozenset[str]

    def begin_building(self, run: str, trained: frozenset[str], unsent: list[str]) -> None:
        """A whole sync of ``run`` is proven: later ones bring changes of ``trained`` and leave ``unsent`` as it is."""

    def read_back_unsent(self, part: slice) -> None:
        """Compare some of the weights that are no longer sent with what they were; WeightSyncError names one."""


class SyncReceiver(ABC):
    """One mode's receiving end, for one sync."""

    def __init__(self, header: SyncHeader, rollout: RolloutModel):
        self.header = header
        self.rollout = rollout

    def check_dtype(self, name: str, tensor: torch.Tensor, wanted: torch.dtype | None = None) -> None:
        """Raise WeightSyncError unless a floating tensor has the dtype this mode sends, by default the engine's."""
        wanted = wanted or self.header.torch_dtype
        if tensor.is_floating_point() and tensor.dtype != wanted:
            raise WeightSyncError(
                f"{name}: received as {tensor.dtype}, wanted {wanted}".replace("torch.", ""),
                see="tensor-of-another-shape-or-dtype",
            )

    @abstractmethod
    def take(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Use some tensors; they are views of a transfer buffer, gone when this returns."""

    @abstractmethod
    def finish(self) -> None:
        """Everything has been taken: do what needs all of it."""

    def conclude(self, account: dict[str, Any]) -> dict[str, Any]:
        """Everything has been loaded and read back.

        Args:
            account: of the manifest, what the trainer says besides of the weights it sent.

        Returns:
            What this worker's report says besides, for ``SyncMode.check_reports``.

        Raises:
            WeightSyncError: what came is not what the account says.
        """
        return {}


class SyncMode(ABC):
    """One way to bring trained weights to a rollout engine.

    Nothing outside ``sync`` asks for a mode's name: what is special about one is an attribute or a method here.

    Attributes:
        name: the value of ``hybrid_lora.sync``.
        engine_adapter: whether the engine runs an adapter of its own, verl's ``lora.merge=false``.
        partial: whether weights that never train stay away, so that the engine must keep those it loaded.
        builds_on_last: whether a sync may carry changes to what an earlier one brought, so that the engine must keep
            it, and the trainer remembers it (``sent_weights``).
        receiver_merges: whether the receiving end computes merged weights, which must come to the trainer's bits.
        receiver: the receiving end.
    """

    name: str
    engine_adapter: bool = False
    partial: bool = False
    builds_on_last: bool = False
    receiver_merges: bool = False
    receiver: type[SyncReceiver]

    @property
    def engine_keeps_weights(self) -> bool:
        """Whether a sync does not bring back everything that a sleep could discard."""
        return self.partial or self.builds_on_last

    @abstractmethod
    def payload_bytes(self, counts: ParameterCounts, dtype: torch.dtype) -> int:
        """Bytes of all tensors of one sync together; the most, where they differ from sync to sync."""

    @abstractmethod
    def outgoing(self, model: torch.nn.Module, plan: SyncPlan) -> Iterator[tuple[str, torch.Tensor]]:
        """The trainer's side: (name, whole tensor) pairs of a hybrid model, one module in flight at a time.

        Args:
            model: the hybrid PEFT model, inside FSDP (then every rank must draw every pair) or unsharded.
            plan: of this sync.
        """

    def sent_weights(self, group: torch.distributed.ProcessGroup | None = None) -> SentWeights | None:
        """What the trainer remembers from sync to sync; None where every sync stands for itself.

        Args:
            group: the ranks that hold one copy of the weights between them; None where each holds a whole one.
        """
        return None

    def check_reports(  # noqa: B027  most modes have nothing to check here
        self, header: SyncHeader, account: dict[str, Any], reports: list[dict[str, Any]]
    ) -> None:
        """Prove what only all workers of a rollout engine together can.

        Args:
            header: of the sync.
            account: of its manifest.
            reports: of every worker, with what ``SyncReceiver.conclude`` gave.

        Raises:
            WeightSyncError: naming the first tensor that is not what was sent.
        """

    def merged_digest(self, model: torch.nn.Module, module: str, plan: SyncPlan) -> dict[str, str]:
        """Digest of the weight that the receiver must come to for ``module``, by its name; a mode that merges there has
        it.

        With shards this gathers, so every rank must call it.
        """
        raise NotImplementedError(f"sync mode {self.name} merges nothing at the receiver")
