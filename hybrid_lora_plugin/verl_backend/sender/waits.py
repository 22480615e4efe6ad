"""How long the trainer's ranks wait in a weight sync, from ``sync_timeout`` and ``first_sync_timeout``.

While one rank waits for its rollout engine, the others may stand in a collective that it joins later. NCCL's watchdog
ends their processes when that takes too long, and with them the message that says what was waited for. So the longest
of these waits has to end first; the preflight compares it with ``actor_rollout_ref.nccl_timeout``. In the first sync
trainer and engine also look at every weight that no sync sends. All of the stream has been drawn by then, so nobody
stands in a collective, and that wait has a limit of its own.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """What one sync waits for at most."""

    #: seconds between two buckets
    bucket: float
    #: seconds for the stream to begin, and for the engine to have proven it after its end
    proof: float
    #: the option that ``proof`` comes from
    option: str

    @classmethod
    def of(cls, hybrid, first: bool) -> Limits:
        """From the ``hybrid_lora`` node; ``first``: no sync has been proven yet."""
        bucket, option = float(hybrid["sync_timeout"]), "hybrid_lora.sync_timeout"
        if first and hybrid["first_sync_timeout"] > bucket:
            return cls(bucket, float(hybrid["first_sync_timeout"]), "hybrid_lora.first_sync_timeout")
        return cls(bucket, bucket, option)


#: seconds that workers have to tell what they saw of a sync that has failed
GRACE = 10.0


def for_workers(limit: float) -> float:
    """Seconds to wait for what the engine's workers return, once the stream has gone out."""
    return limit + 30


def for_other_ranks(limit: float) -> float:
    """Seconds to wait for the other ranks' word: longer than any of them waits ``limit`` for its own engine."""
    return 1.5 * limit + 40


def for_last_checks(limit: float, fixed_prompt: bool) -> float:
    """Seconds to wait for the server's last checks; with a fixed prompt it waits ``limit`` for that alone."""
    return 2 * limit if fixed_prompt else limit


def longest(limit: float, fixed_prompt: bool) -> float:
    """The longest wait of a rank after the first sync, in seconds, for ``sync_timeout=limit``."""
    return max(limit, for_workers(limit), for_other_ranks(limit), for_last_checks(limit, fixed_prompt))


def largest_limit(watchdog: float, fixed_prompt: bool) -> int:
    """The largest whole ``sync_timeout`` whose waits all end before ``watchdog`` seconds; 0 where there is none."""
    fitting = (limit for limit in range(int(watchdog), 0, -1) if longest(limit, fixed_prompt) < watchdog)
    return next(fitting, 0)
