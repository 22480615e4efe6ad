"""The sending end of a weight sync in verl (0.9.1 ``workers/rollout/vllm_rollout/vllm_rollout.py``).

verl calls it a server adapter: it lives in the trainer's process when trainer and rollout engine share their devices,
in a process of its own beside the engine otherwise. It hands a sync to the transport, compares the engine's report with
what went out, and raises on every rank when any rank's engine cannot prove its weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import torch
from verl.workers.rollout.utils import ensure_async_iterator
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from hybrid_lora_plugin.errors import WeightSyncError, with_reference
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.received import compare_entries
from hybrid_lora_plugin.sync.wire import (
    MANIFEST,
    Entry,
    OutgoingWeights,
    SyncHeader,
    bucket_mebibytes,
    entries_of,
    read_header,
    read_manifest,
)
from hybrid_lora_plugin.verl_backend.sender import sync_metrics, waits
from hybrid_lora_plugin.verl_backend.transport import SYMPTOMS, LimitedSender, address_of_run


class PassingWeights:
    """A sync on its way through this process: counted and looked at, not kept.

    Args:
        weights: the stream, from the engine in this process or from verl's checkpoint engine.
        limits: how long to wait for the first tensor from a checkpoint engine, and for each of the others.
    """

    def __init__(self, weights, limits: waits.Limits):
        self._limits = limits if hasattr(weights, "__aiter__") else None
        self._items = ensure_async_iterator(weights)
        self._first: tuple[str, torch.Tensor] | None = None
        self._failed_key = ""
        self.header: SyncHeader | None = None
        self.manifest: list[Entry] | None = None
        #: what the manifest says besides of the weights that were sent
        self.account: dict[str, Any] = {}
        self.names: set[str] = set()

    async def begin(self) -> SyncHeader:
        """Read the header."""
        self._first = await self._next(begin=True)
        if self._first is None:
            raise WeightSyncError("the sync is empty", see="sync-with-parts-missing-or-repeated")
        self.header = read_header(*self._first)
        self._failed_key = f"hybrid_lora/{self.header.run}/{self.header.number}/failed"
        return self.header

    async def _next(self, begin: bool = False) -> tuple[str, torch.Tensor] | None:
        if self._limits is None:  # a generator of this process: nothing could interrupt it
            return await anext(self._items, None)
        limit = (self._limits.proof, self._limits.option) if begin else (self._limits.bucket,)
        return await _within(anext(self._items, None), "the checkpoint engine", *limit)

    async def __aiter__(self) -> AsyncIterator[tuple[str, torch.Tensor]]:
        yield self._first
        while (item := await self._next()) is not None:
            name, tensor = item
            # verl's bucket is a dictionary: of two tensors with one name it would send one.
            if name in self.names:
                raise WeightSyncError(f"{name}: sent twice in one sync", see="sync-with-parts-missing-or-repeated")
            if name == MANIFEST:
                content, self.manifest = read_manifest(tensor)
                self.account = content.get("account", {})
            else:
                self.names.add(name)
            yield name, tensor

    async def drain(self) -> None:
        """Draw what is left: with sharded weights every tensor is a collective, and the other ranks wait in it.

        An error here comes after another one, which says more.
        """
        with contextlib.suppress(Exception):
            while await self._next() is not None:
                pass

    # A rank without a server of its own hears of a failure only from another rank, and the collectives of the stream
    # are no place to tell it: the process group's store is.

    def tell_other_ranks(self, text: str) -> None:
        """Let ranks that wait for their receiver know that this sync has failed."""
        if self._failed_key and _several_ranks():
            with contextlib.suppress(Exception):
                _store().set(self._failed_key, text)

    def check_other_ranks(self) -> None:
        """Raise WeightSyncError, with its text, when another rank has failed."""
        if self._failed_key and _several_ranks() and _store().check([self._failed_key]):
            text = _store().get(self._failed_key).decode()
            raise WeightSyncError.relayed(text, otherwise="error-from-outside-the-plugin")


def _store():
    return torch.distributed.distributed_c10d._get_default_store()


class HybridLoraServerAdapter(ServerAdapter):
    """verl's server adapter; a model without Hybrid-LoRA goes through verl's own code."""

    #: whether a sync has been proven: later ones have less to look at
    _proven = False
    #: all ranks, by how long they wait for each other
    _groups: dict[float, torch.distributed.ProcessGroup] | None = None

    async def update_weights(self, weights, global_steps=None, wire_format="named_tensors", **kwargs):
        hybrid = self.model_config.lora.get("hybrid")
        if not hybrid:
            return await super().update_weights(weights, global_steps, wire_format, **kwargs)
        if wire_format != "named_tensors":
            raise WeightSyncError(
                f"wire format {wire_format!r} cannot carry a sync, wanted 'named_tensors'",
                see="checkpoint-engine-changes-tensors",
            )
        if not isinstance(weights, OutgoingWeights):
            return await self._update(weights, global_steps, hybrid)
        weights.step = global_steps
        try:
            await self._update(weights, global_steps, hybrid)
        except BaseException:
            if weights.changes is not None:
                weights.changes.refused()
            raise

    async def _update(self, weights, global_steps: int | None, hybrid) -> None:
        """One sync up to its proof."""
        started = time.perf_counter()
        limits = waits.Limits.of(hybrid, first=not self._proven)
        passing, error = PassingWeights(weights, limits), ""
        # In two parts: a rank whose stream has no header must not leave the engine's workers waiting for its tensors.
        for part in (self._begin, self._send):
            try:
                await part(passing, global_steps, limits)
            except Exception as failure:
                error = _text(failure)
                # Printed at once: should the other ranks not answer any more, this would be lost.
                print(f"hybrid_lora: weight sync of step {global_steps}: {error}", flush=True)
            await self._agree(error, passing, global_steps, limits)
        compared = {}
        if self._ensure_server_handle():
            prompt = passing.header.fixed_prompt
            proving = self.server_handle.end_weight_sync.remote(global_steps, prompt)
            try:
                patience = waits.for_last_checks(limits.bucket, bool(prompt))
                compared = await _within(proving, "the rollout engine's last checks", patience)
            except Exception as failure:
                raise _ended(passing, global_steps, _text(failure)) from failure
        self._proven = True
        sync_metrics.add(time.perf_counter() - started, compared)

    async def _begin(self, passing: PassingWeights, step: int | None, limits: waits.Limits) -> None:
        """Lock the engine and read the header."""
        if self._ensure_server_handle():
            if not hasattr(self.server_handle, "begin_weight_sync"):
                # One of neither verl's class nor ours, which could not be found earlier.
                raise WeightSyncError(
                    "the rollout server has no begin_weight_sync: it is none of the plugin's and cannot prove weights",
                    see="server-without-the-plugin",
                )
            # Before anything can fail: from here on the engine generates nothing until this sync is proven.
            await _within(self.server_handle.begin_weight_sync.remote(step), "the rollout engine", limits.bucket)
        await passing.begin()

    async def _send(self, passing: PassingWeights, step: int | None, limits: waits.Limits) -> None:
        """Send one sync and compare the report.

        Raises:
            WeightSyncError: with the receiver's text where it has one. All of ``passing`` has been drawn then, too.
        """
        failure: Exception | None = None
        done = None
        try:
            header = passing.header
            if self._has_server:
                call = await self._execute_method(
                    "receive_hybrid_weights",
                    non_block=True,
                    kwargs={
                        "run": header.run,
                        "number": header.number,
                        "step": step,
                        "use_shm": self.use_shm,
                        "limit": limits.bucket,
                    },
                )
                done = call.future()
            bucket = bucket_mebibytes(
                header.payload_bytes, self.config.checkpoint_engine.update_weights_bucket_megabytes
            )

            def still_receiving() -> None:
                if done is not None and done.done() and done.exception() is not None:
                    raise _engine_failed(done.exception())
                passing.check_other_ranks()

            address = address_of_run(self.zmq_handle, header.run)
            sender = LimitedSender(address, bucket, self.use_shm, limit=limits.bucket, check=still_receiving)

            async def patient_at_the_end():
                async for name, tensor in passing:
                    if name == MANIFEST:
                        # All has been drawn, and what is acknowledged last is the engine's whole proof.
                        sender.wait_up_to(limits.proof, limits.option)
                    yield name, tensor

            await sender.async_send_weights(patient_at_the_end())
        except Exception as raised:
            failure = raised
            # The other ranks stand in this rank's collectives, and their workers end only after them.
            passing.tell_other_ranks(_text(raised))
            await passing.drain()
        reports: list[dict[str, Any]] = []
        if done is not None:
            failure, reports = await self._answers(done, failure, limits.bucket)
        if failure is not None:
            raise failure
        self._compare(passing, sender.answer, step)
        if done is not None:
            sync_mode(header.mode).check_reports(header, passing.account, reports)

    async def _answers(
        self, done, failure: Exception | None, limit: float
    ) -> tuple[Exception | None, list[dict[str, Any]]]:
        """What went wrong, from what the workers returned: their words say more than a closed connection does.

        Returns:
            The error, if there is one, and the report of every worker.
        """
        try:
            # After a failure only for what they have to say about it: vLLM answers nothing at all for a dead engine.
            patience = waits.for_workers(limit) if failure is None else waits.GRACE
            results = await _within(asyncio.wrap_future(done), "the rollout engine's workers", patience)
        except Exception as broken:
            return failure or _engine_failed(broken), []
        errors = [result["error"] for result in results if "error" in result]
        errors.sort(key=lambda text: any(words in text for words in SYMPTOMS))
        if errors and (failure is None or any(words in str(failure) for words in SYMPTOMS)):
            return WeightSyncError.relayed(errors[0], otherwise="error-from-outside-the-plugin"), results
        return failure, results

    @staticmethod
    def _compare(passing: PassingWeights, report: dict[str, Any], step: int | None) -> None:
        """What the engine says it loaded, against what the trainer says it sent."""
        header = passing.header
        if passing.manifest is None:
            raise WeightSyncError(
                "the trainer's stream ended without its manifest", see="sync-with-parts-missing-or-repeated"
            )
        for what, wanted in (("run", header.run), ("number", header.number), ("step", step)):
            if report.get(what) != wanted:
                raise WeightSyncError(
                    f"the rollout engine reports {what} {report.get(what)}, wanted {wanted}: it is stale",
                    see="stale-weights",
                )
        loaded = entries_of(report["tensors"])
        compare_entries(passing.manifest, loaded, "sent", "loaded", see="engine-holds-other-weights")

    def _group(self, patience: float) -> torch.distributed.ProcessGroup:
        """All ranks, for words and not for tensors; a group keeps its timeout, and the first sync has a longer one."""
        if self._groups is None:
            self._groups = {}
        if patience not in self._groups:
            timeout = timedelta(seconds=patience)
            self._groups[patience] = torch.distributed.new_group(backend="gloo", timeout=timeout)
        return self._groups[patience]

    async def _agree(self, error: str, passing: PassingWeights, step: int | None, limits: waits.Limits) -> None:
        """Raise on every rank if any rank has an error: none goes on with an engine that another could not prove.

        Every rank gathers the same tensors, so every rank must also have sent the same ones.
        """
        run = passing.header.run if passing.header else ""
        seen = [(error, passing.manifest, run)]
        if _several_ranks():
            patience = waits.for_other_ranks(limits.proof)
            seen = [None] * torch.distributed.get_world_size()
            try:
                await asyncio.to_thread(
                    torch.distributed.all_gather_object,
                    seen,
                    (error, passing.manifest, run),
                    group=self._group(patience),
                )
            except Exception as broken:
                silent = f"another rank did not answer within {patience:g} s: {_last_line(broken)}"
                raise _ended(passing, step, error or with_reference(silent, "no-answer-in-time")) from broken
        # What a rank lost because another one failed says less than what failed there.
        causes = [(rank, text) for rank, (text, _, _) in enumerate(seen) if text]
        causes.sort(key=lambda cause: any(words in cause[1] for words in SYMPTOMS))
        if causes:
            raise _ended(passing, step, causes[0][1], causes[0][0])
        for rank, (_, manifest, other) in enumerate(seen):
            if other != seen[0][2]:
                # Told before a receiver waits at the address of one run for a sender at that of another.
                text = f"run {other} on this rank, wanted {seen[0][2]}, that of rank 0: one of them is stale"
                raise _ended(passing, step, with_reference(text, "stale-weights"), rank)
            if manifest is None:  # the ranks agree on the beginning only
                continue
            try:
                compare_entries(
                    seen[0][1] or [],
                    manifest,
                    "sent by rank 0",
                    f"sent by rank {rank}",
                    see="ranks-hold-different-weights",
                )
            except WeightSyncError as difference:
                text = f"{difference}: the ranks hold different weights"
                raise _ended(passing, step, text, rank) from difference


def _ended(passing: PassingWeights, step: int | None, text: str, rank: int | None = None) -> WeightSyncError:
    """The error that ends the run: ``text`` with where and when, and its reference behind all of it."""
    number = passing.header.number if passing.header else "(unknown)"
    where = "" if rank is None else f" on rank {rank}"
    return WeightSyncError.relayed(
        f"hybrid_lora: weight sync {number} of step {step} failed{where}: {text}. The run ends here, nothing is "
        f"generated from these weights; continue from the last checkpoint",
        otherwise="error-from-outside-the-plugin",
    )


def _engine_failed(error: BaseException) -> WeightSyncError:
    return WeightSyncError.relayed(f"the rollout engine failed: {_last_line(error)}", otherwise="other-side-failed")


def _several_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


async def _within(awaitable, whom: str, limit: float, option: str = "hybrid_lora.sync_timeout"):
    """Its result; WeightSyncError, naming ``whom`` and the option, when there is none after ``limit`` seconds."""
    try:
        return await asyncio.wait_for(awaitable, limit)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise WeightSyncError(
            f"no answer from {whom} for {limit:g} s; if it is only slow, raise {option}",
            see="no-answer-in-time",
        ) from error


def _text(error: Exception) -> str:
    """One line of an error: its own words where it is ours, also when Ray brought it from another process."""
    if isinstance(error, WeightSyncError):
        return _last_line(error).removeprefix("hybrid_lora_plugin.errors.WeightSyncError: ")
    return f"{type(error).__name__}: {_last_line(error)}"


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
