"""Gloo ranks as torchrun starts them, in forks of one process that has imported verl and its engine already.

A rank of a test spends more time on imports than on its work. Each fork has the variables that torchrun sets and runs
the worker's file as a command; the store for its process groups is hosted by their parent, as by torchrun's agent.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: What the workers import before their work begins.
IMPORTED = (
    "verl.trainer.sft_trainer",
    "verl.workers.engine_workers",
    "hybrid_lora_plugin.verl_backend.engine",
    "transformers.models.qwen2.modeling_qwen2",
    "peft",
)
_ANSWER = "exit status: "


class ForkedRanks:
    """Runs files as commands on gloo ranks.

    Args:
        folder: where the process runs.
        environment: of the process and its forks.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked_ranks"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(
        self, ranks: int, arguments: list[str], timeout: float, environment: dict[str, str]
    ) -> subprocess.CompletedProcess:
        """Run ``python ARGUMENTS`` on ``ranks`` ranks; ``stdout`` of the result has all streams of all ranks.

        ``environment`` is all of the ranks', set after the imports.
        """
        with tempfile.NamedTemporaryFile("r", suffix=".txt") as output:
            request = {"ranks": ranks, "arguments": arguments, "output": output.name, "timeout": timeout}
            request["environment"] = environment
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            # What importing printed stands before the answer.
            for line in self._process.stdout:
                if line.startswith(_ANSWER):
                    status = int(line.removeprefix(_ANSWER))
                    return subprocess.CompletedProcess(arguments, status, stdout=Path(output.name).read_text())
        raise AssertionError("the process that forks has ended")

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(60)


_started: dict[Path, ForkedRanks] = {}


def forked_ranks(folder: Path, environment: dict[str, str]) -> ForkedRanks:
    """The one process for this folder, which ends with the tests; ``environment`` is that of its imports."""
    if folder not in _started:
        _started[folder] = ForkedRanks(folder, environment)
        atexit.register(_started[folder].close)
    return _started[folder]


def _serve() -> None:
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        # The store's thread is not to be in the process that forks, so each request has a parent of its own.
        agent = os.fork()
        if not agent:
            os._exit(_agent(json.loads(line)))
        _, status = os.waitpid(agent, 0)
        print(f"{_ANSWER}{os.waitstatus_to_exitcode(status)}", flush=True)


def _agent(request: dict) -> int:
    """Start the ranks, host their store, and end all as soon as one fails; returns the exit status."""
    from torch.distributed import TCPStore

    output = os.open(request["output"], os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    ranks, pipes = [], []
    for rank in range(request["ranks"]):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(writing)
            _rank(request, rank, int(os.read(reading, 16)))
        os.close(reading)
        ranks.append(child)
        pipes.append(writing)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for pipe in pipes:
        os.write(pipe, str(store.port).encode())
    failed, running, until = 0, set(ranks), time.monotonic() + request["timeout"]
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            running.discard(child)
            failed = failed or os.waitstatus_to_exitcode(status)
        elif time.monotonic() > until:
            print(f"not finished after {request['timeout']} s", flush=True)
            failed = failed or 1
        else:
            time.sleep(0.05)
        if failed:
            for child in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
    return min(abs(failed), 255)


def _rank(request: dict, rank: int, port: int) -> None:
    size = str(request["ranks"])
    os.environ.clear()
    os.environ |= request["environment"] | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "forked",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    command, *arguments = request["arguments"]
    # Not caught: the interpreter ends the fork as it ends any command.
    if command == "-m":
        module, *arguments = arguments
        sys.argv[1:] = arguments
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[1:] = arguments
        runpy.run_path(command, run_name="__main__")
    raise SystemExit


if __name__ == "__main__":
    _serve()
