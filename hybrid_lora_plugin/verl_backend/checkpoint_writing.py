"""A checkpoint appears under its name when all of it is written, on every disk that the ranks have.

verl (0.9.1 ``utils/checkpoint/fsdp_checkpoint_manager.py``) writes into the folder itself, and its tracker, which names
the checkpoint to resume, comes last. A run that is killed in between leaves a folder that looks like a checkpoint;
where it was saving over an older one, the tracker names the mixture. Here the ranks write beside the place and the
folder gets its name by a rename.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.files import bring_back, put_in_place
from hybrid_lora_plugin.probing.distributed import Ranks

#: how the name of a folder ends that is being removed (``files.remove_folder``)
_REMOVING = ".removing"
#: what torch says of a file that it could not write: no type of error tells it from others
_OF_A_FILE = (
    "PytorchStreamWriter",
    "inline_container",
    "iostream error",
    "No space left",
    "Disk quota",
    "Read-only file system",
)


@contextmanager
def written_whole(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """A folder for all ranks to write into, which takes the name ``folder`` when the body has ended without an error.

    What processes that were killed have left beside it is removed first.

    Args:
        folder: where the checkpoint goes; an older one of that name stays until the new one is complete.
        ranks: of the trainer; every rank must enter.

    Raises:
        ConfigurationError: it cannot be written. What was there before is untouched, and nothing unfinished is left by
            ranks that fail together.
    """
    token = ranks.from_first(lambda: secrets.token_hex(4))
    disks = Disks(folder, ranks)
    unfinished = folder.parent / f".{folder.name}.{token}.writing"

    def begin() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in _left_behind(folder):
            if stale != unfinished:
                shutil.rmtree(stale, ignore_errors=True)
        bring_back(folder)
        unfinished.mkdir(exist_ok=True)

    def finish() -> None:
        if not unfinished.is_dir():
            return  # the same disk under another machine's eyes, where it has been done
        for kept in folder.glob("data*.pt"):
            # The trainer's place in the rows, which it writes itself a moment later.
            if not (unfinished / kept.name).exists():
                shutil.copyfile(kept, unfinished / kept.name)
        try:
            put_in_place(unfinished, folder)
        except FileNotFoundError:
            if not folder.is_dir():
                raise

    disks.in_turn(lambda: _explained(folder, begin))
    try:
        with unwritable_explained(folder):
            yield unfinished
        disks.in_turn(lambda: _explained(folder, finish))
    except BaseException:
        if disks.mine:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def step_folder(actor: Path) -> Path:
    """The ``global_step_N`` folder of an actor's checkpoint: itself, or the one it is in."""
    return next((path for path in (actor, *actor.parents) if path.name.startswith("global_step_")), actor)


def tidy(folder: Path) -> None:
    """Before a checkpoint is read: bring it back if it was put aside, and finish removals that a kill cut short.

    What is half written stays until the next save: the folder may be another run's that is alive.
    """
    bring_back(folder)
    for stale in _left_behind(folder, (_REMOVING,)):
        shutil.rmtree(stale, ignore_errors=True)


def _left_behind(folder: Path, ends: tuple[str, ...] = (".*.writing", _REMOVING)) -> list[Path]:
    """What killed processes have left of this and other steps: folders half written, and half removed."""
    step = step_folder(folder)
    if not step.name.startswith("global_step_"):
        place, name = folder.parent, f".{folder.name}"
    elif step == folder:
        place, name = step.parent, ".global_step_*"
    else:
        place, name = step.parent, f"global_step_*/.{folder.name}"
    return [path for end in ends for path in place.glob(name + end)]


class Disks:
    """The disks on which ranks see one path, each with a rank that looks after it.

    Ranks of one machine that mean the same absolute path share a disk. Machines may share one, too, which no rank can
    tell: what is done for one must find that it has been done.

    Args:
        folder: the path, as each rank has it.
        ranks: of the trainer; every rank must make one.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._ranks = ranks
        place = socket.gethostname(), os.path.abspath(folder)
        places = [place] * ranks.size
        if ranks.size > 1:
            torch.distributed.all_gather_object(places, place)
        self._several = len(set(places)) > 1
        #: whether this rank looks after its disk
        self.mine = places.index(place) == ranks.rank

    def in_turn(self, work: Callable[[], None]) -> None:
        """Do it once on each disk, on rank 0's first; no rank goes on before all have.

        Raises:
            ConfigurationError, RuntimeError: on every rank.
        """
        self._ranks.on_each(lambda: work() if self._ranks.first else None)
        if self._several:
            self._ranks.on_each(lambda: work() if self.mine and not self._ranks.first else None)


@contextmanager
def unwritable_explained(folder: Path) -> Iterator[None]:
    """Turn an error of writing inside into one line that says what is left; others pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error
    except RuntimeError as error:
        if any(word in str(error) for word in _OF_A_FILE):
            raise _unwritable(folder, error) from error
        raise


def _explained(folder: Path, work: Callable[[], None]) -> None:
    with unwritable_explained(folder):
        work()


def _unwritable(folder: Path, error: Exception) -> ConfigurationError:
    reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigurationError(
        f"checkpoint: {str(folder)!r} cannot be written on {socket.gethostname()} ({reason[:200]}; {_free(folder)}); "
        f"what was saved before is untouched: make room, or move the checkpoints and give trainer.default_local_dir, "
        f"and the same command goes on from the last one",
        see="checkpoint-cannot-be-written",
    )


def _free(folder: Path) -> str:
    for place in (folder, *folder.parents):
        try:
            return f"{shutil.disk_usage(place).free / 1e9:.1f} GB free"
        except OSError:
            continue
    return "free space unknown"
