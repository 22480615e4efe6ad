"""Running a program that a model wrote against the tests of its problem, in two sandboxes.

Each is made by bubblewrap: no network, no files but a system's Python and one small folder in memory, no other
processes to see or signal, no environment, no way to more rights. The program and its tests are in different ones and
exchange values only (``sandbox_guest.py``), so a program can neither read its tests nor decide whether they pass.

A sandbox that fails raises. It never scores 0, which would teach a policy from the state of a machine.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hybrid_lora_plugin.errors import ConfigurationError, RewardError, reason_of
from hybrid_lora_plugin.rewards.code_gold import CodeGold

#: Wall-clock seconds for both sandboxes to start; 0.1 where the machine is idle.
START_S = 60.0
#: Wall-clock time that the tests may take, as a multiple of the program's CPU time: more than that is a program that
#: waits.
WALL_PER_CPU = 3.0
#: The user and the group ``nobody``, inside, and outside where this process is root's.
_NOBODY = 65534
_GUEST = Path(__file__).with_name("sandbox_guest.py")
#: What programs for LeetCode's problems import beside the standard library.
_CARRIED = "sortedcontainers"
_MEBIBYTE = 1 << 20
#: Exit statuses of a process that the limit on CPU time ended: bubblewrap's, and a process's own.
_OUT_OF_TIME = (128 + signal.SIGXCPU, -signal.SIGXCPU)
_WAYS_OUT = (
    "install bubblewrap (apt-get install bubblewrap); in Docker start the container with --security-opt "
    "seccomp=unconfined --security-opt apparmor=unconfined, and on Ubuntu 24.04 or newer allow user namespaces; leave "
    "the code problems out; or, where every program may do what you may do, give unsandboxed_code=true"
)


@dataclass(frozen=True)
class ProgramLimits:
    """What a program may take.

    Attributes:
        seconds: CPU seconds for all tests of its problem; by the clock ``WALL_PER_CPU`` times that.
        memory_bytes: address space of each of its processes.
        processes: processes and threads at a time, its own included.
        disk_bytes: its only folder, which is in memory.
        output_bytes: one result, as JSON.
    """

    seconds: float
    memory_bytes: int
    processes: int
    disk_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What the tests said: whether they passed, whether time was over, and in a few words why not."""

    passed: bool
    timed_out: bool
    note: str


class _NotStarted(Exception):
    """A sandbox did not come so far as to run a program."""


class Sandbox:
    """Runs programs; from any thread.

    Args:
        limits: what a program may take.
        at_a_time: how many run at a time; callers beyond wait.
        bare: no sandbox at all.
    """

    def __init__(self, limits: ProgramLimits, at_a_time: int, *, bare: bool = False) -> None:
        self._limits, self._at_a_time, self._bare = limits, at_a_time, bare
        self._free, self._owner = threading.Semaphore(at_a_time), os.getpid()

    def check(self) -> None:
        """Run a real program once.

        Raises:
            RewardError: it cannot be run, with the words of what failed, and the ways out.
        """
        if self._bare:
            print(
                "WARNING: unsandboxed_code: programs that a model wrote run with your rights, on your files and with "
                "your network",
                file=sys.stderr,
                flush=True,
            )
        else:
            _interpreter()

    def run(self, program: str, gold: CodeGold) -> Outcome:
        """Run a program against its tests.

        Raises:
            ConfigurationError: the source of the gold raises by itself.
            RewardError: a sandbox failed.
        """
        if self._owner != os.getpid():
            # In a fork: the places that other threads held are the parent's.
            self._free, self._owner = threading.Semaphore(self._at_a_time), os.getpid()
        start = (sys.executable, ()) if self._bare else _interpreter()
        with self._free:
            for last in (False, True):
                try:
                    return _run(program, gold, self._limits, None if self._bare else start[1], start[0])
                except _NotStarted as error:
                    if last:
                        raise RewardError(
                            f"code rewards: a sandbox did not start: {error}", see="rewards-not-possible"
                        ) from None
                    # A machine with too many processes may have a place in a moment.
                    time.sleep(1.0)
        raise AssertionError("unreachable")


