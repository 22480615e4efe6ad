"""What every command does around its own work: ``--version``, signals, and mistakes of the machine, each in one line.

Nothing but the standard library is imported here, and by a command's module nothing heavy either: what a signal does in
the first seconds is decided before torch is there.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import _exit
from types import FrameType

from hybrid_lora_plugin import __version__

Main = Callable[[Sequence[str] | None], int]
_writing = False


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came while a command was writing.

    Attributes:
        signum: which.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


def command(program: str) -> Callable[[Main], Main]:
    """Decorator of a command's ``main(argv=None) -> int``.

    It answers ``--version``, ends quietly with 130 or 143 on Ctrl-C or SIGTERM, and turns a disk that is full or
    read-only into one line and status 2, wherever it is noticed.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            argv = list(sys.argv[1:] if argv is None else argv)
            with _signals(program):
                try:
                    if "--version" in argv:
                        print(f"{program} {__version__}")
                        status = 0
                    else:
                        status = main(argv)
                    sys.stdout.flush()
                    return status
                except KeyboardInterrupt as interrupt:
                    print(f"{program}: interrupted, nothing was written", file=sys.stderr)
                    return 128 + getattr(interrupt, "signum", signal.SIGINT)
                except BrokenPipeError:
                    # Nobody reads on; Python would complain when it flushes once more at the end.
                    _silence(sys.stdout)
                    return 128 + signal.SIGPIPE
                except Exception as error:
                    if (line := _of_the_machine(error)) is None:
                        raise
                    print(f"{program}: {line}", file=sys.stderr)
                    _silence(sys.stdout)
                    return 2

        return run

    return decorate


@contextmanager
def writing() -> Iterator[None]:
    """While entered, a signal raises ``Stopped``, so that what is half written is removed; else it ends the process."""
    global _writing
    before, _writing = _writing, True
    try:
        yield
    finally:
        _writing = before


@contextmanager
def _signals(program: str) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        if _writing:
            raise Stopped(signum)
        # At once: an exception in the middle of an import is swallowed or printed by whoever imports.
        os.write(2, f"{program}: interrupted, nothing was written\n".encode())
        _exit(128 + signum)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            # nohup and shells' background jobs ignore Ctrl-C, and so does the command then.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _of_the_machine(error: Exception) -> str | None:
    """One line on an error of the file system; None on any other."""
    if isinstance(error, OSError):
        what = " ".join(str(error).split())
    elif type(error).__name__ == "SafetensorError" and "I/O error" in str(error):
        # The library that writes tensors has an error of its own for a full disk.
        what = " ".join(str(error).split())
    else:
        return None
    return f"a file cannot be read or written ({what}); make room there, or give files and folders on another disk"


def _silence(stream) -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):
        pass  # a stream of a test's own has no file
