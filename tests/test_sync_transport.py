"""verl's transport with limits: real sockets and shared memory between two threads or two processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from hybrid_lora_plugin.errors import WeightSyncError  # noqa: E402
from hybrid_lora_plugin.verl_backend.transport import LimitedReceiver, LimitedSender, address_of_run  # noqa: E402

BUCKET_MB = 1


@pytest.fixture
def handle(tmp_path):
    # Short: a socket's path has 107 characters at most.
    path = f"/tmp/hl-{uuid.uuid4().hex[:8]}.sock"
    yield f"ipc://{path}"
    if os.path.exists(path):
        os.remove(path)


def tensors(count: int = 6):
    """Tensors that fill several buckets of one MiB."""
    for index in range(count):
        yield f"weight{index}", torch.full((150_000,), float(index))


def send(handle: str, limit: float = 10.0, pairs=None, check=None) -> LimitedSender:
    sender = LimitedSender(handle, BUCKET_MB, True, limit=limit, check=check)
    asyncio.run(sender.async_send_weights(tensors() if pairs is None else pairs))
    return sender


def receive(handle: str, limit: float, seen: list, fail_at: str | None = None, answer: dict | None = None):
    receiver = LimitedReceiver(handle, torch.device("cpu"), True, limit=limit)

    def on_bucket(weights, is_last):
        for name, tensor in weights:
            if name == fail_at:
                receiver.answer({"error": f"{name}: does not fit"})
                return
            seen.append((name, tensor.clone()))
        if is_last:
            receiver.answer(answer or {})

    receiver.receive_weights(on_bucket)


def in_thread(function, *arguments, **options):
    """Run it beside the test; returns a function that waits and gives what it raised."""
    raised = []

    def body():
        try:
            function(*arguments, **options)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def wait():
        thread.join(300)
        assert not thread.is_alive()
        return raised[0] if raised else None

    return wait


def test_everything_arrives_and_the_last_acknowledgement_carries_the_report(handle):
    seen = []
    wait = in_thread(receive, handle, 10.0, seen, answer={"loaded": 6})
    sender = send(handle)
    assert wait() is None and sender.answer == {"loaded": 6}
    assert [name for name, _ in seen] == [name for name, _ in tensors()]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, tensors(), strict=True))


def test_two_runs_whose_ray_calls_its_job_the_same_stay_apart(handle):
    """Both trainers wait at their addresses before the first engine connects, which then finds its own."""
    addresses = [address_of_run(handle, run) for run in ("846389e369c1", "0fd1c7a2b3e4")]
    assert len({handle, *addresses}) == 3
    senders = [
        in_thread(send, address, pairs=iter([("weight", torch.full((3,), float(number)))]))
        for number, address in enumerate(addresses)
    ]
    given_up = time.monotonic() + 10
    while not all(os.path.exists(address.removeprefix("ipc://")) for address in addresses):
        assert time.monotonic() < given_up
        time.sleep(0.01)
    for number, address in enumerate(addresses):
        seen = []
        receive(address, 10.0, seen)
        assert [(name, tensor.tolist()) for name, tensor in seen] == [("weight", [float(number)] * 3)]
    assert [wait() for wait in senders] == [None, None]


def test_receivers_error_reaches_the_sender_as_text_and_stops_it_there(handle):
    drawn, seen = [], []

    def counted():
        for pair in tensors(20):
            drawn.append(pair[0])
            yield pair

    wait = in_thread(receive, handle, 10.0, seen, fail_at="weight3")
    with pytest.raises(WeightSyncError, match="weight3: does not fit"):
        send(handle, pairs=counted())
    assert len(drawn) < 8, "not the whole model is sent to a receiver that has failed"
    assert isinstance(wait(), WeightSyncError), "the receiver does not wait for the rest either"


def test_receiver_that_never_comes_is_given_up(handle):
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="nothing from the rollout engine for 1 s.*hybrid_lora.sync_timeout"):
        send(handle, limit=1.0)
    assert time.monotonic() - started < 30, "given up at the limit, on a busy machine too"


def test_sender_that_never_comes_is_given_up(handle):
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="nothing from the trainer for 1 s"):
        receive(handle, 1.0, [])
    assert time.monotonic() - started < 30


def test_sender_that_falls_silent_is_given_up(handle):
    def slow():
        yield from tensors(3)
        time.sleep(4)
        yield from tensors(3)

    wait = in_thread(receive, handle, 1.0, [])
    with pytest.raises(WeightSyncError):
        send(handle, pairs=slow())
    assert "nothing from the trainer for 1 s" in str(wait())


def test_check_ends_a_pointless_wait(handle):
    def check():
        raise WeightSyncError("the engine is gone")

    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="the engine is gone"):
        send(handle, limit=600.0, check=check)
    assert time.monotonic() - started < 60


#: seconds until a wait is given up, and until a death must have been noticed: far apart, and far above what a loaded
#: machine needs
LIMIT, NOTICED = 1200.0, 120.0


def _die(note: str) -> None:
    """End this process as a crash would, having noted when; the clock is one for all processes of a machine."""
    Path(note).write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def _receive_until_killed(handle: str, note: str) -> None:
    LimitedReceiver(handle, torch.device("cpu"), True, limit=LIMIT).receive_weights(lambda weights, is_last: _die(note))


def _send_until_killed(handle: str, note: str) -> None:
    def pairs():
        yield from tensors(4)
        _die(note)

    send(handle, limit=LIMIT, pairs=pairs())


@pytest.mark.verl
@pytest.mark.parametrize("dies", ["receiver", "sender"])
def test_a_death_is_noticed_long_before_the_limit(dies, handle, tmp_path):
    note = tmp_path / "died"
    body = _receive_until_killed if dies == "receiver" else _send_until_killed
    process = multiprocessing.get_context("spawn").Process(target=body, args=(handle, str(note)))
    process.start()
    peer = "rollout engine" if dies == "receiver" else "trainer"
    with pytest.raises(WeightSyncError, match=f"the {peer} closed the connection"):
        if dies == "receiver":
            send(handle, limit=LIMIT)
        else:
            receive(handle, LIMIT, [])
    # From the death on: starting the other process is most of the time, and depends on the machine.
    assert time.monotonic() - float(note.read_text()) < NOTICED
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
