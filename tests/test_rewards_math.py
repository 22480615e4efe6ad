"""Expressions are compared as they should be, within a limit, from any thread, after a fork, and never for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from hybrid_lora_plugin.errors import ConfigurationError, RewardError
from hybrid_lora_plugin.rewards import math_process
from hybrid_lora_plugin.rewards.math import MathChecker
from tests.support.verl_processes import ROOT

pytest.importorskip("math_verify", reason="math-verify is not installed")

SECONDS = 2.0


@pytest.fixture(scope="module")
def checker():
    checker = MathChecker(SECONDS, 4 << 30)
    checker.start()
    yield checker
    checker.close()


RIGHT = [
    (r"\frac{1}{4}", "0.25"),
    (r"\frac{1}{4}", r"\dfrac14"),
    (r"\frac{1}{4}", "1/4"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"11\sqrt2", r"\sqrt{242}"),
    ("1,-2", "-2, 1"),
    ("1,-2", r"\{-2, 1\}"),
    (r"10,\!080", "10080"),
    ("58500", "58{,}500"),
    (r"\$18.90", "18.9"),
    (r"\$36", r"36 \text{ dollars}"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"15\mbox{ cm}^2", r"15 \text{ cm}^2"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"),
    ("90", r"90^{\circ}"),
    (r"137 \frac{1}{2}", "137.5"),
    (r"10\%", "10"),
    (r"10\%", "0.1"),
    ("10", r"10\%"),
    (r"[0,\infty)", r"x \geq 0"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"x \in [-2,7]", r"-2 \le x \le 7"),
    ("(3,4]", r"3 < x \le 4"),
    (r"\text{June 20}", "June 20"),
    (r"\text{Evelyn}", "Evelyn."),
    (r"\text{(C)}", "C"),
    (r"\text{(C)}", r"\textbf{(C)}"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("5", "x + 1 = 5"),
    ("y = 2x + 3", "2x+3"),
    (r"5x - 7y + 11z + 4 = 0", "5x-7y+11z=-4"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{bmatrix} 0.2 \\ -3.6 \end{bmatrix}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    ("4210_{5}", "4210_5"),
    ("52_8", r"52_{\text{8}}"),
    ("10,\\!080", "x = 10,\\!080"),
    (r"\$32,\!348", r"\displaystyle \$32,348"),
    ("3", r"\$3"),
    (r"\pi", r"\pi."),
    (r"\$32,\!348", r"x = \$32,\!348"),
    (r"\text{Navin}", r"{\text{Navin}}"),
    ("(3,4]", "{(3,4]}"),
    ("2516_8", "{2516_8}"),
    (r"\frac{1}{2}", r"{\frac{1}{2}}"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (".0000672", r"6.72 \times 10^{-5}"),
]
WRONG = [
    ("2516_8", "2516"),
    ("2516", "2516_8"),
    ("2516_8", "2516_9"),
    (r"\pi", "3.14159265"),
    (r"\pi", "3.14159265358979323846"),
    (r"2\sqrt{5}", "4.472136"),
    (r"\frac{1}{3}", "0.333333"),
    (r"10\%", "1"),
    ("204", "1=2=204"),
    ("204", "3=204"),
    ("1", "2+2=1"),
    ("3", "3, 7"),
    ("3", r"3 \text{ or } 7"),
    ("5", "5 or 6"),
    ("1,-2", "(1,-2)"),
    ("(2,4)", "2,4"),
    ("(2,4)", "(4,2)"),
    ("(2,4)", "[2,4]"),
    ("(2,4)", r"\{2,4\}"),
    ("(3,4]", "(3,4)"),
    (r"[0,\infty)", "x > 0"),
    (r"\text{east}", "seat"),
    (r"\text{east}", "west"),
    (r"\text{(C)}", "B"),
    (r"5.4 \text{ cents}", r"5.4 \text{ dollars}"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"),
    ("p - q", "q - p"),
    ("y = 2x + 3", "y = 2x - 3"),
    ("120", r"\int_0^{120} dx"),
    ("12345678901234567", "12345678901234568"),
    ("1.25", "1,25"),
    ("1", ""),
    ("1", "{"),
    ("6", "{2}{3}"),
    ("x", "x" * 5000),
]
HANGING = [
    "9^{9^{9^9}}",
    "99999^{99999^{99}}",
    "(10^{10})!",
    r"\binom{10^9}{5\cdot10^8}",
    "(" * 300 + "1" + ")" * 300,
    "{" * 900 + "1" + "}" * 900,
    r"\sin(\sin(" * 30 + "x" + "))" * 30,
    "(" + "+".join(f"x^{{{power}}}" for power in range(100)) + ")^{500}",
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_a_rewriting_is_right(checker, gold, answer):
    verdict = checker.compare(gold, answer)
    assert verdict.correct and not verdict.note


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_another_value_or_form_is_wrong(checker, gold, answer):
    verdict = checker.compare(gold, answer)
    assert not verdict.correct and verdict.note and not verdict.timed_out


@pytest.mark.parametrize("answer", HANGING)
def test_an_expression_built_to_hang_is_over_in_time_and_told_apart(checker, answer):
    started = time.monotonic()
    verdict = checker.compare("7", answer)
    assert not verdict.correct and verdict.timed_out
    # Twice the time where the machine was busy and the process was killed by the clock, plus its start.
    assert time.monotonic() - started < 2 * (math_process._WALL_PER_CPU * SECONDS + 20)


def test_an_expression_that_takes_about_the_time_there_is_is_wrong_whether_that_was_enough_or_not(checker):
    # One to three seconds of CPU time, by the machine.
    verdict = checker.compare("7", "2^{" * 300 + "2" + "}" * 300)
    assert not verdict.correct and (verdict.timed_out or verdict.note)


def test_the_next_answer_is_judged_after_one_that_killed_the_process(checker):
    killed = checker._take()
    killed._process.kill()
    checker._give_back(killed)
    assert checker.compare(r"\frac12", "0.5").correct


def test_a_process_stopped_by_the_clock_is_tried_once_more_and_then_counted_as_time(checker, monkeypatch):
    started, real = [], math_process.MathProcess._reply

    def stopped(process, seconds):
        if seconds == process._wall_s:
            started.append(process)
            process.kill()
            raise math_process.Ended(timed_out=True, killed=True)
        return real(process, seconds)

    monkeypatch.setattr(math_process.MathProcess, "_reply", stopped)
    verdict = checker.compare(r"\frac12", "0.5")
    assert not verdict.correct and verdict.timed_out and len(set(map(id, started))) == 2


def test_several_threads_each_get_their_own_answer(checker):
    # verl calls a reward function in its executor's threads, where math-verify by itself raises.
    found = {}

    def judge(number):
        found[number] = [
            checker.compare(f"\\frac{{{number}}}{{7}}", f"{answer}/7").correct for answer in range(number, number + 4)
        ]

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: [True, False, False, False] for number in range(1, 9)}


def test_a_fork_starts_a_process_of_its_own(checker):
    checker.compare(r"\frac12", "0.5")
    before = checker._idle[0]._process.pid
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            right = checker.compare(r"\frac12", "0.5").correct
            os.write(write, f"{right} {checker._idle[0]._process.pid}".encode())
            checker.close()
        finally:
            os._exit(0)
    os.close(write)
    said = os.read(read, 100).decode().split()
    os.waitpid(child, 0)
    os.close(read)
    assert said[0] == "True" and int(said[1]) != before
    assert checker.compare(r"\frac13", "2/6").correct and checker._idle[0]._process.pid == before


def test_the_process_ends_when_its_parent_is_killed():
    code = (
        "import os, time\n"
        "from hybrid_lora_plugin.rewards.math import MathChecker\n"
        "checker = MathChecker(2.0, 4 << 30); checker.start()\n"
        # A child that lives on keeps the other end of the pipe open.
        "if os.fork() == 0: time.sleep(60); os._exit(0)\n"
        "print(checker._idle[0]._process.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError("it goes on without its parent")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_math_verify_it_is_refused_with_the_line_that_installs_it(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    # The folder of the package goes first, so its environment must not be the one that has it.
    monkeypatch.setattr(math_process, "_PACKAGE_ROOT", linked_package(tmp_path))
    with pytest.raises(RewardError, match=r"hybrid-lora-plugin\[rewards\]"):
        MathChecker(2.0, 4 << 30).start()


def linked_package(folder):
    root = folder / "root"
    root.mkdir()
    (root / "hybrid_lora_plugin").symlink_to(ROOT / "hybrid_lora_plugin")
    return root


@pytest.mark.parametrize(
    ("gold", "checkable"),
    [
        (r"\frac{1}{2}", True),
        (r"\text{June 20}", True),
        ("2516_8", True),
        (r"10\%", True),
        (r"[0,\infty)", True),
        ("", False),
        (r"\frac{", False),
        (r"\begin{foo} 1", False),
        ("1" * 5000, False),
    ],
)
def test_a_gold_is_checkable_if_it_equals_itself(checker, gold, checkable):
    assert checker.gold_is_checkable(gold) is checkable


def test_a_gold_that_cannot_be_parsed_is_refused_and_not_scored(checker):
    with pytest.raises(ConfigurationError, match="cannot be parsed"):
        checker.compare(r"\frac{", "5")
