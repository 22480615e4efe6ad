"""After every sync in mode ``sparse_merge``, what the rollout engine then holds is written down.

verl imports this in each process of a run, vLLM's own included, where ``VERL_USE_EXTERNAL_MODULES`` names it. Another
variable says where to write; without it, importing this changes nothing. For a worker that holds whole weights.
"""

import os
from pathlib import Path

#: environment variable with a folder
FOLDER = "HELD_WEIGHTS"
FILE = "held.safetensors"


def _write(rollout, header) -> None:
    from safetensors.torch import save_file

    held = {name: rollout.live(name).view.clone().contiguous() for name in rollout.checkpoint_names()}
    target = Path(os.environ[FOLDER]) / FILE
    unfinished = target.with_suffix(".unfinished")
    save_file(held, unfinished, metadata={"number": str(header.number), "builds_on": str(header.base_number)})
    os.replace(unfinished, target)


if FOLDER in os.environ:
    # Imports no verl, which is just being imported.
    from hybrid_lora_plugin.sync.sparse_merge import SparseMergeReceiver

    _conclude = SparseMergeReceiver.conclude

    def _conclude_and_write(self, account):
        report = _conclude(self, account)
        _write(self.rollout, self.header)
        return report

    SparseMergeReceiver.conclude = _conclude_and_write
