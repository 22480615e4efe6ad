"""Tables of what ``gap_search`` found: best rate of each arm, and full fine-tuning against LoRA seed by seed.

python -m recipes.evidence.gap_report docs/evidence/gap-search
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

RESULTS, REPORT = "results.jsonl", "report.md"


def report(rows: Sequence[dict]) -> str:
    """Markdown of the results; ``accuracy`` is the greedy accuracy on held-out problems after the last step."""
    cells: dict[tuple, dict[tuple, dict[int, float]]] = {}
    for row in rows:
        # Of two forms of the script the results are kept apart: they differ where one would have them equal.
        place = tuple(row[name] for name in ("task", "steps", "problems", "answers", "updates", "form"))
        what = (row["arm"], row["rank"], row["full_lr"], row["lora_lr"], row["trainable"])
        cells.setdefault(place, {}).setdefault(what, {})[row["seed"]] = row["accuracy"][-1][1]
    lines = [
        "# Search for a gap between LoRA and full fine-tuning",
        "",
        f"{len(rows)} runs. Greedy accuracy on 256 held-out problems after the last step, by seed; exploratory: rates "
        "are chosen on the seeds that they are compared by.",
    ]
    for (task, steps, problems, answers, updates, form), found in cells.items():
        more = "" if updates == 2 else f", {updates} updates"
        more += ", earlier form of the script" if form == 1 else ""
        lines += ["", f"## {task}, {steps} steps of {problems} problems with {answers} answers{more}", ""]
        lines += ["| arm | rank | full rate | LoRA rate | trainable | by seed | mean |", _RULE]
        for (arm, rank, full_lr, lora_lr, trainable), by_seed in found.items():
            values = ", ".join(f"{seed}: {value:.3f}" for seed, value in sorted(by_seed.items()))
            rates = " | ".join(f"{rate:g}" if rate else "" for rate in (full_lr, lora_lr))
            lines.append(f"| {arm} | {rank or ''} | {rates} | {trainable:,} | {values} | {_mean(by_seed):.3f} |")
        lines += _gap(found)
    return "\n".join(lines) + "\n"


_RULE = "| --- | ---: | ---: | ---: | ---: | --- | ---: |"


def _mean(by_seed: dict[int, float]) -> float:
    return sum(by_seed.values()) / len(by_seed)


def _gap(found: dict[tuple, dict[int, float]]) -> list[str]:
    """Full fine-tuning minus LoRA of rank 1, each at its best mean among the rates tried with the most seeds."""
    best = {}
    for arm, rank in (("full", 0), ("lora", 1)):
        tried = [by_seed for what, by_seed in found.items() if what[:2] == (arm, rank)]
        most = max(map(len, tried), default=0)
        best[arm] = max((by_seed for by_seed in tried if len(by_seed) == most), key=_mean, default={})
    both = sorted(best["full"].keys() & best["lora"].keys())
    if not both:
        return []
    differences = [best["full"][seed] - best["lora"][seed] for seed in both]
    said = ", ".join(f"{value:+.3f}".replace("-", "−") for value in differences)
    mean = f"{sum(differences) / len(differences):+.3f}".replace("-", "−")
    of = "" if len(both) == 1 else f", mean {mean}"
    return ["", f"`full` minus `lora` of rank 1, each at its best rate: {said}{of}."]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence.gap_report", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help=f"with {RESULTS}; {REPORT} is written there")
    folder = parser.parse_args(arguments).folder
    rows = [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]
    (folder / REPORT).write_text(report(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
