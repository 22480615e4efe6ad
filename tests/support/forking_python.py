"""``python -m MODULE ARGUMENTS`` again and again, each in a fork of one process that has imported the module already.

A test of verl's command line spends nearly all its time on imports. The forks run the module as ``python -m`` does.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path


class ForkingPython:
    """Runs one module as a command.

    Args:
        module: e.g. ``verl.trainer.main_ppo``.
        folder: where the process runs.
        environment: of the process and its forks.
    """

    def __init__(self, module: str, folder: Path, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forking_python", module],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run the module with these arguments; ``stdout`` of the result has both streams."""
        with tempfile.NamedTemporaryFile("r", suffix=".txt") as output:
            self._process.stdin.write(json.dumps({"arguments": arguments, "output": output.name}) + "\n")
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


_ANSWER = "exit status: "


def _serve(module: str) -> None:
    importlib.import_module(module)
    # So that running it defines it anew, without a warning.
    del sys.modules[module]
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            output = os.open(request["output"], os.O_WRONLY | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            sys.argv[1:] = request["arguments"]
            # Not caught: the interpreter ends the fork as it ends any command.
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            raise SystemExit
        _, status = os.waitpid(child, 0)
        print(f"{_ANSWER}{os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
