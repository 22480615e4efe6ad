"""Reading ``allocation.json`` of schema version 1, which kept selection and probe in one record named ``criterion``.

Version 1 was written until 0.1; nothing writes it any more. Checkpoints keep the text of the allocation they were
trained under, so it stays readable.
"""

from __future__ import annotations

from typing import Any

from hybrid_lora_plugin.errors import AllocationError

# As they were when version 1 was written: these lists do not grow.
_SELECTION = ("direction", "normalise")
_PROBE = (
    "objective",
    "rank",
    "init",
    "warmup_steps",
    "lr",
    "partitions",
    "batch_size",
    "max_length",
    "dtype",
    "seed",
    "data",
)
_CONTROL_OPTIONS = ("seed", "type", "modules")
_WITHOUT_PROBE = ("random", "lora_ffn", "explicit", "spread")


def upgrade(payload: dict[str, Any], file: str) -> dict[str, Any]:
    """The same allocation in the fields of version 2.

    Args:
        payload: the parsed JSON of version 1; not changed.
        file: name for messages.

    Raises:
        AllocationError: ``criterion``, its options or ``budget`` is no object, or ``criterion`` lacks a key or has an
            unknown one.
    """
    old, budget = payload.get("criterion"), payload.get("budget")
    options = old.get("options", {}) if isinstance(old, dict) else {}
    for name, value in (("criterion", old), ("criterion.options", options), ("budget", budget)):
        if not isinstance(value, dict):
            raise AllocationError(
                f"{file}: {name}: {value!r}, an object is wanted; give an unchanged file written by hybrid-lora-probe"
            )
    known = {"name", *_SELECTION, *_PROBE, "options"}
    for problem, keys in (("missing", known - old.keys() - {"options"}), ("unknown", old.keys() - known)):
        if keys:
            raise AllocationError(
                f"{file}: criterion: {problem} key {min(keys)!r}; give an unchanged file written by hybrid-lora-probe"
            )
    upgraded = {name: value for name, value in payload.items() if name != "criterion"}
    upgraded["schema_version"] = 2
    upgraded["selection"] = {
        "criterion": old["name"],
        **{name: old[name] for name in _SELECTION},
        "options": {name: value for name, value in options.items() if name in _CONTROL_OPTIONS},
    }
    # Version 1 recorded dummies where nothing was probed, and the rank of the adapters among them.
    upgraded["budget"] = {**budget, "lora_rank": old["rank"]}
    if (old["objective"], old["warmup_steps"]) != ("none", 0):
        upgraded["probe"] = {
            "method": _method(old["name"], options),
            **{name: old[name] for name in _PROBE},
            "partitions_per_batch": options.get("partitions_per_batch", 1),
            "options": {name: value for name, value in options.items() if name in ("adalora", "autolora")},
        }
    return upgraded


def _method(criterion: str, options: dict[str, Any]) -> str:
    for name in ("adalora", "autolora"):
        if name in options:
            return name
    if criterion == "full_pruning":
        return "full_delta"
    # Selected anew by a criterion that reads nothing of the probe: its measurements may be of either kind.
    return "unknown" if criterion in _WITHOUT_PROBE else "svd_lora"