@functools.cache
def _interpreter() -> tuple[str, tuple[str, ...]]:
    """A Python that starts in a sandbox, and the sandbox's command; found out once by running a program.

    Raises:
        RewardError: none.
    """
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise RewardError(
            f"code rewards: bubblewrap is missing, no command bwrap; {_WAYS_OUT}", see="rewards-not-possible"
        )
    limits = ProgramLimits(10.0, 1 << 30, 4, _MEBIBYTE, _MEBIBYTE)
    gold = CodeGold("", "def check(candidate):\n    assert candidate([1]) == (1, 2)\n", "f")
    said = []
    # A system's own comes first: another user, as which root runs programs, can read it.
    for python in dict.fromkeys(
        # Where links end, since the folder of a link need not be inside.
        os.path.realpath(path)
        for path in ("/usr/bin/python3", getattr(sys, "_base_executable", sys.executable))
    ):
        if not os.access(python, os.X_OK):
            continue
        for more in ((["--disable-userns"] if _version(bubblewrap) >= (0, 8) else []), []):
            command = (bubblewrap, *more, *_walls(python))
            try:
                if _run("def f(x): return (x[0], 2)", gold, limits, command, python).passed:
                    return python, command
                said.append(f"{python}: it gave a wrong result")
            except _NotStarted as error:
                said.append(f"{python}: {error}")
    words = "; ".join(dict.fromkeys(said)) or "there is no /usr/bin/python3"
    raise RewardError(f"code rewards: no sandbox can be made here: {words}; {_WAYS_OUT}", see="rewards-not-possible")


def _version(bubblewrap: str) -> tuple[int, ...]:
    said = subprocess.run([bubblewrap, "--version"], capture_output=True, text=True, check=False).stdout
    return tuple(int(part) for part in re.findall(r"\d+", said)[:2])


