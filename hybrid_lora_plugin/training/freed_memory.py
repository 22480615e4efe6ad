"""Memory that is freed goes back to the machine, where one weight after the other is read, worked on and dropped."""

from __future__ import annotations

import ctypes

#: M_MMAP_THRESHOLD in glibc's malloc.h
_MMAP_THRESHOLD = -3
#: bytes
LEAST = 1 << 20


def give_back_freed_memory() -> bool:
    """Let glibc take each allocation of ``LEAST`` bytes or more from the machine, and give it back when it is freed.

    By itself it raises that size to that of the largest block freed so far, 32 MiB at most, and cuts weights from a
    heap, where small blocks that live on keep the room of freed ones: an export then holds more with every layer.
    It holds for the whole process, so it is for commands and not for a library.

    Returns:
        Whether it does; False with another C library.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LEAST))
    except (AttributeError, OSError):
        return False
