"""The trainer's side of weight syncs through a run: number, digests of the last one, digests of the base."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from verl.utils.torch_dtypes import PrecisionType

from hybrid_lora_plugin.config import HybridLoraConfig
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

    @property
    def rounding(self) -> Rounding:
        """How weights become ``dtype``; the same through a run and in one that continues it."""
        return Rounding(self._hybrid.sync_rounding, self._hybrid.sync_seed)

    def next_arrival(self, originals: Mapping[str, torch.Tensor] | None = None) -> Arrival:
        """For the next sync, which looks at other rows than the last.

        Args:
            originals: this rank's rows of the full modules' original weights, by their name in ``state_dict()``.
        """
        return Arrival(self._number + 1, originals)

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

        self._last = OutgoingWeights(header, tensors, self._device, self._before, on_end=keep)
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
