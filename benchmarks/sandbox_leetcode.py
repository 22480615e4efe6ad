r"""The data set's own solutions of LeetCodeDataset in the sandbox: how many pass, and within which limit.

    python -m benchmarks.sandbox_leetcode leetcode_v0_3_1_test.jsonl.gz [--seconds 30 15 3] [--out FOLDER]
        [--write docs/rewards.md]

All run at the largest limit; at a smaller one again those that took at least half of it by the clock, since the others
cannot reach it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from pathlib import Path

from benchmarks.pages import save_figures, write_page
from hybrid_lora_plugin.rewards.code_gold import CodeGold
from hybrid_lora_plugin.rewards.scorer import Scorer, ScoringLimits

BEGIN, END = "<!-- leetcode: begin -->", "<!-- leetcode: end -->"


def judge(rows: list[dict], seconds: float) -> dict[str, dict]:
    """Verdict and wall-clock seconds by problem."""
    found = {}
    with Scorer(ScoringLimits(code_seconds=seconds)) as scorer:
        scorer.prepare(["code"])
        for number, row in enumerate(rows, 1):
            gold = CodeGold(row["prompt"], row["test"], row["entry_point"]).text()
            started = time.perf_counter()
            verdict = scorer.score("code", f"```python\n{row['completion']}\n```", gold)
            found[row["task_id"]] = {
                "passed": verdict.correct,
                "timed_out": verdict.timed_out,
                "note": verdict.note,
                "seconds": round(time.perf_counter() - started, 2),
            }
            if number % 50 == 0 or not verdict.correct:
                print(
                    f"{seconds:g} s: {number}/{len(rows)} {row['task_id']} {verdict.note}", file=sys.stderr, flush=True
                )
    return found


def measure(rows: list[dict], limits: list[float]) -> dict:
    """Verdicts at every limit, the largest first."""
    limits = sorted(limits, reverse=True)
    found = {limits[0]: judge(rows, limits[0])}
    for limit in limits[1:]:
        first = found[limits[0]]
        again = [row for row in rows if first[row["task_id"]]["seconds"] >= limit / 2]
        found[limit] = {**{key: value for key, value in first.items()}, **judge(again, limit)}
    taken = [verdict["seconds"] for verdict in found[limits[0]].values()]
    return {
        "problems": len(rows),
        "cores": os.cpu_count(),
        "median_seconds": statistics.median(taken),
        "most_seconds": max(taken),
        "limits": {
            f"{limit:g}": {
                "passed": sum(verdict["passed"] for verdict in verdicts.values()),
                "timed_out": sum(verdict["timed_out"] for verdict in verdicts.values()),
                "failed": {name: verdict["note"] for name, verdict in verdicts.items() if not verdict["passed"]},
            }
            for limit, verdicts in found.items()
        },
        "verdicts": found[limits[0]],
    }


def table(result: dict) -> str:
    """The figures in Markdown."""
    lines = [
        f"Of the {result['problems']} solutions, on {result['cores']} busy cores: median "
        f"{result['median_seconds']:.2f} s for a problem by the clock, sandboxes included, "
        f"{result['most_seconds']:.0f} s for the slowest.",
        "",
        "| `code_seconds` | passed | over the limit | failed otherwise |",
        "| ---: | ---: | ---: | --- |",
    ]
    for limit, found in result["limits"].items():
        others = [f"`{name}`: {note}" for name, note in found["failed"].items() if not note.startswith("time")]
        lines.append(f"| {limit} | {found['passed']} | {found['timed_out']} | {'; '.join(others) or 'none'} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, nargs="+", default=[30.0, 15.0, 3.0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", type=Path, help="page of docs with the markers")
    given = parser.parse_args()
    with gzip.open(given.file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    result = measure(rows, given.seconds)
    print(table(result))
    if given.out:
        save_figures(given.out, "sandbox_leetcode", result)
    if given.write:
        write_page(given.write, table(result), BEGIN, END)


if __name__ == "__main__":
    main()
