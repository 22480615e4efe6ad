"""Imported by a run's workers as ``external_lib``: every sync of the run has another mode than the one before.

Which modes the environment says; without it, importing this changes nothing. The engine must have started as all of
them need it: from its checkpoint, and without adapters of its own.
"""

import os

#: environment variable with names of modes, and a comma between them
MODES = "SYNC_MODES_IN_TURNS"

if MODES in os.environ:
    from hybrid_lora_plugin.verl_backend.engine import HybridLoraEngine

    _get_per_tensor_param = HybridLoraEngine.get_per_tensor_param
    _modes = os.environ[MODES].split(",")
    _syncs: list[str] = []

    def _in_turns(self, *args, **kwargs):
        self.hybrid.sync = _modes[len(_syncs) % len(_modes)]
        _syncs.append(self.hybrid.sync)
        return _get_per_tensor_param(self, *args, **kwargs)

    HybridLoraEngine.get_per_tensor_param = _in_turns
