"""One run of verl as a process of its own: its output in a file, its end with that of this process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hybrid_lora_plugin.errors import ConfigurationError


def run_verl(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    what: str,
    wait: Callable[[subprocess.Popen], int | str],
) -> None:
    """Run a command to its end.

    Args:
        arguments: program and arguments.
        log: for all that it says, behind the command itself.
        environment: variables beside those of this process.
        what: the option and the run, for messages.
        wait: gives its exit status, or says in words that it did not end; then it is ended.

    Raises:
        ConfigurationError: its exit status is not 0; the message has the end of what it said.
    """
    with log.open("w") as output:
        output.write(shlex.join(arguments) + "\n\n")
        output.flush()
        process = subprocess.Popen(
            arguments,
            env=os.environ | dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            status = wait(process)
        finally:
            _end(process)
    if status != 0:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ConfigurationError(
            f"{what} ended with status {status}; the same command goes on after the runs that are done, once its cause "
            f"is mended. All it said is in {log}, the end of it:\n{last}"
        )


def within(minutes: float) -> Callable[[subprocess.Popen], int | str]:
    """To wait for a process that long."""

    def wait(process: subprocess.Popen) -> int | str:
        try:
            return process.wait(timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            return f"none after {minutes:g} minutes"

    return wait


def _end(process: subprocess.Popen) -> None:
    """End the process and all of its session: Ray's processes outlive a driver that is killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _end_with_parent() -> None:
    """In the child: ask Linux for SIGTERM when the parent is killed, so that no run keeps the GPUs behind its back."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
