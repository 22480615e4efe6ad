"""Runs under torchrun: the sending end of a sync on two ranks whose tensors are collectives, and one receiver fails.

``python -m torch.distributed.run --nproc-per-node 2 tests/support/sync_ranks_worker.py ARGUMENTS.json`` writes what
each rank raised, and after how many seconds, to ``OUT/rankN.json``. Transport, receivers, process group and the
adapter's own code are real; threads stand for the processes of a rollout engine with tensor parallel 2, and an object
for the handle of its server.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

TENSORS = 12
#: ``sync_timeout`` in seconds; short only where a rank waits until it is over, or longer
LIMITS = {"trainer fails on one rank": 10.0, "first proof is slow": 3.0}
LIMIT = 120.0


def limit_of(scenario: str) -> float:
    return LIMITS.get(scenario, LIMIT)


def options_of(scenario: str) -> dict[str, float]:
    limit = limit_of(scenario)
    return {"sync_timeout": limit, "first_sync_timeout": LIMIT if scenario == "first proof is slow" else limit}


def tensors(scenario: str, rank: int):
    """Twelve tensors of which every one is gathered over the ranks, in buckets of one MiB."""
    for index in range(TENSORS):
        if scenario == "trainer fails on one rank" and rank == 1 and index == 5:
            raise MemoryError("no memory for weight5")
        dist.barrier()
        yield f"weight{index}", torch.full((200_000,), float(index))


def receive(handle: str, scenario: str, rank: int) -> dict:
    """What a worker of the engine does, as far as the sender can see it."""
    from hybrid_lora_plugin.sync.received import ReceivedWeights
    from hybrid_lora_plugin.sync.wire import HEADER, read_header, rows_of
    from hybrid_lora_plugin.verl_backend.transport import LimitedReceiver

    if scenario == "engine dies at once":
        raise RuntimeError("EngineDeadError")
    receiver, state, result = LimitedReceiver(handle, torch.device("cpu"), True, limit=limit_of(scenario)), [], {}

    def on_bucket(weights, is_last):
        if "error" in result:
            return
        for name, tensor in weights:
            if name == HEADER:
                state.append(ReceivedWeights(read_header(name, tensor)))
                continue
            if scenario == "receiver fails early" and rank == 0 and name == "weight2":
                result["error"] = "weight2: does not fit"
                break
            state[0].take(name, tensor)
        if is_last and scenario == "first proof is slow" and rank == 0:
            time.sleep(2 * limit_of(scenario))
        if is_last and "error" not in result:
            rows, header = rows_of(state[0].finish()), state[0].header
            result.update(run=header.run, number=header.number, step=3, tensors=rows)
        if is_last or "error" in result:
            receiver.answer(result)

    try:
        receiver.receive_weights(on_bucket)
    except Exception as error:
        result.setdefault("error", str(error))
    return result


class Remote:
    """A method of an actor: ``remote`` starts it in a thread and gives something to wait for."""

    def __init__(self, function):
        self._function = function

    def remote(self, *arguments, **options):
        return asyncio.wrap_future(POOL.submit(self._function, *arguments, **options))


POOL = concurrent.futures.ThreadPoolExecutor(8)


def play(scenario: str, out: str, address: str) -> None:
    """One scenario on this rank, in a process group of its own; ends the process."""
    from hybrid_lora_plugin.sync.wire import OutgoingWeights, SyncHeader
    from hybrid_lora_plugin.verl_backend.sender.server_adapter import HybridLoraServerAdapter
    from hybrid_lora_plugin.verl_backend.transport import address_of_run

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # torchrun has a store of its own, for one process group; this one hosts its own at the address.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    handles = [f"ipc://{out}/s{other}" for other in range(2)]
    ended = []

    class Adapter(HybridLoraServerAdapter):
        def __init__(self):
            self.config = SimpleNamespace(checkpoint_engine=SimpleNamespace(update_weights_bucket_megabytes=1))
            self.model_config = SimpleNamespace(lora={"hybrid": options_of(scenario)})
            self.zmq_handle, self.use_shm, self._has_server = handles[rank], True, rank == 0
            self.server_handle = SimpleNamespace(
                begin_weight_sync=Remote(lambda step: None),
                end_weight_sync=Remote(lambda step, probe: ended.append(step)),
            )

        async def _execute_method(self, method, non_block=False, timeout=None, args=(), kwargs=None):
            def workers():
                addresses = [address_of_run(handle, kwargs["run"]) for handle in handles]
                futures = [POOL.submit(receive, one, scenario, other) for other, one in enumerate(addresses)]
                return [future.result() for future in futures]

            future = POOL.submit(workers)
            return SimpleNamespace(future=lambda: future)

    header = SyncHeader(run="r", number=4, mode="merge", dtype="float32", digests=True)
    stream = OutgoingWeights(header, tensors(scenario, rank))
    dist.barrier()
    started, raised = time.monotonic(), ""
    try:
        asyncio.run(Adapter().update_weights(stream, global_steps=3))
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    Path(out, f"rank{rank}.json").write_text(json.dumps({"raised": raised, "seconds": seconds, "ended": ended}))
    # A thread that still waits for a sender must not keep the process.
    os._exit(0)


def main(file: str) -> None:
    """Every scenario of the file in a fork of its own: what they import takes longer than what they do."""
    import verl  # noqa: F401  loads the plugin and its platform

    import hybrid_lora_plugin.verl_backend.sender.server_adapter  # noqa: F401

    for scenario, (out, address) in json.loads(Path(file).read_text()).items():
        child = os.fork()
        if not child:
            play(scenario, out, address)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
