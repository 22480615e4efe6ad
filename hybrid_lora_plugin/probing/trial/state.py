"""What is on disk of an unfinished trial, in ``<output_dir>.partial/`` beside the settings of the probe.

probe_0/ …                    the state of each probe that measures for the portfolio
measured_0.safetensors …      what it measured
trial.json                    row losses of each candidate after each round, and where one diverged
candidate_NAME.safetensors    weights and moments of a candidate and, as metadata, its step
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.files import complete_file
from hybrid_lora_plugin.probing.distributed import Ranks


class TrialFolder:
    """A trial's memory on the disk of the first rank (``halving.Memory``)."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        """Of a folder that ``PartialState`` made."""
        self._folder, self._ranks = folder, ranks
        self._held = ranks.from_first(self._read)

    def _read(self) -> dict:
        file = self._folder / "trial.json"
        if not file.exists():
            return {"losses": {}, "diverged": {}}
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            return {"losses": dict(held["losses"]), "diverged": dict(held["diverged"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(file, error) from error

    def _damaged(self, file: Path, error: Exception) -> ProbeError:
        return ProbeError(
            f"output_dir: {file} is damaged ({error}); delete {self._folder} to start afresh, or give another "
            "output_dir",
            see="unfinished-probe-cannot-be-used",
        )

    def losses(self) -> dict[str, list[list[float]]]:
        """As ``Memory.losses``."""
        return self._held["losses"]

    def diverged(self) -> dict[str, int]:
        """As ``Memory.diverged``."""
        return self._held["diverged"]

    def note_losses(self, name: str, sums: list[float], diverged: int = 0) -> None:
        """As ``Memory.note_losses``. The first rank's numbers count: a last bit must not send ranks different ways."""
        sums, diverged = self._ranks.from_first(lambda: (sums, diverged))
        self._held["losses"].setdefault(name, []).append(sums)
        if diverged:
            self._held["diverged"][name] = diverged
        self._ranks.from_first(self._write)

    def _write(self) -> None:
        # A JSON number is read as the very float that was written.
        with _written(self._folder / "trial.json") as unfinished:
            unfinished.write_text(json.dumps(self._held) + "\n", encoding="utf-8")

    def _file(self, name: str) -> Path:
        return self._folder / f"candidate_{quote(name, safe='')}.safetensors"

    def load(self, name: str) -> tuple[int, dict[str, Tensor]] | None:
        """As ``Memory.load``."""
        file = self._file(name)
        tensors: dict[str, Tensor] = {}

        def read() -> int | None:
            if not file.exists():
                return None
            try:
                with safe_open(file, framework="pt") as saved:
                    tensors.update({key: saved.get_tensor(key) for key in saved.keys()})
                    return int(saved.metadata()["step"])
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                raise self._damaged(file, error) from error

        step = self._ranks.from_first(read)
        return None if step is None else (step, tensors)

    def save(self, name: str, step: int, tensors: dict[str, Tensor]) -> None:
        """As ``Memory.save``."""

        def write() -> None:
            with _written(self._file(name)) as unfinished:
                save_file(tensors, unfinished, metadata={"step": str(step)})

        self._ranks.from_first(write)

    def forget(self, name: str) -> None:
        """As ``Memory.forget``."""
        if self._ranks.first:
            self._file(name).unlink(missing_ok=True)

    def measured(self, number: int) -> dict[str, Tensor] | None:
        """What probe ``number`` measured, on every rank; None if it is not done."""
        file = self._folder / f"measured_{number}.safetensors"

        def read() -> dict[str, Tensor] | None:
            try:
                return load_file(file) if file.exists() else None
            except (SafetensorError, OSError) as error:
                raise self._damaged(file, error) from error

        return self._ranks.from_first(read)

    def save_measured(self, number: int, measurements: Mapping[str, Tensor]) -> None:
        """Keep what probe ``number`` measured."""

        def write() -> None:
            with _written(self._folder / f"measured_{number}.safetensors") as unfinished:
                save_file({name: tensor.contiguous().clone() for name, tensor in measurements.items()}, unfinished)

        self._ranks.from_first(write)


@contextmanager
def _written(file: Path) -> Iterator[Path]:
    """``complete_file`` whose full disk is one line."""
    try:
        with complete_file(file) as unfinished:
            yield unfinished
    except (OSError, SafetensorError) as error:
        raise ProbeError(
            f"output_dir: {file} cannot be written ({error}); make room, lower trial.max_state_gb, or give another "
            "output_dir. What was done is kept: the same command continues",
            see="unfinished-probe-cannot-be-used",
        ) from error


class InMemory:
    """A trial's memory of one process that cannot be continued (``halving.Memory``)."""

    def __init__(self) -> None:
        self._losses: dict[str, list[list[float]]] = {}
        self._diverged: dict[str, int] = {}
        self._states: dict[str, tuple[int, dict[str, Tensor]]] = {}

    def losses(self) -> dict[str, list[list[float]]]:
        """As ``Memory.losses``."""
        return self._losses

    def diverged(self) -> dict[str, int]:
        """As ``Memory.diverged``."""
        return self._diverged

    def note_losses(self, name: str, sums: list[float], diverged: int = 0) -> None:
        """As ``Memory.note_losses``."""
        self._losses.setdefault(name, []).append(sums)
        if diverged:
            self._diverged[name] = diverged

    def load(self, name: str) -> tuple[int, dict[str, Tensor]] | None:
        """As ``Memory.load``."""
        return self._states.get(name)

    def save(self, name: str, step: int, tensors: dict[str, Tensor]) -> None:
        """As ``Memory.save``."""
        self._states[name] = (step, {key: tensor.clone() for key, tensor in tensors.items()})

    def forget(self, name: str) -> None:
        """As ``Memory.forget``."""
        self._states.pop(name, None)
