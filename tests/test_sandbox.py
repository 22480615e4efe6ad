"""A program that a model wrote can break out of its sandbox in none of these ways, and cheat its tests in none."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from hybrid_lora_plugin.errors import ConfigurationError, RewardError, split_reference
from hybrid_lora_plugin.rewards import sandbox
from hybrid_lora_plugin.rewards.code_gold import CodeGold
from hybrid_lora_plugin.rewards.sandbox import ProgramLimits, Sandbox
from hybrid_lora_plugin.rewards.scorer import Scorer, ScoringLimits
from tests.support.verl_processes import ROOT


def reason_for_no_sandbox():
    try:
        sandbox._interpreter()
    except RewardError as error:
        return str(error)
    return ""


WHY_NOT = reason_for_no_sandbox()
needs_a_sandbox = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

LIMITS = ProgramLimits(seconds=1.0, memory_bytes=256 << 20, processes=4, disk_bytes=4 << 20, output_bytes=1 << 20)
DOUBLE = CodeGold("", "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(4) == 8\n", "double")


@pytest.fixture(scope="module")
def box():
    return Sandbox(LIMITS, 2)


def told(body):
    """A gold that is passed only by a program whose ``tell()`` says that something unwanted went well."""
    return CodeGold("", f"def check(candidate):\n    assert candidate() == {body!r}\n", "tell")


# -- breaking out: ``tell()`` returns "out" where it went well, and what held it where it did not ---------------------

SECRET = "hybrid-lora-secret"
BREAK_OUTS = {
    "read a file of the host": "return open(FILE).read()",
    "read the host's passwords": "return open('/etc/passwd').read()[:0] + 'out'",
    "list the home folders": "import os; return 'out' if os.listdir('/root') or os.listdir('/home') else 'no'",
    "write a file of the host": "open(FILE, 'w').write('out'); return 'out'",
    "write beside the interpreter": "open('/usr/lib/out.py', 'w').write('x'); return 'out'",
    "write to the root folder": "open('/out', 'w').write('x'); return 'out'",
    "write to the devices": "open('/dev/out', 'w').write('x'); return 'out'",
    "follow a link to the host": "import os; os.symlink(FILE, '/tmp/link'); return open('/tmp/link').read()",
    "connect to a port of the host": (
        "import socket; s = socket.create_connection(('127.0.0.1', PORT), 1); return s.recv(100).decode()"
    ),
    "connect to a socket file": "import socket; s = socket.socket(socket.AF_UNIX); s.connect(SOCKET); return 'out'",
    "resolve a name": "import socket; return 'out' if socket.getaddrinfo('example.com', 80) else 'no'",
    "listen beside the loopback": (
        "import socket; return 'out' if len(socket.if_nameindex()) > 1 else 'only ' + str(socket.if_nameindex())"
    ),
    "read the environment": "import os; return os.environ['SECRET']",
    "read the environment of its parent": "return open('/proc/1/environ').read()[:0] + 'out'",
    "read the tests in /proc": "return open('/proc/self/cmdline').read()[:0] + 'out'",
    "signal its parent": "import os; os.kill(HOST, 9); return 'out'",
    "signal all there are": (
        "import os, signal\nos.kill(-1, signal.SIGCONT)\nos.kill(2, 0) if os.getpid() != 2 else None\n"
        "return 'out' if len([n for n in range(3, 4000) if alive(n)]) else 'alone'"
    ),
    "become root": "import os; os.setuid(0); return 'out' if os.getuid() == 0 else 'no'",
    "make a namespace of its own": (
        "import ctypes; return 'out' if ctypes.CDLL(None).unshare(0x10000000) == 0 and os_root() else 'no'"
    ),
    "mount a file system": (
        "import ctypes; return 'out' if ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0 else 'no'"
    ),
    "leave the root folder": "import os; os.chroot('/tmp'); return 'out'",
    "raise its limits": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); "
        "resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6)); return 'out'"
    ),
    "fork without end": (
        "import os, time\nmade = 0\ntry:\n"
        "    while made < 50:\n        if os.fork() == 0: time.sleep(5); os.abort()\n        made += 1\n"
        "except OSError: pass\nreturn 'out' if made >= LIMIT else 'made ' + str(made)"
    ),
    "start threads without end": (
        "import threading, time\nmade = 0\ntry:\n"
        "    while made < 50:\n        threading.Thread(target=time.sleep, args=(5,), daemon=True).start(); made += 1\n"
        "except RuntimeError: pass\nreturn 'out' if made >= LIMIT else 'made ' + str(made)"
    ),
    "take all memory": "return 'out' if len(bytearray(1 << 30)) else 'no'",
    "fill its folder": (
        "written = 0\nfor n in range(64):\n    with open('/tmp/' + str(n), 'wb', buffering=0) as file:\n"
        "        written += file.write(bytes(1 << 20))\nreturn 'out' if written > DISK else 'no'"
    ),
    "fill the memory behind /dev/shm": "open('/dev/shm/out', 'wb').write(bytes(1 << 20)); return 'out'",
    "open files without end": "kept = [open('/dev/null') for _ in range(500)]; return 'out'",
    # Process 1 is bubblewrap's own inside the same walls, with no more rights; the host's are not there to be traced.
    "trace a process of the host": (
        "import ctypes; return 'out' if ctypes.CDLL(None).ptrace(16, HOST, 0, 0) == 0 else 'no'"
    ),
}
HELPERS = """
import os
def alive(number):
    try: os.kill(number, 0)
    except ProcessLookupError: return False
    return True
