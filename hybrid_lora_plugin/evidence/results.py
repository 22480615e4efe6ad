"""Raw results: a line of JSON for every run and for every start's choices, appended as they come.

What a process was writing when it was ended is a line without an end; the next one cuts it off and does that run again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError, HybridLoraError
from hybrid_lora_plugin.evidence.protocol import ZEROTH, Choice, Outcome, Run, Start


def canonical(value: Any) -> str:
    """JSON of which there is one for one content: sorted keys, no spaces, no number that is none."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: Any) -> str:
    """SHA-256 of ``canonical``, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@dataclass(frozen=True)
class RunKey:
    """What the outcome of a run depends on; arms that agree in it share a run."""

    base: str
    task: str
    seed: int
    full: str
    rank: int
    dora: bool
    full_lr: float
    lora_lr: float
    steps: int
    #: 0 too in files from before there was such a rate
    zeroth_lr: float = 0.0
    #: of the names of the frozen modules; empty where there are none, as in files from before there were
    frozen: str = ""


def run_key(run: Run) -> RunKey:
    """The key of a run; the names of its modules are in it as a digest."""
    start, choice = run.start, run.choice
    return RunKey(
        start.base,
        start.task,
        start.seed,
        names_digest(choice.full),
        choice.rank,
        choice.dora,
        run.full_lr,
        run.lora_lr,
        run.steps,
        run.zeroth_lr,
        names_digest(choice.frozen) if choice.frozen else "",
    )


@functools.lru_cache(None)
def names_digest(names: tuple[str, ...]) -> str:
    """16 hexadecimal digits of names in their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


class _Lines:
    """A file of JSON lines that only grows."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream = None

    def read(self) -> Iterator[dict[str, Any]]:
        """Its lines; one without an end is left out.

        Raises:
            ConfigurationError: a line in the middle is no JSON.
        """
        if not self._file.exists():
            return
        for number, line in enumerate(_whole(self._file.read_bytes()).splitlines(), start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ConfigurationError(
                    f"output_dir: line {number} of {self._file} is no JSON, so something else wrote there; remove that "
                    "line, and its run is done again"
                ) from error

    def append(self, content: dict[str, Any]) -> None:
        """Add a line; it is in the file when this returns, whatever ends the process afterwards."""
        if self._stream is None:
            if self._file.exists():
                whole = len(_whole(self._file.read_bytes()))
                if whole < self._file.stat().st_size:
                    with self._file.open("r+b") as stream:
                        stream.truncate(whole)
            self._stream = self._file.open("ab", buffering=0)
        self._stream.write(canonical(content).encode() + b"\n")

    def close(self) -> None:
        """No more is coming."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _whole(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


class RunResults:
    """Outcomes of runs."""

    def __init__(self, folder: Path) -> None:
        """Read ``runs.jsonl`` of a folder."""
        self._lines, self._outcomes = _Lines(folder / "runs.jsonl"), {}
        for line in self._lines.read():
            key = RunKey(**{name: line[name] for name in RunKey.__dataclass_fields__ if name in line})
            outcome = line["outcome"]
            self._outcomes[key] = Outcome(
                curve=tuple((step, value) for step, value in outcome["curve"]),
                measures=outcome["measures"],
                trainable_parameters=outcome["trainable_parameters"],
                flops=outcome["flops"],
                diverged=outcome["diverged"],
            )

    def __len__(self) -> int:
        return len(self._outcomes)

    def seeds(self) -> set[int]:
        """Seeds of the starts that there are runs of."""
        return {key.seed for key in self._outcomes}

    def get(self, run: Run) -> Outcome | None:
        """What came of a run, or None."""
        return self._outcomes.get(run_key(run))

    def keep(self, run: Run, outcome: Outcome) -> None:
        """Add an outcome to the file.

        Raises:
            HybridLoraError: the protocol gave no curve.
        """
        outcome = _finite(run, outcome)
        key = run_key(run)
        self._outcomes[key] = outcome
        self._lines.append(
            {
                **key.__dict__,
                "arm": run.arm,
                "outcome": {
                    "curve": [list(point) for point in outcome.curve],
                    "measures": dict(outcome.measures),
                    "trainable_parameters": outcome.trainable_parameters,
                    "flops": outcome.flops,
                    "diverged": outcome.diverged,
                },
            }
        )

    def close(self) -> None:
        """No more is coming."""
        self._lines.close()


def _finite(run: Run, outcome: Outcome) -> Outcome:
    """An outcome whose curve ends where a value is no number, as that of a run that diverged."""
    curve = []
    for step, value in outcome.curve:
        if not math.isfinite(value):
            break
        curve.append((int(step), float(value)))
    if not curve:
        raise HybridLoraError(f"the protocol gave no held-out value of {run.arm} at {run.start} before its first step")
    diverged = bool(outcome.diverged) or len(curve) < len(outcome.curve)
    measures = {
        name: float(value) if value is not None and math.isfinite(value) else None
        for name, value in outcome.measures.items()
    }
    return Outcome(tuple(curve), measures, int(outcome.trainable_parameters), float(outcome.flops), diverged)


class Choices:
    """What each selecting arm tunes fully at each start."""

    def __init__(self, folder: Path) -> None:
        """Read ``choices.jsonl`` of a folder."""
        self._lines, self._chosen = _Lines(folder / "choices.jsonl"), {}
        for line in self._lines.read():
            start = Start(line["base"], line["task"], line["seed"])
            for chosen in line["chosen"]:
                self._chosen[start, chosen["selection"]] = tuple(chosen["full"])

    def get(self, start: Start, selection: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Names of the fully tuned modules, or None where nobody has chosen yet."""
        return self._chosen.get((start, selection_digest(selection)))

    def keep(self, start: Start, chosen: Sequence[tuple[str, Mapping[str, Any], Sequence[str]]]) -> None:
        """Add what arms chose at a start: (name, selection, names of modules) each."""
        line = []
        for name, selection, full in chosen:
            digest = selection_digest(selection)
            self._chosen[start, digest] = tuple(full)
            line.append({"arm": name, "selection": digest, "full": list(full)})
        self._lines.append({"base": start.base, "task": start.task, "seed": start.seed, "chosen": line})

    def close(self) -> None:
        """No more is coming."""
        self._lines.close()


def selection_digest(selection: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the options that choose modules."""
    return sha256_of(dict(selection))[:16]


def choice_of(kind: str, full: Sequence[str], rank: int, frozen: Sequence[str] = ()) -> Choice:
    """What an arm of that kind trains."""
    return Choice(tuple(full), 0 if kind == "full" else rank, kind == "dora", kind == ZEROTH, tuple(frozen))
