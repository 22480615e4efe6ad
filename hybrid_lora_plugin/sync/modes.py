"""The sync modes by name; a new one is a file beside these four and an entry here."""

from __future__ import annotations

from hybrid_lora_plugin.sync.adapter import AdapterSync
from hybrid_lora_plugin.sync.merge import MergeSync
from hybrid_lora_plugin.sync.mode_base import SyncMode
from hybrid_lora_plugin.sync.receiver_merge import ReceiverMergeSync
from hybrid_lora_plugin.sync.sparse_merge import SparseMergeSync

SYNC_MODES: dict[str, SyncMode] = {
    mode.name: mode for mode in (MergeSync(), SparseMergeSync(), AdapterSync(), ReceiverMergeSync())
}


def sync_mode(name: str) -> SyncMode:
    """The mode of that name; KeyError where there is none, which ``config`` has refused before."""
    return SYNC_MODES[name]
