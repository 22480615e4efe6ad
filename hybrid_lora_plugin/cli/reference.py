"""Write the two pages that are made from code: ``python -m hybrid_lora_plugin.cli.reference CONFIGURATION CONTRACTS``.

``docs/configuration.md`` comes from the configuration dataclasses, ``docs/contracts.md`` from the table of contracts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_lora_plugin.cli.arguments import default_text, options
from hybrid_lora_plugin.config import (
    CRITERIA,
    AllocateCommandConfig,
    CompareCommandConfig,
    DataCommandConfig,
    DoctorCommandConfig,
    EvaluateCommandConfig,
    ExportCommandConfig,
    HybridLoraConfig,
    ProbeCommandConfig,
)
from hybrid_lora_plugin.config_evidence import EvidenceCommandConfig, EvidencePlanConfig
from hybrid_lora_plugin.config_plan import PlanCommandConfig
from hybrid_lora_plugin.config_trial import TrialRunsCommandConfig
from hybrid_lora_plugin.scoring import get_criterion
from hybrid_lora_plugin.verl_backend.contracts import (
    BEHAVIOURS,
    CONTRACTS,
    FEATURES,
    SUBJECTS,
    SYNC,
    Behaviour,
    Contract,
)

SECTIONS = (
    (
        "The `hybrid_lora` node of a verl run",
        "Set on the command line of `verl.trainer.main_ppo` behind `+hybrid_lora=enabled`, for example "
        "`hybrid_lora.full_lr=2e-6`. `criterion`, `direction`, `normalise`, `budget`, `probe` and `control` are read "
        "by a run that is given no allocation and probes first; one that is given an allocation does not read them, "
        "the artifact records what it was made with.",
        "hybrid_lora.",
        HybridLoraConfig,
    ),
    (
        "`hybrid-lora-probe`",
        "Given as `key=value`, for example `budget.ratio=0.05`. `data.files` is another name of `probe.files`.",
        "",
        ProbeCommandConfig,
    ),
    (
        "`hybrid-lora-allocate`",
        "Given as `key=value`. The rank r that mode `total_trainable` counts LoRA with is that of the probe.",
        "",
        AllocateCommandConfig,
    ),
    ("`hybrid-lora-compare`", "Given as `key=value`.", "", CompareCommandConfig),
    ("`hybrid-lora-data`", "Given as `key=value`; [its own page](data.md).", "", DataCommandConfig),
    ("`hybrid-lora-export`", "Given as `key=value`.", "", ExportCommandConfig),
    ("`hybrid-lora-doctor`", "Given as `key=value`; [its own page](doctor.md).", "", DoctorCommandConfig),
    ("`hybrid-lora-eval`", "Given as `key=value`; [its own page](evaluation.md).", "", EvaluateCommandConfig),
    (
        "`hybrid-lora-plan`",
        "Given as `key=value` in front of `--`; [its own page](plan.md).",
        "",
        PlanCommandConfig,
    ),
    (
        "`hybrid-lora-trial`",
        "Given as `key=value` in front of `--`; [a section of the probe's page](probe.md#a-trial-by-runs-of-verl).",
        "",
        TrialRunsCommandConfig,
    ),
    ("`hybrid-lora-evidence`", "Given as `key=value`; [its own page](evidence.md).", "", EvidenceCommandConfig),
    (
        "The plan of `hybrid-lora-evidence`",
        "Fields of the YAML file; a dot stands for a block in a block. [Its own page](evidence.md) has an example.",
        "",
        EvidencePlanConfig,
    ),
)


def table(kind: type, prefix: str) -> list[str]:
    """Markdown rows, one for each option of a configuration dataclass."""
    lines = ["| option | default | meaning | source of the default |", "| --- | --- | --- | --- |"]
    for name, _, spec in options(kind):
        meaning = spec.metadata["help"]
        if spec.metadata["choices"]:
            meaning += " One of " + ", ".join(f"`{choice}`" for choice in spec.metadata["choices"]) + "."
        if spec.metadata["unit"]:
            meaning += f" Unit: {spec.metadata['unit']}."
        lines.append(f"| `{prefix}{name}` | `{default_text(spec)}` | {meaning} | {spec.metadata['source']} |")
    return lines


def criteria_table() -> list[str]:
    """Markdown rows, one for each criterion, from the registry."""
    lines = ["| criterion | fully tuned first | what it reads | probe | source |", "| --- | --- | --- | --- | --- |"]
    for criterion in map(get_criterion, CRITERIA):
        reads = ", ".join(f"`{name}`" for name in criterion.needs) or ", ".join(
            f"`control.{name}`" for name in criterion.options
        )
        method = "none" if criterion.method is None else f"`{criterion.method}`"
        lines.append(
            f"| `{criterion.name}` | {criterion.direction} | {reads or 'nothing'} | {method} | {criterion.source} |"
        )
    return lines


def configuration_page() -> str:
    """The whole page as Markdown."""
    origin = "Generated from `hybrid_lora_plugin/config.py` and its parts by `make docs`; do not edit."
    lines = ["# Configuration", "", origin, ""]
    for title, introduction, prefix, kind in SECTIONS:
        lines += [f"## {title}", "", introduction, "", *table(kind, prefix), ""]
    lines += ["## Criteria", "", "What each one means is told in [the probe](probe.md).", "", *criteria_table(), ""]
    return "\n".join(lines)


def symbols_table(contracts: Sequence[Contract]) -> list[str]:
    """Markdown rows, one for each symbol."""
    head = ["symbol", "arguments", "features", "kind", "read in", "used in", "what for"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for contract in contracts:
        symbol = f"`{contract.symbol}`" + "".join(f" or `{name}`" for name in contract.also)
        cells = (
            symbol + (f" from {contract.since}" if contract.since else ""),
            _code(contract.arguments),
            _features(contract),
            contract.kind,
            contract.read_in,
            _code(contract.files),
            contract.reason,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def behaviours_table(behaviours: Sequence[Behaviour]) -> list[str]:
    """Markdown rows, one for each behaviour."""
    lines = ["| what must hold | features | used in | test |", "| --- | --- | --- | --- |"]
    for behaviour in behaviours:
        test = f"`{behaviour.test}`" if behaviour.test else "none"
        lines.append(f"| {behaviour.holds} | {_features(behaviour)} | `{behaviour.file}` | {test} |")
    return lines


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _features(record: Contract | Behaviour) -> str:
    text = ", ".join(record.features)
    return text.replace(", ".join(SYNC.split()), "every sync")


def contracts_page() -> str:
    """The page of what the plugin relies on in other libraries, as Markdown."""
    lines = [
        "# Contracts with other libraries",
        "",
        "Generated from `hybrid_lora_plugin/verl_backend/contracts/` by `make docs`; do not edit.",
        "",
        f"{len(CONTRACTS)} symbols and {len(BEHAVIOURS)} behaviours that the plugin relies on, each with the features",
        "that do not work without it. [`hybrid-lora-doctor`](doctor.md) looks the symbols up in what is installed and",
        "says which features work; `tests/test_contracts.py` does so for the versions named here, with the arguments",
        "in this order. A behaviour cannot be seen in a name; the test beside it shows it. Files are relative to",
        "`hybrid_lora_plugin/`. [Extending](extending.md) tells how to move to another version.",
        "`make contracts-gpu` looks for them in the sources of the versions that run on a GPU, which are others than",
        "those the tests run; [notes on verl](verl-notes.md#vllm-024-read-and-run-in-one-mode) has what came of it.",
        "",
        "## Features",
        "",
        "| feature | what it is | symbols |",
        "| --- | --- | ---: |",
    ]
    for name, title in FEATURES.items():
        lines.append(f"| {name} | {title} | {sum(name in contract.features for contract in CONTRACTS)} |")
    lines += ["", "Every sync: `merge`, `sparse_merge`, `adapter` and `receiver_merge`.", ""]
    for subject in SUBJECTS:
        lines += [f"## {subject.title}", "", *symbols_table(subject.contracts), ""]
        if subject.behaviours:
            lines += ["Behaviour:", "", *behaviours_table(subject.behaviours), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    configuration, contracts = map(Path, sys.argv[1:])
    configuration.write_text(configuration_page())
    contracts.write_text(contracts_page())
