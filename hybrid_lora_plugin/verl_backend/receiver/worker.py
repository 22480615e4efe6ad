"""What a vLLM worker runs in a weight sync: verl's worker extension with one more method.

verl's own receiver (``workers/rollout/vllm_rollout/utils.py``) takes an adapter or base weights, never both, and
accepts in silence what is missing. This one takes a whole sync, checks it against its manifest, reads back what the
model then holds, and answers with a report. Errors are returned, not raised: with tensor parallelism an exception in
one worker would leave vLLM's other answers in its queue.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from verl.utils.device import get_device_name
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.base_weights import check_base
from hybrid_lora_plugin.sync.mode_base import SyncReceiver
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.received import ReceivedWeights
from hybrid_lora_plugin.sync.sparse_merge import require_base
from hybrid_lora_plugin.sync.wire import HEADER, SyncHeader, read_header, rows_of
from hybrid_lora_plugin.verl_backend.patches import name_unstacked_mapper
from hybrid_lora_plugin.verl_backend.receiver.vllm_model import VllmRolloutModel
from hybrid_lora_plugin.verl_backend.transport import LimitedReceiver, address_of_run


class Reception:
    """One sync at the receiver: bucket after bucket, then the proof.

    Args:
        rollout: the live model.
        run, number, step: of the sync as announced beside the stream; None where they were not.
        last: run and number of the last sync that was proven, None for the first one.
        holds: the same, and None where another sync has failed since: what the engine's weights are known to be.
    """

    def __init__(
        self,
        rollout: VllmRolloutModel,
        run: str | None,
        number: int | None,
        step: int | None,
        last: tuple[str, int] | None,
        holds: tuple[str, int] | None = None,
    ):
        self._rollout = rollout
        self._announced = (run, number)
        self._step = step
        self._last, self._holds = last, holds
        self._received: ReceivedWeights | None = None
        self._receiver: SyncReceiver | None = None

    @property
    def header(self) -> SyncHeader:
        return self._received.header

    def take(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Check and load one bucket; its tensors are gone when this returns."""
        if self._received is None:
            if not weights:
                raise WeightSyncError("the sync is empty", see="sync-with-parts-missing-or-repeated")
            (name, tensor), *weights = weights
            self._begin(read_header(name, tensor))
        usable = []
        for name, tensor in weights:
            if name == HEADER:
                raise WeightSyncError(
                    "a second sync begins in the middle of this one", see="sync-with-parts-missing-or-repeated"
                )
            pending = self._received.take_soon(name, tensor, read_back=self._rollout.will_read_back(name, tensor))
            if pending is not None:
                usable.append((name, tensor, pending))
        if usable:
            self._receiver.take([(name, tensor) for name, tensor, _ in usable])
        # The buffer is written again when this returns: nobody may still be reading it.
        for name, _, pending in usable:
            self._received.settle(name, pending)
        self._rollout.settle()

    def _begin(self, header: SyncHeader) -> None:
        self._received = ReceivedWeights(header, *self._announced, self._last)
        require_base(header, self._holds)
        self._rollout.begin(header)
        self._receiver = sync_mode(header.mode).receiver(header, self._rollout)

    def finish(self) -> dict[str, Any]:
        """Everything came: finish loading and prove it.

        Returns:
            The report: run, number, step, and a row of name, shape, dtype and digest for every tensor loaded.
        """
        if self._received is None:
            raise WeightSyncError("the sync is empty", see="sync-with-parts-missing-or-repeated")
        header = self.header
        # Before an adapter is replaced: what is incomplete is not used.
        entries = self._received.finish(self._step)
        self._check_complete(header)
        self._receiver.finish()
        self._rollout.finish_loading()
        if header.base and not self._rollout.base_proven_for(header.run):
            self._prove_base(header)
        if header.digests:
            entries = self._received.prove(self._rollout.verify())
        else:
            self._rollout.check_unsent()
        besides = self._receiver.conclude(self._received.account)
        return besides | {
            "run": header.run,
            "number": header.number,
            "step": self._step,
            "tensors": rows_of(entries),
        }

    def _check_complete(self, header: SyncHeader) -> None:
        """Every weight of the engine's own checkpoint was sent, or is known to stay as it is there.

        The manifest says what the trainer sent; that it sent everything, only another source can say.

        Raises:
            WeightSyncError: naming the first weight that nobody accounts for.
        """
        if header.base_number:
            return  # the sync that this one changes had every weight
        partial = sync_mode(header.mode).partial
        known = set(self._received.entries)
        if partial:
            known |= set(header.base) | {f"{module}.weight" for module in header.lora_modules}
        for name in self._rollout.checkpoint_names():
            # Buffers of old checkpoints that neither transformers nor vLLM keeps.
            if name not in known and ".rotary_emb." not in name:
                raise WeightSyncError(
                    f"{name}: missing from the sync, and not one of the weights that never train",
                    see="weight-of-the-checkpoint-not-sent",
                )

    def _prove_base(self, header: SyncHeader) -> None:
        checkpoint = self._rollout.checkpoint
        if header.digests:
            names = list(header.base)[self._rollout.share]
            check_base({name: header.base[name] for name in names}, checkpoint.read, str(checkpoint.folder))
        sent = set(self._received.entries)
        if sync_mode(header.mode).receiver_merges:
            sent |= {f"{module}.weight" for module in header.lora_modules}
        unsent = [name for name in header.base if name not in sent]
        self._rollout.prove_unsent(header.run, unsent, whole=header.digests)