def _walls(python: str) -> list[str]:
    """bubblewrap's arguments, but for the size of the program's folder."""
    walls = ["--unshare-user", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    walls += ["--uid", str(_NOBODY), "--gid", str(_NOBODY), "--hostname", "sandbox"]
    walls += ["--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]
    walls += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            walls += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            walls += ["--ro-bind", f"/{name}", f"/{name}"]
    walls += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    home = Path(python).parent.parent
    if python.startswith("/usr/bin/"):
        # What an administrator or a user put there is none of a program's business.
        for folder in ("/usr/local", "/usr/src", "/usr/share"):
            if os.path.isdir(folder):
                walls += ["--tmpfs", folder, "--remount-ro", folder]
    elif not python.startswith("/usr/"):
        walls += ["--ro-bind", str(home), str(home)]
    # No /proc: a Python needs none, and it tells much of the host. Both / and /dev are folders in memory that a program
    # could fill otherwise.
    return [*walls, "--dev", "/dev", "--remount-ro", "/dev"]


def _run(program: str, gold: CodeGold, limits: ProgramLimits, walls: Sequence[str] | None, python: str) -> Outcome:
    """One run; ``walls`` is the command that makes a sandbox, None for no sandbox.

    Raises:
        _NotStarted: a sandbox failed before the program began, or the checker's was ended from outside.
    """
    cpu = math.ceil(limits.seconds)
    shared = {
        "AS": (limits.memory_bytes, limits.memory_bytes),
        "FSIZE": (limits.disk_bytes, limits.disk_bytes),
        "CORE": (0, 0),
        "NOFILE": (64, 64),
        "CPU": (cpu, cpu + 1),
    }
    # Inside, and not before: there it counts this sandbox's processes, outside those of all. bubblewrap's own is one.
    processes = {} if walls is None else {"NPROC": (limits.processes + 1, limits.processes + 1)}
    modules = _carried() if _CARRIED in program + gold.prompt + gold.test else {}
    payloads = {
        "program": {
            "prompt": gold.prompt,
            "program": program,
            "entry_point": gold.entry_point.strip(),
            "modules": modules,
            "limits": {**shared, **processes},
        },
        "checker": {
            "prompt": gold.prompt,
            "test": gold.test,
            "modules": modules,
            "output_bytes": limits.output_bytes,
            # Room for a result that is as large as allowed, beside the one expected.
            "limits": {**shared, "AS": (limits.memory_bytes + 32 * limits.output_bytes,) * 2},
        },
    }
    disk = ["--size", str(limits.disk_bytes), "--tmpfs", "/tmp"]
    with ExitStack() as stack:
        descriptors = stack.enter_context(_Descriptors())
        call_read, call_write = descriptors.pipe()
        result_read, result_write = descriptors.pipe()
        verdict_read, verdict_write = descriptors.pipe()
        folder = "/" if walls is not None else stack.enter_context(tempfile.TemporaryDirectory(prefix="bare-"))
        running: dict[str, subprocess.Popen[bytes]] = {}
        words: dict[str, IO[bytes]] = {}
        stack.callback(_end, running, walls is None)
        for role, reading, writing in (("program", call_read, result_write), ("checker", result_read, call_write)):
            payload = descriptors.file(payloads[role])
            given = [payload] + ([verdict_write] if role == "checker" else [])
            inside = [] if walls is None else [*walls, *disk, "--remount-ro", "/", "--chdir", "/tmp", "--"]
            words[role] = stack.enter_context(tempfile.TemporaryFile())
            running[role] = _start(
                [*inside, python, "-I", "-S", "-c", _guest(), role, *map(str, given)],
                reading,
                writing,
                words[role],
                given,
                folder,
            )
        # The guests have theirs; an end of a pipe that stays open here would hide that one of them is gone.
        for number in (call_read, call_write, result_read, result_write, verdict_write):
            descriptors.close(number)
        verdicts = _Verdicts(verdict_read)
        first = verdicts.next(START_S)
        if first is not None and "bad_gold" in first:
            raise ConfigurationError(f"gold: its source raises {first['bad_gold']}", see="gold-not-usable")
        if first != {"started": True}:
            _end(running, walls is None)
            raise _NotStarted(_said(running, words))
        verdict = verdicts.next(WALL_PER_CPU * limits.seconds)
        if verdict is not None:
            # Whether by SIGXCPU, as bubblewrap or the kernel reports it.
            over = verdict["note"] == "it ended" and _status(running["program"]) in _OUT_OF_TIME
            return Outcome(verdict["passed"], over, "time" if over else verdict["note"])
        if verdicts.ended:
            status = _status(running["checker"])
            if status in _OUT_OF_TIME:
                return Outcome(False, True, "time to compare its results")
            _end(running, walls is None)
            raise _NotStarted(f"the checker ended with status {status}, {_said(running, words)}")
        return Outcome(False, True, "time by the clock")


class _Verdicts:
    """What the checker says, one object a line.

    Attributes:
        ended: no more will come.
    """

    def __init__(self, number: int) -> None:
        self._number, self._waiting, self.ended = number, b"", False

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next object; None where none came in time or the checker ended."""
        poll, end = select.poll(), time.monotonic() + seconds
        poll.register(self._number, select.POLLIN)
        while b"\n" not in self._waiting:
            left = end - time.monotonic()
            if left <= 0:
                return None
            if poll.poll(left * 1000):
                received = os.read(self._number, 65536)
                if not received:
                    self.ended = True
                    return None
                self._waiting += received
        line, _, self._waiting = self._waiting.partition(b"\n")
        return json.loads(line)


def _start(
    command: list[str], reading: int, writing: int, words: IO[bytes], given: Sequence[int], folder: str
) -> subprocess.Popen[bytes]:
    # Root's processes are not counted against a limit on processes, whatever user a namespace shows.
    other: dict[str, Any] = {}
    if command[0].endswith("bwrap") and os.geteuid() == 0:
        other = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    try:
        return subprocess.Popen(
            command,
            stdin=reading,
            stdout=writing,
            stderr=words,
            pass_fds=given,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
            **other,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise _NotStarted(reason_of(error)) from error


def _status(process: subprocess.Popen[bytes]) -> int | None:
    """How a process ended that has ended or is about to."""
    try:
        return process.wait(5.0)
    except subprocess.TimeoutExpired:
        return None


def _end(running: dict[str, subprocess.Popen[bytes]], bare: bool) -> None:
    for process in running.values():
        # A sandbox's first process dies with it, and all others with that one; without a sandbox its group must do.
        if bare or process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _said(running: dict[str, subprocess.Popen[bytes]], words: dict[str, IO[bytes]]) -> str:
    found = []
    for role, file in words.items():
        file.seek(0)
        last = file.read(65536).decode(errors="replace").strip().splitlines()
        if last:
            found.append(last[-1])
        elif running.get(role) is not None:
            found.append(f"the {role}'s sandbox said nothing and ended with status {running[role].poll()}")
    return "; ".join(dict.fromkeys(found))


class _Descriptors:
    """File descriptors, each closed once: another thread may have been given the number of one that is closed."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def __enter__(self) -> _Descriptors:
        return self

    def __exit__(self, *error: object) -> None:
        for number in list(self._open):
            self.close(number)

    def close(self, number: int) -> None:
        """Close one, unless it is."""
        if number in self._open:
            self._open.remove(number)
            os.close(number)

    def pipe(self) -> tuple[int, int]:
        """The ends of a pipe, for reading and for writing."""
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def file(self, content: dict[str, Any]) -> int:
        """A file in memory with this content as JSON: it is read by whoever inherits it, whatever user that is."""
        number = os.memfd_create("payload")
        self._open.add(number)
        with os.fdopen(os.dup(number), "wb") as file:
            file.write(json.dumps(content).encode())
        os.lseek(number, 0, os.SEEK_SET)
        return number


@functools.cache
def _guest() -> str:
    return _GUEST.read_text(encoding="utf-8")


@functools.cache
def _carried() -> dict[str, str]:
    """Source by module of ``sortedcontainers``; nothing where it is not installed."""
    spec = importlib.util.find_spec("sortedcontainers")
    if spec is None or spec.origin is None:
        return {}
    files = sorted(Path(spec.origin).parent.glob("*.py"))
    return {
        _CARRIED if file.stem == "__init__" else f"{_CARRIED}.{file.stem}": file.read_text(encoding="utf-8")
        for file in files
    }
