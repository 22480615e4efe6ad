"""What is fixed before the first comparison: the plan, what the runs depend on, and the rates, under one digest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.arms import LORA_MATCHED, MATCHED_STEPS
from hybrid_lora_plugin.evidence.results import sha256_of
from hybrid_lora_plugin.evidence.study import Study
from hybrid_lora_plugin.files import complete_file

FROZEN = "frozen.json"
#: parts of the plan, as opposed to what followed from it
_WAY_OUT = "put it back, or give another output_dir for a new comparison"


def content_of(study: Study) -> dict[str, Any]:
    """What is frozen, as plain JSON.

    Raises:
        ConfigurationError: choices or tuning runs are missing.
    """
    rates, ranks, steps = {}, {}, {}
    for arm in study.arms:
        for base, task in study.cells:
            tuned = study.tuned(arm, base, task)
            rates.setdefault(arm.name, {})[f"{base}/{task}"] = {
                "full": tuned.rates.full,
                "lora": tuned.rates.lora,
                "value": tuned.value,
                "diverged": tuned.diverged,
                "runs": tuned.runs,
                "edges": list(tuned.edges),
            }
            if tuned.rates.zeroth:
                rates[arm.name][f"{base}/{task}"]["zeroth"] = tuned.rates.zeroth
            if arm.role == LORA_MATCHED:
                ranks.setdefault(arm.name, {})[base] = dataclasses.asdict(study.matched_rank(arm, base))
            if arm.role in MATCHED_STEPS:
                steps.setdefault(arm.name, {})[f"{base}/{task}"] = study.steps(arm, base, task)
    chosen = {
        f"{start.base}/{start.task}/{start.seed}": {
            arm.name: list(study.choices.get(start, arm.selection) or ()) for arm in study.asked(start)
        }
        for start in study.starts(study.plan.seeds.compare)
    }
    return {
        "plan": dataclasses.asdict(study.plan),
        "identity": study.prepared.identity,
        "choices_sha256": sha256_of(chosen),
        "rates": rates,
        "matched_ranks": ranks,
        "matched_steps": steps,
    }


def freeze(study: Study) -> str:
    """Write ``frozen.json`` unless it is there; the digest of what is frozen.

    Raises:
        ConfigurationError: something is missing, or it is not what was frozen.
    """
    content = content_of(study)
    if (there := read_frozen(study.folder)) is not None:
        _refuse_changes(there, content)
        return there["sha256"]
    digest = sha256_of(content)
    with complete_file(study.folder / FROZEN) as file:
        file.write_text(json.dumps({"sha256": digest, **content}, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return digest


def read_frozen(folder: Path) -> dict[str, Any] | None:
    """What a folder's ``frozen.json`` holds; None where nothing is frozen.

    Raises:
        ConfigurationError: it was changed since it was written.
    """
    file = folder / FROZEN
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    digest = content.pop("sha256", None)
    if sha256_of(content) != digest:
        raise ConfigurationError(
            f"output_dir: {file} is not what its digest {digest} says, so it was edited; restore it, or give another "
            "output_dir"
        )
    return {"sha256": digest, **content}


def refuse_changed_plan(folder: Path, plan: Any) -> None:
    """Refuse a plan that is not the one that was frozen.

    Args:
        folder: of the comparison.
        plan: an ``EvidencePlanConfig``.

    Raises:
        ConfigurationError: naming the field, what it was and what it is.
    """
    if (frozen := read_frozen(folder)) is not None:
        _refuse_changes({"plan": frozen["plan"]}, {"plan": dataclasses.asdict(plan)})


def _refuse_changes(frozen: dict[str, Any], now: dict[str, Any]) -> None:
    frozen = {name: value for name, value in frozen.items() if name != "sha256"}
    # As JSON has them: tuples are lists there.
    for name, before, after in _differences(frozen, json.loads(json.dumps(now)), ""):
        raise ConfigurationError(
            f"{name.removeprefix('plan.')}: is {_said(after)} and was {_said(before)} when the comparison was frozen; "
            f"{_WAY_OUT}"
        )


def _differences(before: Any, after: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            place = f"{name}.{key}" if name else key
            yield from _differences(before.get(key), after.get(key), place)
    elif before != after:
        yield name, before, after


def _said(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:100] + "…"
