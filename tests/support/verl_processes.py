"""Start real verl processes on the CPU and keep what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from recipes.demo.environment import cpu_environment
from tests.support.forked_ranks import forked_ranks

ROOT = Path(__file__).parents[2]


def environment_of(**environment: str) -> dict[str, str]:
    """The CPU environment of a process that can import the tests, with ``environment`` on top."""
    return cpu_environment(**{"PYTHONPATH": str(ROOT)} | environment)


def run(
    arguments: list[str], *, timeout: int = 3000, check: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Run ``python ARGUMENTS`` in the CPU environment; on failure the end of its output is in the assertion."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment_of(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    if check:
        assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stdout[-6000:]}"
    return done


def torchrun(ranks: int, arguments: list[str], **options) -> subprocess.CompletedProcess:
    """Run ``python ARGUMENTS`` on ``ranks`` gloo ranks."""
    # It takes a free port itself; one found here could be another process's by the time it is used.
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return run([*launcher, *arguments], **options)


def ranks(count: int, arguments: list[str], *, timeout: int = 3000, **environment: str) -> subprocess.CompletedProcess:
    """As ``torchrun``, without its imports (``forked_ranks``); nothing of ``environment`` may be read on import."""
    done = forked_ranks(ROOT, environment_of())(count, arguments, timeout, environment_of(**environment))
    assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stdout[-6000:]}"
    return done


def run_engine(
    out: Path, count: int, environment: dict | None = None, worker: str = "tests/support/engine_worker.py", **arguments
) -> dict:
    """Run a worker on gloo ranks; returns its results, its tensors under their file names, and ``folder``.

    With ``environment``, which may be read on import, the ranks are processes of their own.
    """
    from safetensors.torch import load_file

    out.mkdir(parents=True)
    (out / "arguments.json").write_text(json.dumps({"out": str(out)} | arguments, default=str))
    command = [worker, str(out / "arguments.json")]
    if environment:
        torchrun(count, command, **environment)
    else:
        ranks(count, command)
    results = json.loads((out / "results.json").read_text())
    results["folder"] = out
    return results | {file.stem: load_file(file) for file in out.glob("*.safetensors")}
