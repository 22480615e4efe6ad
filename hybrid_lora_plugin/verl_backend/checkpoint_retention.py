"""Which checkpoints give way to newer ones: ``max_ckpt_to_keep`` without the loss that verl's own order can bring.

verl (0.9.1 ``utils/checkpoint/checkpoint_manager.py``) deletes the older actor while the new checkpoint is being
written, before the tracker names it: with a limit of 1 a run that is killed there has no checkpoint at all. Here one
goes when the tracker names a newer one, at the engine's next call, and the best of the run stays.
"""

from __future__ import annotations

import atexit
from pathlib import Path

from hybrid_lora_plugin.files import remove_folder
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.training.best_checkpoint import best_step
from hybrid_lora_plugin.verl_backend.checkpoint_writing import Disks, step_folder

#: verl's file beside the checkpoints that names the step of the last one
TRACKER = "latest_checkpointed_iteration.txt"


class Retention:
    """The checkpoints that this process has saved, as verl counts them: those of an earlier start are left alone.

    Args:
        ranks: of the trainer; every rank makes each call.
        keep_best: whether the best checkpoint is exempt.
    """

    def __init__(self, ranks: Ranks, keep_best: bool) -> None:
        self._ranks, self._keep_best = ranks, keep_best
        self._saved: list[Path] = []
        self._limit: int | None = None
        self._due = False
        if ranks.first:
            # A trainer may end with a save.
            atexit.register(self._at_exit)

    def make_room(self, limit: int | None) -> None:
        """Before a save: leave one place less than ``limit``, as verl does, but the newest that is complete."""
        self._limit = limit if isinstance(limit, int) and limit > 0 else None
        self._apply(less=1)

    def add(self, folder: Path) -> None:
        """After a save to ``folder``, the actor's checkpoint."""
        self._saved = [saved for saved in self._saved if saved != folder] + [folder]
        self._due = True

    def settle(self) -> None:
        """Once the tracker names the last save: leave no more than the limit. Does nothing between saves."""
        if self._due:
            self._due = False
            self._apply()

    def _apply(self, less: int = 0) -> None:
        over = self._over(less)
        if not over:
            return
        kept = self._ranks.from_first(lambda: self._exempt(over))
        # On every disk: verl deletes on rank 0's alone.
        for folder in over:
            if folder not in kept and Disks(folder, self._ranks).mine:
                _remove(folder)
        self._saved = [folder for folder in self._saved if folder not in over or folder in kept]

    def _over(self, less: int = 0) -> list[Path]:
        return [] if self._limit is None else self._saved[: -max(1, self._limit - less)]

    def _exempt(self, over: list[Path]) -> list[Path]:
        """Of these, what a start of the same command would resume from, and the best."""
        kept = []
        for folder in over:
            step = step_folder(folder)
            tracker = step.parent / TRACKER
            named = {f"global_step_{tracker.read_text().strip()}"} if tracker.is_file() else set()
            if self._keep_best:
                named.add(f"global_step_{best_step(step.parent)}")
            if step.name in named:
                kept.append(folder)
        return kept

    def _at_exit(self) -> None:
        # No rank waits for another one any more: rank 0's disk alone.
        if self._due:
            over = self._over()
            for folder in set(over) - set(self._exempt(over)):
                _remove(folder)


def _remove(folder: Path) -> None:
    print(f"hybrid_lora: {folder} gives way to newer checkpoints", flush=True)
    remove_folder(folder)
