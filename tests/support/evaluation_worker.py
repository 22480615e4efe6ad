"""Runs by itself: ``hybrid-lora-eval`` with the real vLLM, interrupted by SIGTERM and given again.

``python tests/support/evaluation_worker.py OUT.json KEPT ARGUMENT...`` sends the signal once KEPT responses are there.
Both runs are of one process, whose imports are paid once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from hybrid_lora_plugin.cli.eval import main


def kept(folder: Path) -> int:
    """Whole lines of responses in the folder."""
    return sum(file.read_bytes().count(b"\n") for file in (folder / "responses").glob("*.jsonl"))


def interrupt(folder: Path, least: int) -> None:
    while kept(folder) < least:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)


def run(out: Path, least: int, arguments: list[str]) -> None:
    folder = Path(next(argument for argument in arguments if argument.startswith("output_dir=")).partition("=")[2])
    threading.Thread(target=interrupt, args=(folder, least), daemon=True).start()
    seen = {"interrupted": main(arguments), "kept": kept(folder), "left": sorted(p.name for p in folder.iterdir())}
    seen |= {"again": main(arguments), "whole": kept(folder)}
    out.write_text(json.dumps(seen))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