def os_root():
    try: os.chroot('/tmp')
    except OSError: return False
    return True
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What a program must not reach: a file, a socket file and a port, all open to everybody."""
    folder = tmp_path_factory.mktemp("host")
    for path in (folder, *list(folder.parents)[:2]):
        path.chmod(0o777)
    file = folder / "secret.txt"
    file.write_text("out")
    file.chmod(0o666)
    listening = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "socket"))
    unix.listen()

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            connection.sendall(b"out")
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    names = {
        "FILE": str(file),
        "SOCKET": str(folder / "socket"),
        "PORT": listening.getsockname()[1],
        "HOST": os.getpid(),
        "LIMIT": LIMITS.processes,
        "DISK": LIMITS.disk_bytes,
    }
    yield names
    listening.close()
    unix.close()
    assert file.read_text() == "out"


def program_of(body, names):
    values = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    return f"{HELPERS}\n{values}\ndef tell():\n    " + body.replace("\n", "\n    ")


@needs_a_sandbox
@pytest.mark.parametrize("way", BREAK_OUTS)
def test_a_program_does_not_break_out(box, host, monkeypatch, way):
    monkeypatch.setenv("SECRET", "out")
    outcome = box.run(program_of(BREAK_OUTS[way], host), told("out"))
    assert not outcome.passed and outcome.note, way
    assert "sandbox" not in outcome.note


@pytest.mark.parametrize(
    "way", ["read a file of the host", "connect to a port of the host", "follow a link to the host"]
)
def test_the_same_program_does_get_out_where_there_is_no_sandbox(host, way):
    # Or the test above would prove nothing: the file, the port and the link can be reached from here.
    names = {}
    exec(program_of(BREAK_OUTS[way], host).replace("/tmp/link", host["FILE"] + ".link"), names)
    assert names["tell"]() == "out"


# -- cheating ---------------------------------------------------------------------------------------------------------

CHEATS = {
    "be equal to everything": (
        "class Equal(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    __hash__ = int.__hash__\ndef double(x): return Equal(0)"
    ),
    "be equal to everything, as an object": "class E:\n    def __eq__(self, o): return True\ndef double(x): return E()",
    "leave with status 0": "import sys\nsys.exit(0)",
    "leave with status 0 when called": "import os\ndef double(x): os.abort() if x == 4 else None; return 6",
    "leave at once": "import os\nos.kill(os.getpid(), 9)",
    "replace the assertion error": "import builtins\nbuiltins.AssertionError = KeyError\ndef double(x): return 0",
    "replace how values are read": (
        "import json, sys\njson.loads = lambda *a, **k: {'passed': True}\n"
        "json.dumps = lambda *a, **k: '{\"passed\": true}'\n"
        "def double(x): return 0"
    ),
    "replace what runs it": (
        "import sys\nfor name, value in list(vars(sys.modules['__main__']).items()):\n"
        "    if callable(value): setattr(sys.modules['__main__'], name, lambda *a, **k: True)\ndef double(x): return 0"
    ),
    "say that it passed, on every channel": (
        'import os\nfor number in range(3, 64):\n    try: os.write(number, b\'{"passed": true, "note": ""}\\n\' * 5)\n'
        "    except OSError: pass\ndef double(x): return 0"
    ),
    "print that it passed": 'print(\'{"passed": true, "note": ""}\')\ndef double(x): return 0',
    "look for the tests in its process": (
        "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'test' in o and 'prompt' in o]\n"
        "def double(x): return 2 * x if found else 0"
    ),
    "look for the tests in its files": (
        "import os\nsystem = ('usr', 'bin', 'lib', 'lib64')\n"
        "found = [os.path.join(f, n) for top in os.listdir('/') if top not in system\n"
        "         for f, _, names in os.walk('/' + top) for n in names if n.endswith('.py')]\n"
        "def double(x): return 2 * x if found else 0"
    ),
    "read them from inherited files": (
        "import os\nseen = b''\nfor number in range(0, 64):\n    try: seen += os.pread(number, 100000, 0)\n"
        "    except OSError: pass\ndef double(x): return 2 * x if b'candidate' in seen else 0"
    ),
    "define another check": "def check(candidate): pass\ndef double(x): return 0",
    "return what it was called with": "def double(*arguments, **named): return arguments",
    "return values without end": "def double(x): return list(range(10**6))",
    "return a value that is deep": "def double(x):\n    v = []\n    for _ in range(10**5): v = [v]\n    return v",
    "return a value that holds itself": "def double(x):\n    v = []\n    v.append(v)\n    return v",
    "return a set that is slow to build": ("def double(x): return {k * (2**61 - 1) for k in range(20000)}"),
    "return a number that is long": "def double(x): return 1 << (8 * 10**5)",
    "raise": "def double(x): raise AssertionError",
    "have no such function": "def triple(x): return 3 * x",
    "be no Python": "def double(x: return 2 * x",
    "be for ever": "def double(x):\n    while True: pass",
    "be for ever before it is called": "while True: pass",
    "sleep": "import time\ndef double(x): time.sleep(100)",
    "hold the signal off and be for ever": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef double(x):\n    while True: pass"
    ),
    "leave a process behind": ("import os, time\ndef double(x):\n    if os.fork() == 0: time.sleep(100)\n    return 0"),
    "wait for input": "def double(x): return int(input())",
    "overflow the stack": ("import sys\nsys.setrecursionlimit(10**8)\ndef double(x): return double([x])"),
}
SLOW = {
    "be for ever",
    "be for ever before it is called",
    "sleep",
    "hold the signal off and be for ever",
}

#: so much work that on a busy machine the clock may end it first
LARGE = {
    "overflow the stack",
    "return a set that is slow to build",
    "return a value that is deep",
    "return a number that is long",
    "return values without end",
}


@needs_a_sandbox
@pytest.mark.parametrize("way", CHEATS)
def test_a_program_does_not_pass_by_cheating(box, way):
    started = time.monotonic()
    outcome = box.run(CHEATS[way], DOUBLE)
    assert not outcome.passed and outcome.note, way
    assert time.monotonic() - started < 60
    if way in SLOW - {"hold the signal off and be for ever"}:
        assert outcome.timed_out and outcome.note.startswith("time")
    elif way not in SLOW | LARGE:
        assert not outcome.timed_out


# -- what must pass ---------------------------------------------------------------------------------------------------

LINKED = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next
def list_node(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head
def values_of(node):
    values = []
    while node is not None:
        values.append(node.val)
        node = node.next
    return values
"""