class HybridLoraWorkerExtension(vLLMColocateWorkerExtension):
    """verl's extension of vLLM's worker, which also receives Hybrid-LoRA's syncs."""

    def __new__(cls, **kwargs):
        # Before verl's extension replaces vLLM's loader of adapters, which does the same there.
        name_unstacked_mapper()
        return super().__new__(cls, **kwargs)

    def receive_hybrid_weights(
        self,
        run: str | None = None,
        number: int | None = None,
        step: int | None = None,
        use_shm: bool = False,
        limit: float = 240.0,
    ) -> dict[str, Any]:
        """Receive one sync over this worker's socket.

        Args:
            run, number, step: what the trainer announced by RPC; the stream must say the same, and comes by an address
                with the run in it.
            use_shm: as in verl, shared memory instead of device IPC.
            limit: seconds to wait for the trainer between two buckets.

        Returns:
            The report, or ``{"error": text}``.
        """
        if self.device is None:
            self.device = torch.device(f"{get_device_name()}:{self.local_rank}")
        if not hasattr(self, "_hybrid_rollout"):
            self._hybrid_rollout, self._hybrid_last, self._hybrid_holds = VllmRolloutModel(self), None, None
        started = time.perf_counter()
        reception = Reception(self._hybrid_rollout, run, number, step, self._hybrid_last, self._hybrid_holds)
        # Known again when this one is proven.
        self._hybrid_holds = None
        address = address_of_run(self._get_zmq_handle(), run)
        receiver = LimitedReceiver(address, self.device, use_shm, limit=limit)
        result: dict[str, Any] = {}

        def on_bucket(weights: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
            if "error" in result:
                return
            try:
                reception.take(weights)
                if is_last:
                    result.update(reception.finish(), seconds=time.perf_counter() - started)
            except Exception as error:
                # Text only: a traceback would keep views of the transfer buffer alive.
                result["error"] = _text(error)
            if is_last or "error" in result:
                receiver.answer(result)

        try:
            receiver.receive_weights(on_bucket)
        except Exception as error:
            result.setdefault("error", _text(error))
        if "error" not in result:
            self._hybrid_last = self._hybrid_holds = (reception.header.run, reception.header.number)
        return result


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, WeightSyncError) else f"{type(error).__name__}: {error}"
