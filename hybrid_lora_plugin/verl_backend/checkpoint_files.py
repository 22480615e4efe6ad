"""Where a checkpoint's files have to be: looked at before training and before anything is loaded.

verl (0.9.1 ``utils/checkpoint/fsdp_checkpoint_manager.py``) lets every rank write its own shard to its own view of one
path and read it from there. A rank that cannot raises alone, and the others wait for it until their process group gives
up. Disks that only one node sees do work: each rank finds what it wrote, as long as it starts there again.
"""

from __future__ import annotations

import os
import socket
import tempfile
import zipfile
from pathlib import Path

from hybrid_lora_plugin.errors import ConfigurationError


def require_writable(folder: str) -> None:
    """Refuse a folder for checkpoints in which this rank can write nothing.

    Args:
        folder: ``trainer.default_local_dir``; it is made where it is missing, as verl would.

    Raises:
        ConfigurationError: naming the folder and this machine.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"trainer.default_local_dir: {folder!r} cannot be written on {socket.gethostname()} "
            f"({error.strerror}), and every rank saves its own shard there; give a folder that every node can write",
            see="checkpoint-place-not-usable",
        ) from error


def require_shards(folder: str, kinds: list[str], rank: int, ranks: int) -> None:
    """Refuse a checkpoint that lacks this rank's part.

    Args:
        folder: the actor's checkpoint folder.
        kinds: of verl's files, out of ``model``, ``optim``, ``extra_state``.
        rank, ranks: of the trainer.

    Raises:
        ConfigurationError: naming the first file that is missing or cut, and this machine.
    """
    for kind in kinds:
        file = Path(folder) / f"{kind}_world_size_{ranks}_rank_{rank}.pt"
        if not file.is_file():
            raise ConfigurationError(
                f"checkpoint: {str(file)!r} is not there on {socket.gethostname()}, and rank {rank} of {ranks} resumes "
                f"from it; start on the nodes and with the number of ranks that saved the checkpoint, or copy its "
                f"files to every node",
                see="checkpoint-place-not-usable",
            )
        if not is_archive(file):
            raise ConfigurationError(
                f"checkpoint: {str(file)!r} cannot be read on {socket.gethostname()} (it is cut, {file.stat().st_size} "
                f"bytes are left); copy it again, or resume from another step",
                see="checkpoint-cannot-be-read",
            )


def is_archive(file: Path) -> bool:
    """Whether a file of ``torch.save`` has its end, where its index stands; nothing of it is unpickled."""
    return zipfile.is_zipfile(file)