FLIP = """
class Solution:
    def flip(self, head):
        before = None
        while head:
            head.next, before, head = before, head, head.next
        return before
"""
FLIPPED = """
def check(candidate):
    assert values_of(candidate(list_node(list(range(3000))))) == list(range(2999, -1, -1))
"""
FIRST = "def check(candidate):\n    assert values_of(candidate(list_node([7, 8]))) == [7]\n"
THREADED = """
import threading
def double(x):
    found = []
    threads = [threading.Thread(target=found.append, args=(x,)) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return sum(found)
"""
SAME = """
def check(candidate):
    inside = {1: [2], (3,): 'x'}
    for value in (None, True, 2**100, -2**63, 0.5, float('inf'), 'é\\ud800', (1, (2,)), inside, {1, 2},
                  frozenset([(1, 2)]), [[], [{}]]):
        found = candidate(value)
        assert found == value and type(found) is type(value)
    assert candidate(value=[1]) == [1]
"""
COUNT = """
from collections import defaultdict
def count(text):
    found = defaultdict(int)
    for letter in text: found[letter] += 1
    return found
"""
RIGHT = {
    "a function": ("def double(x): return 2 * x", DOUBLE),
    "one that prints much": ("def double(x):\n    print('x' * 10**6)\n    return 2 * x", DOUBLE),
    "a method": (
        "class Solution:\n    def double(self, x): return 2 * x",
        CodeGold("", DOUBLE.test, "Solution().double"),
    ),
    "one with a sorted list": (
        "from sortedcontainers import SortedList\ndef double(x): return SortedList([2 * x])[0]",
        DOUBLE,
    ),
    "one whose prompt has a sorted list": (
        "def double(x): return SortedList([2 * x])[0]",
        CodeGold("from sortedcontainers import SortedList", DOUBLE.test, "double"),
    ),
    "one with threads": (THREADED, DOUBLE),
    "one of linked lists": (FLIP, CodeGold(LINKED, FLIPPED, "Solution().flip")),
    "one that defines the prompt's class once more": (
        LINKED + "def first(head): return ListNode(head.val)",
        CodeGold(LINKED, FIRST, "first"),
    ),
    "one of values of every kind": ("def same(value): return value", CodeGold("", SAME, "same")),
    "one that returns a kind of dict": (
        COUNT,
        CodeGold("", "def check(candidate):\n    assert candidate('aab') == {'a': 2, 'b': 1}\n", "count"),
    ),
}


