"""verl's bucketed transport with a limit on every wait and an answer in every acknowledgement (verl 0.9.1
``workers/rollout/vllm_rollout/bucketed_weight_transfer.py``).

verl's sender and receiver wait for each other without a limit, and a receiver that fails sends nothing, so the trainer
waits for ever. Here both sockets give up after a limit or as soon as the other process closes its end, and the
receiver's acknowledgements, empty in verl, carry its error or, at the end, its report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import zmq
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender
from zmq.utils.monitor import recv_monitor_message

from hybrid_lora_plugin.errors import WeightSyncError

#: words of errors that say what one side no longer saw of the other, which has a better reason
SYMPTOMS = ("closed the connection in the middle of a sync", "in the middle of a sync; if it is only slow")
#: seconds between two looks at whether the other side is still there
_LOOK = 0.2


def address_of_run(address: str, run: str | None) -> str:
    """verl's address with the run in it: one that no other run of this machine binds.

    verl's names Ray's job, and every Ray that was started for one run calls its first job the same. Two such runs on
    one machine would now and then be connected to each other.

    Args:
        address: ``ipc://`` and a path that ends in ``.sock``, as verl makes it on both ends.
        run: ``SyncHeader.run``, which both ends know before they connect; None leaves the address as it is.
    """
    return f"{address.removesuffix('.sock')}-{run}.sock" if run else address


class LimitedSocket(zmq.Socket):
    """A socket whose ``recv`` raises WeightSyncError after ``limit`` seconds, or when its peer has gone."""

    # zmq.Socket takes no attributes but these.
    _our_limit: float
    _our_peer: str
    _our_check: Callable[[], None] | None
    _our_monitor: Any
    _our_reply: bytes
    _our_option: str

    def limit_waits(self, limit: float, peer: str, check: Callable[[], None] | None = None) -> None:
        """Set the limit in seconds, the peer's name for messages, and a check that may raise while waiting."""
        for name, value in (("_our_peer", peer), ("_our_check", check), ("_our_reply", b"")):
            object.__setattr__(self, name, value)
        self.wait_up_to(limit)
        object.__setattr__(self, "_our_monitor", self.get_monitor_socket(zmq.EVENT_DISCONNECTED))
        self.setsockopt(zmq.LINGER, 2000)

    def wait_up_to(self, limit: float, option: str = "hybrid_lora.sync_timeout") -> None:
        """Another limit in seconds from here on, with the option to raise when it is too short."""
        object.__setattr__(self, "_our_limit", limit)
        object.__setattr__(self, "_our_option", option)

    def recv(self, flags: int = 0, **options) -> bytes:
        self._wait_for(zmq.POLLIN)
        return super().recv(flags, **options)

    def send(self, data, flags: int = 0, **options):
        # With nobody connected yet there is nowhere to send to.
        self._wait_for(zmq.POLLOUT)
        # verl acknowledges with nothing; the receiver's answer goes there.
        return super().send(data if len(data) else self._our_reply, flags, **options)

    def _wait_for(self, event: int) -> None:
        deadline = time.monotonic() + self._our_limit
        gone = False
        while not self.poll(int(_LOOK * 1000), event):
            if gone:
                raise WeightSyncError(
                    f"the {self._our_peer} closed the connection in the middle of a sync", see="other-side-failed"
                )
            # What it sent before it went may still be on its way in: one more look at the data.
            while self._our_monitor.poll(0):
                gone = recv_monitor_message(self._our_monitor)["event"] == zmq.EVENT_DISCONNECTED or gone
            if self._our_check is not None:
                self._our_check()
            if time.monotonic() > deadline:
                raise WeightSyncError(
                    f"nothing from the {self._our_peer} for {self._our_limit:g} s in the middle of a sync; if it is "
                    f"only slow, raise {self._our_option}",
                    see="no-answer-in-time",
                )

    def reply(self, content: dict[str, Any]) -> None:
        """What the next acknowledgement says."""
        object.__setattr__(self, "_our_reply", json.dumps(content).encode())

    def close(self, linger=None) -> None:
        if not self.closed and getattr(self, "_our_monitor", None) is not None:
            self.disable_monitor()
            object.__setattr__(self, "_our_monitor", None)
        super().close(linger)


class _SocketMaker:
    """Stands where verl keeps its zmq context and makes one kind of socket."""

    def __init__(self, *limits):
        self._limits = limits
        self.made: LimitedSocket | None = None

    def socket(self, kind: int) -> LimitedSocket:
        self.made = zmq.Context.instance().socket(kind, socket_class=LimitedSocket)
        self.made.limit_waits(*self._limits)
        return self.made


class LimitedSender(BucketedWeightSender):
    """verl's sender; raises WeightSyncError with the receiver's text as soon as one acknowledgement has it.

    Args:
        zmq_handle, bucket_size_mb, use_shm: as in verl.
        limit: seconds to wait for one acknowledgement.
        check: called while waiting; raises when waiting has become pointless.
    """

    def __init__(
        self,
        zmq_handle: str,
        bucket_size_mb: int,
        use_shm: bool,
        *,
        limit: float,
        check: Callable[[], None] | None = None,
    ):
        super().__init__(zmq_handle, bucket_size_mb, use_shm)
        #: the receiver's last answer
        self.answer: dict[str, Any] = {}
        self.zmq_context = _SocketMaker(limit, "rollout engine", check)
        self._later: tuple[float, str] | None = None

    def wait_up_to(self, limit: float, option: str) -> None:
        """As the socket's; also before there is one, where all is drawn before the first byte goes out."""
        self._later = (limit, option)
        if self.socket is not None:
            self.socket.wait_up_to(limit, option)

    def _init_socket(self):
        super()._init_socket()
        if self._later is not None:
            self.socket.wait_up_to(*self._later)
        receive = self.socket.recv

        def received(*arguments, **options) -> bytes:
            payload = receive(*arguments, **options)
            if payload:
                self.answer = json.loads(payload)
                if "error" in self.answer:
                    raise WeightSyncError.relayed(self.answer["error"], otherwise="error-from-outside-the-plugin")
            return payload

        object.__setattr__(self.socket, "recv", received)


class LimitedReceiver(BucketedWeightReceiver):
    """verl's receiver with limited waits; ``answer`` is what its next acknowledgement tells the sender."""

    def __init__(self, zmq_handle: str, device, use_shm: bool, *, limit: float):
        super().__init__(zmq_handle, device, use_shm)
        self.zmq_context = _SocketMaker(limit, "trainer")

    def answer(self, content: dict[str, Any]) -> None:
        self.socket.reply(content)
