"""What the doctor found, by feature: as tables for a terminal, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_lora_plugin.verl_backend.contracts import CONTRACTS, FEATURES, Contract

_WIDTH = 110


@dataclass
class Look:
    """One look at every feature.

    Attributes:
        seconds: how long it took.
        missing: for ``source`` and ``import``, every symbol that is not as it should be and what is missing.
        failed: features that did not work, with the reason: for ``run``, and for ``import`` where it ended early.
        tried: features that ``run`` tried; of the others nothing is known.
    """

    seconds: float = 0.0
    missing: list[tuple[Contract, str]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    tried: tuple[str, ...] = ()

    def said(self, feature: str) -> list[str]:
        """What is wrong with a feature, a line each."""
        lines = [text for contract, text in self.missing if feature in contract.features]
        return lines + ([self.failed[feature]] if feature in self.failed else [])


@dataclass
class Report:
    """All of it.

    Attributes:
        plugin: the plugin's version.
        versions, kernels, devices: from ``environment``; ``devices`` is None where torch was not imported.
        looks: by name.
        notes: lines below the tables.
    """

    plugin: str
    versions: list[dict[str, Any]]
    kernels: list[dict[str, Any]]
    devices: list[dict[str, Any]] | None
    looks: dict[str, Look]
    notes: list[str] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """Features that a look found something wrong with."""
        return [name for name in FEATURES if any(look.said(name) for look in self.looks.values())]

    def as_json(self) -> dict[str, Any]:
        """Everything, for a machine to read."""
        features = {}
        for name, title in FEATURES.items():
            symbols = [contract for contract in CONTRACTS if name in contract.features]
            looks = {}
            for kind, look in self.looks.items():
                tried = kind != "run" or name in look.tried
                looks[kind] = {"tried": tried, "wrong": look.said(name)}
            features[name] = {"title": title, "works": name not in self.broken, "symbols": len(symbols), "looks": looks}
        return {
            "plugin": self.plugin,
            "versions": self.versions,
            "attention_kernels": self.kernels,
            "devices": self.devices,
            "seconds": {kind: round(look.seconds, 1) for kind, look in self.looks.items()},
            "features": features,
            "broken": self.broken,
            "missing": [
                {"symbol": c.symbol, "look": kind, "said": said, "features": c.features, "files": c.files}
                for kind, look in self.looks.items()
                for c, said in look.missing
            ],
            "notes": self.notes,
        }

    def as_text(self) -> str:
        """Tables, then what is wrong, then one line that sums it up."""
        parts = [_table("Versions", ("library", "installed", "tested with"), map(_version_row, self.versions))]
        parts.append(_table("Attention kernels", ("kernel", "installed", "used by"), map(_kernel_row, self.kernels)))
        parts.append(_table("Devices", ("device", "what it is"), self._device_rows()))
        parts.append(
            _table(
                "Features, and how many symbols of other libraries each needs",
                ("feature", *self.looks, "what it is"),
                self._feature_rows(),
            )
        )
        if wrong := self._wrong():
            parts.append("\n".join(["Wrong", *wrong]))
        parts += [textwrap.fill(note, _WIDTH) for note in self.notes]
        parts.append(textwrap.fill(self.verdict(), _WIDTH))
        return "\n\n".join(parts)

    def verdict(self) -> str:
        """One sentence: which features do not work here."""
        looks = ", ".join(f"{kind} in {look.seconds:.0f} s" for kind, look in self.looks.items())
        looked = f"Looked at: {looks}."
        if not self.broken:
            return f"All {len(FEATURES)} features are intact as far as this look goes. {looked}"
        return f"Not working here: {', '.join(self.broken)}. The other features are intact. {looked}"

    def _device_rows(self) -> list[tuple[str, ...]]:
        if self.devices is None:
            return [("not looked at", "check=import imports torch, which knows")]
        return [_device_row(device) for device in self.devices]

    def _feature_rows(self) -> list[tuple[str, ...]]:
        rows = []
        for name, title in FEATURES.items():
            symbols = sum(name in contract.features for contract in CONTRACTS)
            cells = []
            for kind, look in self.looks.items():
                wrong = look.said(name)
                if kind == "run":
                    cells.append("FAILED" if wrong else "ok" if name in look.tried else "not tried")
                else:
                    missing = sum(name in contract.features for contract, _ in look.missing)
                    cells.append(
                        "FAILED" if name in look.failed else f"{missing} MISSING" if wrong else f"{symbols} ok"
                    )
            rows.append((name, *cells, title))
        return rows

    def _wrong(self) -> list[str]:
        """Each thing that is wrong once, with the features that it breaks and the files that rely on it."""
        seen: dict[str, str] = {}
        for kind, look in self.looks.items():
            for contract, said in look.missing:
                of = f"breaks {', '.join(contract.features)}; used in {', '.join(contract.files)}"
                # The deeper look says the same of most.
                seen.setdefault(contract.symbol, _entry(said, of))
            for reason in dict.fromkeys(look.failed.values()):
                features = ", ".join(name for name, text in look.failed.items() if text == reason)
                seen[f"{kind} {reason}"] = _entry(f"{kind}: {reason}", f"breaks {features}")
        return [line for entry in seen.values() for line in entry.splitlines()]


def _entry(said: str, of: str) -> str:
    """What is wrong, and below it what comes of it."""
    options = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(said, _WIDTH, initial_indent="- ", **options)
    return "\n".join([*lines, *textwrap.wrap(of, _WIDTH, initial_indent="  ", **options)])


def _version_row(row: dict[str, Any]) -> tuple[str, ...]:
    version = row["version"] or "not installed"
    text = (
        row["tested"]
        + (f"; {row['ran']} ran" if row["ran"] else "")
        + (f"; {row['read']} was read" if row["read"] else "")
    )
    seen = (row["tested"], row["ran"], row["read"])
    known = any(v and (version == v or version.startswith((f"{v}.", f"{v}+"))) for v in seen)
    return row["name"], version, text if known else f"{text}: this is another one"


def _kernel_row(row: dict[str, Any]) -> tuple[str, ...]:
    version = row["version"] or "not installed"
    return row["name"], row.get("unusable") or version, row["used_by"]


def _device_row(device: dict[str, Any]) -> tuple[str, ...]:
    if "bytes" in device:
        return device["kind"], f"{device['name']}, {device['bytes'] / 2**30:.0f} GiB"
    return device["kind"], f"no accelerator; {device['cores']} cores, {device['name']}"


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned, the last one wrapped where lines would grow too long."""
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head) - 1)]
    indent = sum(widths) + 2 * len(widths)
    lines = [title]
    for row in cells:
        start = "".join(f"{cell:{width}}  " for cell, width in zip(row, widths, strict=False))
        first, *others = textwrap.wrap(row[-1], max(_WIDTH - 2 - indent, 30)) or [""]
        lines.append(f"  {start}{first}".rstrip())
        lines += [f"  {' ' * indent}{other}" for other in others]
    return "\n".join(lines)