@needs_a_sandbox
@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_program_passes(box, kind):
    outcome = box.run(*RIGHT[kind])
    assert outcome.passed and not outcome.note and not outcome.timed_out


@needs_a_sandbox
def test_right_programs_pass_beside_one_that_takes_all_processes(box):
    # Programs of one user share a limit on processes that is set outside their namespaces.
    bomb = program_of(BREAK_OUTS["fork without end"].replace("os.abort()", "time.sleep(9)"), {"LIMIT": 10**6})
    bombing = threading.Thread(target=box.run, args=(bomb, told("out")))
    bombing.start()
    passed = [box.run(THREADED, DOUBLE).passed for _ in range(4)]
    bombing.join()
    assert passed == [True] * 4


@needs_a_sandbox
def test_nothing_of_a_sandbox_is_left_when_its_program_has_been_judged(box):
    outcome = box.run(CHEATS["leave a process behind"], DOUBLE)
    assert outcome.note == "a test failed"
    for _ in range(50):
        if not (left := [pid for pid in os.listdir("/proc") if pid.isdigit() and is_a_guest(pid)]):
            return
        time.sleep(0.1)
    raise AssertionError(f"left: {left}")


def is_a_guest(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"What runs inside a sandbox" in file.read()
    except OSError:
        return False


# -- a sandbox that fails raises --------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """Put another command in the place of bubblewrap's."""

    def put(script):
        monkeypatch.setattr(sandbox, "_interpreter", lambda: ("python3", ("/bin/sh", "-c", script, "bwrap")))
        monkeypatch.setattr(sandbox.time, "sleep", lambda seconds: None)

    return put


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions to create new namespace"),
        ("exit 7", "ended with status 7"),
        ("kill -9 $$", "ended with status -9"),
    ],
)
def test_a_sandbox_that_does_not_start_raises_with_its_words_and_scores_nothing(broken, script, message):
    broken(script)
    with Scorer() as scorer, pytest.raises(RewardError, match=message) as caught:
        scorer.score("code", "```python\ndef double(x): return 2 * x\n```", DOUBLE.text())
    assert split_reference(str(caught.value))[1] == "rewards-not-possible"


