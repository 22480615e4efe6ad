"""The sending end of a weight sync in verl (0.9.1 ``workers/rollout/vllm_rollout/vllm_rollout.py``).

verl calls it a server adapter: it lives in the trainer's process when trainer and rollout engine share their devices, in a
process of its own beside the engine otherwise. It hands a sync to the transport, compares the engine's report with
what went out, and raises on every rank when any rank's engine cannot prove its weights.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import torch
from verl.workers.rollout.utils import ensure_async_iterator
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from hybrid_lora_plugin.sync.errors import WeightSyncError
from hybrid_lora_plugin.sync.wire import (
    MANIFEST,
    Entry,
    OutgoingWeights,
    SyncHeader,
    bucket_mebibytes,
    compare_entries,
    read_header,
    read_manifest,
)
from hybrid_lora_plugin.verl_backend import sync_record
from hybrid_lora_plugin.verl_backend.transport import LimitedSender


class PassingWeights:
    """A sync on its way through this process: counted and looked at, not kept.

    Args:
        weights: the stream, from the engine in this process or from verl's checkpoint engine.
    """

    def __init__(self, weights):
        self._items = ensure_async_iterator(weights)
        self._first: tuple[str, torch.Tensor] | None = None
        self.header: SyncHeader | None = None
        self.manifest: list[Entry] | None = None
        self.names: set[str] = set()

    async def begin(self) -> SyncHeader:
        """Read the header."""
        self._first = await anext(self._items, None)
        if self._first is None:
            raise WeightSyncError("the sync is empty")
        self.header = read_header(*self._first)
        return self.header

    async def __aiter__(self) -> AsyncIterator[tuple[str, torch.Tensor]]:
        yield self._first
        async for name, tensor in self._items:
            # verl's bucket is a dictionary: of two tensors with one name it would send one.
            if name in self.names:
                raise WeightSyncError(f"{name}: sent twice in one sync")
            if name == MANIFEST:
                self.manifest = read_manifest(tensor)[1]
            else:
                self.names.add(name)
            yield name, tensor

    async def drain(self) -> None:
        """Draw what is left: with sharded weights every tensor is a collective, and the other ranks wait in it."""
        async for _ in self._items:
            pass


class HybridLoraServerAdapter(ServerAdapter):
    """verl's server adapter; a model without Hybrid-LoRA goes through verl's own code."""

    _agreement: Any = None

    async def update_weights(self, weights, global_steps=None, wire_format="named_tensors", **kwargs):
        hybrid = self.model_config.lora.get("hybrid")
        if not hybrid:
            return await super().update_weights(weights, global_steps, wire_format, **kwargs)
        if wire_format != "named_tensors":
            raise WeightSyncError(f"wire format {wire_format!r} cannot carry a sync, wanted 'named_tensors'")
        started = time.perf_counter()
        if isinstance(weights, OutgoingWeights):
            weights.step = global_steps
        passing = PassingWeights(weights)
        error = ""
        limit = float(hybrid["sync_timeout"])
        try:
            await self._send(passing, global_steps, limit)
        except Exception as failure:
            error = str(failure) if isinstance(failure, WeightSyncError) else f"{type(failure).__name__}: {failure}"
            await passing.drain()
        await self._agree(error, passing, global_steps, limit)
        difference = None
        if self._ensure_server_handle():
            probe = passing.header.probe
            difference = await asyncio.wait_for(
                self.server_handle.end_weight_sync.remote(global_steps, probe), limit + (limit if probe else 0)
            )
        sync_record.add(time.perf_counter() - started, difference)

    async def _send(self, passing: PassingWeights, step: int | None, limit: float) -> None:
        """Send one sync and compare the report.

        Raises:
            WeightSyncError: with the receiver's text where it has one.
        """
        if self._ensure_server_handle():
            # Before anything can fail: from here on the engine generates nothing until this sync is proven.
            await asyncio.wait_for(self.server_handle.begin_weight_sync.remote(step), limit)
        header = await passing.begin()
        call = None
        if self._has_server:
            call = await self._execute_method(
                "receive_hybrid_weights",
                non_block=True,
                kwargs={
                    "run": header.run,
                    "number": header.number,
                    "step": step,
                    "use_shm": self.use_shm,
                    "limit": limit,
                },
            )
        done = call.future() if call is not None else None

        def still_receiving() -> None:
            if done is not None and done.done() and done.exception() is not None:
                raise WeightSyncError(f"the rollout engine failed: {_last_line(done.exception())}")

        bucket = bucket_mebibytes(header.payload_bytes, self.config.checkpoint_engine.update_weights_bucket_megabytes)
        sender = LimitedSender(self.zmq_handle, bucket, self.use_shm, limit=limit, check=still_receiving)
        failure: Exception | None = None
        try:
            await sender.async_send_weights(passing)
        except Exception as raised:
            failure = raised
        if call is not None:
            try:
                # The workers answer once the socket is closed; their words say more than a closed connection does.
                results = await asyncio.wait_for(asyncio.wrap_future(done), limit + 30)
                errors = [result["error"] for result in results if "error" in result]
                if errors:
                    raise WeightSyncError(errors[0])
            except WeightSyncError as told:
                if failure is None or "closed the connection" in str(failure):
                    failure = told
            except Exception as broken:
                failure = failure or WeightSyncError(f"the rollout engine failed: {_last_line(broken)}")
        if failure is not None:
            raise failure
        self._compare(passing, sender.answer, step)

    @staticmethod
    def _compare(passing: PassingWeights, report: dict[str, Any], step: int | None) -> None:
        """What the engine says it loaded, against what the trainer says it sent."""
        header = passing.header
        if passing.manifest is None:
            raise WeightSyncError("the trainer's stream ended without its manifest")
        for what, wanted in (("run", header.run), ("number", header.number), ("step", step)):
            if report.get(what) != wanted:
                raise WeightSyncError(
                    f"the rollout engine reports {what} {report.get(what)}, wanted {wanted}: it is stale"
                )
        loaded = [Entry(t["name"], tuple(t["shape"]), t["dtype"], t["digest"]) for t in report["tensors"]]
        compare_entries(passing.manifest, loaded, "sent", "loaded")

    async def _agree(self, error: str, passing: PassingWeights, step: int | None, limit: float) -> None:
        """Raise on every rank if any rank has an error: none goes on with an engine that another could not prove.

        Every rank gathers the same tensors, so every rank must also have sent the same ones.
        """
        seen = [(error, passing.manifest)]
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            if self._agreement is None:
                self._agreement = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=limit + 60))
            seen = [None] * torch.distributed.get_world_size()
            await asyncio.to_thread(
                torch.distributed.all_gather_object, seen, (error, passing.manifest), group=self._agreement
            )
        number = passing.header.number if passing.header else "(unknown)"
        for rank, (text, manifest) in enumerate(seen):
            if not text and manifest is not None and seen[0][1] is not None:
                try:
                    compare_entries(seen[0][1], manifest, "sent by rank 0", f"sent by rank {rank}")
                except WeightSyncError as difference:
                    text = f"{difference}: the ranks hold different weights"
            if text:
                raise WeightSyncError(
                    f"hybrid_lora: weight sync {number} of step {step} failed on rank {rank}: {text}. The run ends here, "
                    "nothing is generated from these weights; continue from the last checkpoint"
                )


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
