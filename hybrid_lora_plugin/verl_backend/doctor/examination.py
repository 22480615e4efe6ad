"""The three looks one after the other, and the report of what they found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from hybrid_lora_plugin import __version__
from hybrid_lora_plugin.verl_backend.contracts import CONTRACTS, FEATURES
from hybrid_lora_plugin.verl_backend.contracts.by_source import Sources, check_source, check_sources
from hybrid_lora_plugin.verl_backend.doctor import child, environment
from hybrid_lora_plugin.verl_backend.doctor.report import Look, Report

#: attention of a trainer for which nothing else is given
DEFAULT = "flash_attention_2"
#: what a user is told before a look that takes long
EXPECT = {
    "import": "importing verl and vLLM: about half a minute",
    "run": "importing verl and vLLM, then a step of verl's engine and a sync in every mode into a real vLLM, both "
    "tiny: about a minute",
}


def examine(depth: str, folders: Sequence[str] = (), say: Callable[[str], None] = lambda text: None) -> Report:
    """Look as deep as asked.

    Args:
        depth: the last of ``DOCTOR_LOOKS`` to take.
        folders: as on ``sys.path``, whose libraries stand for the installed ones; for ``source`` alone.
        say: told before a look that takes long what it does and how long that takes.
    """
    sources = Sources.installed(*folders)
    report = Report(__version__, environment.versions(sources), environment.attention_kernels(), None, {})
    started = time.perf_counter()
    report.looks["source"] = Look(missing=check_sources(CONTRACTS, sources))
    report.looks["source"].seconds = time.perf_counter() - started
    report.notes += [
        f"{contract.symbol} has another name in these libraries, {' or '.join(contract.also)}: the plugin uses that."
        for contract in CONTRACTS
        if contract.also and check_source(replace(contract, also=()), sources) and not check_source(contract, sources)
    ]
    if depth != "source":
        say(EXPECT[depth])
        _look_in_child(depth, report)
    if any(
        kernel["name"] == DEFAULT and (kernel["version"] is None or "unusable" in kernel) for kernel in report.kernels
    ):
        report.notes.append(
            f"{DEFAULT}, verl's default for the trainer, is not usable here: give a run "
            "++actor_rollout_ref.model.override_config.attn_implementation=sdpa"
        )
    return report


def _look_in_child(depth: str, report: Report) -> None:
    found = child.look(depth)
    report.devices = found.get("devices")
    for kernel in report.kernels:
        if kernel["name"] in found.get("unusable", {}):
            kernel["unusable"] = f"{kernel['version']}, cannot be imported: {found['unusable'][kernel['name']]}"
    by_symbol, seconds = {contract.symbol: contract for contract in CONTRACTS}, found.get("seconds", {})
    report.looks["import"] = Look(
        seconds.get("import", 0.0), [(by_symbol[symbol], said) for symbol, said in found.get("missing", [])]
    )
    if "missing" not in found:
        report.looks["import"].failed = dict.fromkeys(FEATURES, found.get("ended", "nothing was found"))
    elif depth == "run":
        failed = dict(found.get("failed", {}))
        if "ended" in found:
            failed |= dict.fromkeys(found.get("trying") or FEATURES, found["ended"])
        report.looks["run"] = Look(seconds.get("run", 0.0), failed=failed, tried=tuple(found.get("tried", ())))