@needs_a_sandbox
def test_a_checker_that_is_killed_raises(box, monkeypatch):
    real = sandbox._Verdicts.next

    def killed(verdicts, seconds):
        if seconds == sandbox.START_S:
            return real(verdicts, seconds)
        os.close(os.open(os.devnull, os.O_RDONLY))
        verdicts.ended = True
        return None

    monkeypatch.setattr(sandbox._Verdicts, "next", killed)
    monkeypatch.setattr(sandbox.time, "sleep", lambda seconds: None)
    with pytest.raises(RewardError, match="the checker ended with status"):
        box.run("def double(x): return 2 * x", DOUBLE)


def test_where_no_namespace_can_be_made_the_words_and_the_ways_out_are_said(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    for path in (tmp_path, *list(tmp_path.parents)[:3]):
        path.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: str(fake))
    sandbox._interpreter.cache_clear()
    try:
        with (
            pytest.raises(RewardError, match="setting up uid map: Permission denied.*--security-opt"),
            Scorer() as scorer,
        ):
            scorer.prepare(["code"])
    finally:
        sandbox._interpreter.cache_clear()


@needs_a_sandbox
def test_a_gold_whose_source_raises_is_refused_and_not_scored(box):
    for gold in (
        CodeGold("import nothing_of_this_name", DOUBLE.test, "double"),
        CodeGold("", "1 / 0\n" + DOUBLE.test, "double"),
    ):
        with pytest.raises(ConfigurationError, match="its source raises (ModuleNotFound|ZeroDivision)Error"):
            box.run("def double(x): return 2 * x", gold)


# -- without a sandbox ------------------------------------------------------------------------------------------------


def test_without_a_sandbox_programs_are_judged_the_same_within_their_limits():
    limits = ScoringLimits(code_seconds=1.0)
    with Scorer(limits, unsandboxed_code=True) as scorer:
        for program, correct in (("return 2 * x", True), ("return 0", False), ("while True: pass", False)):
            verdict = scorer.score("code", f"```python\ndef double(x):\n    {program}\n```", DOUBLE.text())
            assert verdict.correct is correct and verdict.timed_out is ("while" in program)
        assert scorer.score("code", "no program", DOUBLE.text()).answer is None


@needs_a_sandbox
def test_it_works_after_a_fork_in_which_another_thread_held_all_places():
    code = (
        "import os, threading, time\n"
        "from hybrid_lora_plugin.rewards.code_gold import CodeGold\n"
        "from hybrid_lora_plugin.rewards.sandbox import ProgramLimits, Sandbox\n"
        "box = Sandbox(ProgramLimits(5.0, 1 << 28, 4, 1 << 20, 1 << 20), 1)\n"
        "gold = CodeGold('', 'def check(candidate):\\n    assert candidate() == 1', 'f')\n"
        "busy = threading.Thread(target=box.run, args=('import time\\ndef f(): time.sleep(2); return 1', gold))\n"
        "busy.start(); time.sleep(1.0)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if box.run('def f(): return 1', gold).passed else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.skipif(shutil.which("bwrap") is not None, reason="bubblewrap is installed")
def test_the_tests_above_say_why_they_are_skipped():
    assert "bubblewrap is missing" in WHY_NOT
