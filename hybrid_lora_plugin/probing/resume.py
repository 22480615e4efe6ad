"""The state of an unfinished probe on disk: ``<output_dir>.partial/``, removed when the artifact is written.

    settings.json          what the run depends on; another run must not continue it
    held_out.json          the held-out loss before and after the warm-up, as far as it was measured
    warmup.safetensors     adapters, AdamW moments and, as metadata, the step
    warmup_checks.json     steps and choices of a warm-up that finds its own length
    scores.safetensors     measurements [t, M] of the batches scored so far and, as metadata, how many

Of several seeds each has a folder of its own in it, ``seed_i``.

Each file is written beside its place and renamed, so an interruption at any moment leaves the older one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybrid_lora_plugin.allocation.storage import ALLOCATION_FILE
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.files import complete_file


class PartialState:
    """The folder of one unfinished probe.

    Attributes:
        folder: ``<output_dir>.partial``.
        resumed: whether there was something to continue.
    """

    def __init__(self, output_dir: Path, settings: dict[str, Any], part: str = "") -> None:
        """Create the folder, or take up one that was made with the same settings.

        Args:
            output_dir: where the artifact will be.
            settings: JSON values; equal settings give equal artifacts.
            part: of a probe that has several, the folder inside.

        Raises:
            ProbeError: the folder is of other settings or cannot be read or written; the message names the first
                difference.
        """
        self.folder = partial_folder(output_dir) / part
        self._way_out = f"delete {self.folder} to start afresh, or give another output_dir"
        file = self.folder / "settings.json"
        self.resumed = file.exists()
        try:
            if self.resumed:
                self._compare(json.loads(file.read_text(encoding="utf-8")), settings)
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with complete_file(file) as unfinished:
                unfinished.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ProbeError(
                f"output_dir: {self.folder} cannot be written ({error}); give another output_dir",
                see="unfinished-probe-cannot-be-used",
            ) from error
        except ValueError as error:
            if isinstance(error, ProbeError):
                raise
            raise ProbeError(
                f"output_dir: {file} is damaged ({error}); {self._way_out}", see="unfinished-probe-cannot-be-used"
            ) from error

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        # Through JSON, so that a tuple equals the list it was saved as.
        now = json.loads(json.dumps(now))
        for key in [*now, *(before.keys() - now.keys())]:
            if before.get(key) != now.get(key):
                old, new = (f"{value!r:.80}" for value in (before.get(key), now.get(key)))
                raise ProbeError(
                    f"{key}: {self.folder} was begun with {old}, this run has {new}; {self._way_out}",
                    see="unfinished-probe-of-other-settings",
                )

    def save_warmup(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Replace the saved warm-up by this one."""
        file = self.folder / "warmup.safetensors"
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with complete_file(file) as unfinished:
            save_file(tensors, unfinished, metadata={"step": str(step)})

    def load_warmup(self) -> tuple[int, dict[str, Tensor]] | None:
        """The saved step and tensors, or None if nothing was saved yet."""
        file = self.folder / "warmup.safetensors"
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as saved:
                return int(saved.metadata()["step"]), {name: saved.get_tensor(name) for name in saved.keys()}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ProbeError(
                f"output_dir: {file} is damaged ({error}); {self._way_out}", see="unfinished-probe-cannot-be-used"
            ) from error

    def save_held_out(self, losses: dict[str, float]) -> None:
        """Replace the saved held-out losses by these."""
        self._save_json("held_out.json", losses)

    def load_held_out(self) -> dict[str, float]:
        """The saved held-out losses; none if there are none yet."""
        return self._load_json(
            "held_out.json", {}, lambda saved: {str(when): float(loss) for when, loss in saved.items()}
        )

    def save_warmup_checks(self, checks: list[tuple[int, list[int]]]) -> None:
        """Replace the saved checks of the warm-up: step and numbers of the modules chosen then."""
        self._save_json("warmup_checks.json", checks)

    def load_warmup_checks(self) -> list[tuple[int, list[int]]]:
        """The saved checks of the warm-up; none if there are none yet."""
        return self._load_json(
            "warmup_checks.json",
            [],
            lambda saved: [(int(step), [int(index) for index in chosen]) for step, chosen in saved],
        )

    def _save_json(self, name: str, payload: Any) -> None:
        # A JSON number is read as the very float that was written.
        with complete_file(self.folder / name) as unfinished:
            unfinished.write_text(json.dumps(payload) + "\n", encoding="utf-8")

    def _load_json(self, name: str, absent: Any, read: Callable[[Any], Any]) -> Any:
        file = self.folder / name
        if not file.exists():
            return absent
        try:
            return read(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ProbeError(
                f"output_dir: {file} is damaged ({error}); {self._way_out}", see="unfinished-probe-cannot-be-used"
            ) from error

    def save_scores(self, done: int, rows: dict[str, list[Tensor]]) -> None:
        """Replace the saved measurements by these: after ``done`` rows, each name has a list of ``[M]``."""
        if done:
            stacked = {name: torch.stack(values) for name, values in rows.items()}
            file = self.folder / "scores.safetensors"
            with complete_file(file) as unfinished:
                save_file(stacked, unfinished, metadata={"rows": str(done)})

    def load_scores(self) -> tuple[int, dict[str, list[Tensor]]]:
        """How many rows are done, and the measurements."""
        file = self.folder / "scores.safetensors"
        if not file.exists():
            return 0, {}
        try:
            with safe_open(file, framework="pt") as saved:
                rows = {name: list(saved.get_tensor(name)) for name in saved.keys()}
                return int(saved.metadata()["rows"]), rows
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ProbeError(
                f"output_dir: {file} is damaged ({error}); {self._way_out}", see="unfinished-probe-cannot-be-used"
            ) from error


def remove_finished(output_dir: str | Path) -> None:
    """Remove the state of a probe that was killed when its artifact was there already, and so is over."""
    # A name that no disk takes is refused by whoever writes there.
    if os.path.exists(Path(output_dir) / ALLOCATION_FILE):
        shutil.rmtree(partial_folder(output_dir), ignore_errors=True)


def partial_folder(output_dir: str | Path) -> Path:
    """Where the unfinished state of a probe with this output folder is."""
    output_dir = Path(output_dir)
    return output_dir.parent / f"{output_dir.name}.partial"
