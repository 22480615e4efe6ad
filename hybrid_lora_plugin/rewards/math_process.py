"""One process that compares expressions, as its parent sees it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from hybrid_lora_plugin.errors import RewardError

#: Wall-clock seconds to start: importing SymPy takes 2, and 15 where all cores are busy.
START_S = 180.0
#: Wall-clock time that a comparison may take, as a multiple of its CPU time: more than that is a process that hangs.
_WALL_PER_CPU = 3.0
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_CHUNK = 65536
#: Seconds that a process has to end once it has closed its output.
_END_S = 2.0


class Ended(Exception):
    """The process ended without a reply.

    Attributes:
        timed_out: because its time was over.
        killed: by this side, after too long by the clock: the machine may just have been busy.
    """

    def __init__(self, *, timed_out: bool, killed: bool = False) -> None:
        super().__init__()
        self.timed_out, self.killed = timed_out, killed


class MathProcess:
    """A running ``math_worker`` behind a pipe; for one caller at a time.

    Args:
        seconds: CPU seconds of one request.
        memory_bytes: address space.

    Raises:
        RewardError: it did not start.
    """

    def __init__(self, seconds: float, memory_bytes: int) -> None:
        self._wall_s = _WALL_PER_CPU * seconds
        self._waiting = b""
        paths = [str(_PACKAGE_ROOT), *(path for path in sys.path if path)]
        with tempfile.TemporaryFile() as words:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hybrid_lora_plugin.rewards.math_worker"]
                + [f"--parent={os.getpid()}", f"--seconds={seconds}", f"--bytes={memory_bytes}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                stderr=words,
                # Not the user's folder, where a file may have the name of a module.
                cwd=_PACKAGE_ROOT,
                # As this process finds modules; one thread, since each takes address space.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )
            try:
                reply = self._reply(START_S)
            except Ended:
                self.kill()
                raise RewardError(_why(words), see="rewards-not-possible") from None
        if reply != {"ready": True}:
            self.kill()
            raise RewardError(f"math rewards: the process answered {reply} at its start", see="rewards-not-possible")

    def ask(self, request: dict[str, str]) -> dict[str, object]:
        """The reply to a request, one of ``math_worker``'s.

        Raises:
            Ended: the process ended first; it is of no further use.
        """
        try:
            os.write(_open(self._process.stdin).fileno(), json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            self.kill()
            raise Ended(timed_out=False) from None
        return self._reply(self._wall_s)

    def _reply(self, seconds: float) -> dict[str, object]:
        output = _open(self._process.stdout).fileno()
        poll, end = select.poll(), time.monotonic() + seconds
        poll.register(output, select.POLLIN)
        while b"\n" not in self._waiting:
            left = end - time.monotonic()
            if left <= 0:
                self.kill()
                raise Ended(timed_out=True, killed=True)
            if poll.poll(left * 1000):
                received = os.read(output, _CHUNK)
                if not received:
                    with suppress(subprocess.TimeoutExpired):
                        # It ends by itself; killed now, it would not tell why.
                        self._process.wait(_END_S)
                    self.kill()
                    raise Ended(timed_out=self._process.returncode == -signal.SIGXCPU)
                self._waiting += received
        line, _, self._waiting = self._waiting.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def forget(self) -> None:
        """Let go of the process in a fork of its parent: it is the parent's."""
        self._process.returncode = 0
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _why(words: IO[bytes]) -> str:
    words.seek(0)
    said = words.read(65536).decode(errors="replace").strip().splitlines()
    last = said[-1] if said else "it said nothing"
    if "math_verify" in last or "latex2sympy2_extended" in last:
        return (
            f"math rewards: math-verify is missing: {last}; install it with pip install 'hybrid-lora-plugin[rewards]'"
        )
    return f"math rewards: the process that compares expressions did not start: {last}"
