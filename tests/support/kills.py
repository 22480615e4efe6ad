"""Processes that are killed: at a chosen call of the file system, or at a moment."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

#: of Python's audit events, those that change what is on a disk or are about to
_CHANGING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile"}


def killed_at(event: int, work: Callable[[], None]) -> bool:
    """Do ``work`` in a fork that is killed just before its ``event``-th call that may change a disk, from 0.

    Returns:
        Whether it was killed; False where it ended before.
    """
    child = os.fork()
    if child == 0:
        left = event

        def watch(name: str, arguments: tuple) -> None:
            nonlocal left
            if name not in _CHANGING or (name == "open" and not _writes(arguments)):
                return
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        status = 1
        try:
            sys.addaudithook(watch)
            work()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the work itself failed with {status}"
    return status != 0


def _writes(arguments: tuple) -> bool:
    mode, flags = arguments[1], arguments[2]
    return (
        any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
    )


def events_of(work: Callable[[], None]) -> int:
    """How many such calls ``work`` makes, in a fork."""
    read, written = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def watch(name: str, arguments: tuple) -> None:
            nonlocal count
            count += name in _CHANGING and (name != "open" or _writes(arguments))

        try:
            sys.addaudithook(watch)
            work()
            os.write(written, str(count).encode())
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(written)
    with os.fdopen(read) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return int(said)


def killed_after(seconds: float, work: Callable[[], None]) -> bool:
    """Do ``work`` in a fork that is killed after so many seconds; whether it was, or ended before."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"the work itself failed with {os.waitstatus_to_exitcode(status)}"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True
