"""The trainer's side of weight syncs through a run: number, digests of the last one, digests of the base."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any

import torch
from verl.utils.torch_dtypes import PrecisionType

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.sync.mode_base import SyncMode
from hybrid_lora_plugin.sync.sent_weights import Changes, SentWeights
from hybrid_lora_plugin.sync.wire import OutgoingWeights, SyncHeader
from hybrid_lora_plugin.training.arrival import Arrival
from hybrid_lora_plugin.training.rounding import Rounding
from hybrid_lora_plugin.verl_backend.sender import sync_metrics


class WeightSource:
    """Makes the stream of each sync.

    Args:
        hybrid: the ``hybrid_lora`` node.
        model_config: verl's model configuration, with the rollout dtype in its ``lora`` node.
        device: where tensors travel from.
    """

    def __init__(self, hybrid: HybridLoraConfig, model_config, device):
        self._hybrid = hybrid
        self._device = device
        self._model_config = model_config
        self.dtype: torch.dtype = rollout_dtype(model_config)
        self._run = ""
        self._number = 0
        self._before: dict[str, str] = {}
        self._last: OutgoingWeights | None = None
        self._base: dict[str, str] | None = None
        #: what the syncs of the run build on, in a mode whose syncs do
        self._sent: SentWeights | None = None

    @property
    def rounding(self) -> Rounding:
        """How weights become ``dtype``; the same through a run and in one that continues it."""
        return Rounding(self._hybrid.sync_rounding, self._hybrid.sync_seed)

    def next_arrival(self) -> Arrival:
        """For the next sync, which looks at other rows than the last."""
        return Arrival(self._number + 1)

    def next_changes(
        self, mode: SyncMode, group: torch.distributed.ProcessGroup | None, destination: str
    ) -> Changes | None:
        """For the next sync, in a mode whose syncs build on each other; None in the others.

        Args:
            mode: of the run.
            group: the ranks that hold one copy of the weights between them; None where each holds a whole one.
            destination: which of the run's sets of rollout engines the sync goes to.
        """
        if not mode.builds_on_last:
            return None
        if self._sent is None:
            self._sent = mode.sent_weights(group)
        return self._sent.begin(self._number + 1, destination)

    def send_all(self) -> None:
        """Have the next sync stand for itself: the last one was not proven, or its weights are there no more."""
        if self._sent is not None:
            self._sent.forget()

    def read_all_back(self) -> None:
        """Have the next sync prove everything that the rollout engine holds, as far as the mode leaves some of it to
        later ones."""
        if self._sent is not None:
            self._sent.read_all_back()

    def stream(
        self,
        mode: str,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        payload_bytes: int = 0,
        lora_modules: list[str] | None = None,
        base: Callable[[], dict[str, str]] | None = None,
        fixed_prompt: dict[str, Any] | None = None,
        merged: Callable[[str], dict[str, str]] | None = None,
        arrival: Arrival | None = None,
        changes: Changes | None = None,
    ) -> OutgoingWeights:
        """The next sync.

        Args:
            mode: sync mode, which says how the receiver reads ``tensors``.
            tensors: (plain name, whole tensor).
            payload_bytes: of all tensors together.
            lora_modules: modules with an adapter.
            base: computes the digests of the weights that stay away, or "" for each where no digests are sent; called
                once in a run, on every rank.
            fixed_prompt: what the engine compares log-probabilities of, from ``logprob_prompt``.
            merged: from a module with an adapter, the digest of its merged weight, where the receiver merges; the
                modules take turns, one in each sync. Called on every rank.
            arrival: what ``tensors`` and ``merged`` count in.
            changes: what ``tensors`` are made from, from ``next_changes``.
        """
        self._run = self._run or _drawn_run()
        self._number += 1
        digests = self._hybrid.sync_check != "off"
        if base is not None and self._base is None:
            self._base = base()
        if self._last is not None:
            self._before = self._last.digests
        proof = {}
        if merged is not None and digests:
            proof = merged(lora_modules[self._number % len(lora_modules)])
        header = SyncHeader(
            run=self._run,
            number=self._number,
            mode=mode,
            dtype=str(self.dtype).removeprefix("torch."),
            digests=digests,
            base_number=changes.base_number if changes is not None else 0,
            rounding_mode=self.rounding.mode,
            rounding_seed=self.rounding.seed,
            lora_rank=int(self._model_config.lora_rank),
            lora_alpha=float(self._model_config.lora_alpha),
            lora_modules=lora_modules or [],
            base=self._base or {},
            payload_bytes=payload_bytes,
            base_storage=self._hybrid.sync_base,
            fixed_prompt=fixed_prompt or {},
            merged=proof,
        )

        def keep(stream: OutgoingWeights) -> None:
            sync_metrics.keep(stream, arrival.sums() if arrival is not None else {})

        self._last = OutgoingWeights(header, tensors, self._device, self._before, on_end=keep, changes=changes)
        return self._last


def rollout_dtype(model_config) -> torch.dtype:
    """What the rollout engine computes in, from verl's model configuration."""
    return PrecisionType.to_dtype(model_config.lora["rollout_dtype"])


def _drawn_run() -> str:
    """One name for the run on all its ranks."""
    name = [uuid.uuid4().hex[:12]]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(name)
    return name[0]
