"""The looks that import verl and vLLM, in a process of their own: ``python -m ….doctor.child import|run OUT.json``.

Of their own, because importing them changes a process, prints much, and ends it where a compiled part does not fit.
What has been found is written after every step, so that it is known how far a process got that ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.verl_backend.contracts import CONTRACTS, check
from hybrid_lora_plugin.verl_backend.doctor import environment

#: seconds after which a process that does not end counts as failed
LIMITS = {"import": 600, "run": 1800}


def look(depth: str) -> dict[str, Any]:
    """Look in a process of its own.

    Args:
        depth: ``import``, or ``run`` for both looks.

    Returns:
        What it wrote: ``devices`` and ``unusable`` as in ``environment``; ``seconds`` of each look that ended;
        ``missing``, rows of symbol and text; of ``run`` also ``tried``, features, and ``failed``, reasons by feature.
        ``ended``: why it ended early, where it did, and ``trying``: the features it was at.
    """
    with tempfile.TemporaryDirectory(prefix="hybrid-lora-doctor-") as folder:
        out, log = Path(folder) / "found.json", Path(folder) / "log.txt"
        command = [sys.executable, "-m", __name__, depth, str(out)]
        with log.open("w") as output:
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=LIMITS[depth]
                ).returncode
                ended = f"the process ended with status {done}" if done else ""
            except subprocess.TimeoutExpired:
                ended = f"no end after {LIMITS[depth]} s"
        found = json.loads(out.read_text()) if out.exists() else {}
        if ended:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            found["ended"] = f"{ended}: {lines[-1]}" if lines else ended
        return found


def main(depth: str, out: Path) -> None:
    """Look, in this process."""
    found: dict[str, Any] = {"devices": environment.devices(), "seconds": {}}
    if found["devices"][0]["kind"] == "cpu":
        for name, value in environment.CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)

    def keep(**parts: Any) -> None:
        found.update(parts)
        # Whole or not at all: the process may end at any time.
        unfinished = out.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(found))
        unfinished.replace(out)

    started = time.perf_counter()
    keep(unusable=environment.unusable_kernels(environment.attention_kernels()))
    import verl  # noqa: F401  loads the plugin as in any verl process

    missing = [[contract.symbol, said] for contract in CONTRACTS if (said := check(contract)) is not None]
    imported = time.perf_counter()
    keep(missing=missing, seconds={"import": imported - started})
    if depth == "run":
        from hybrid_lora_plugin.verl_backend.doctor.trial import trial

        trial(keep)
        keep(seconds=found["seconds"] | {"run": time.perf_counter() - imported})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
