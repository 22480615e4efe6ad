"""Export a checkpoint of the check and look at the result; a process of its own, which can be ended at its limit.

python -m recipes.gpu_check.export CHECKPOINT FOLDER VALIDATION GENERATIONS RESULT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hybrid_lora_plugin.training.export import export_checkpoint
from recipes.gpu_check.evidence import compare_export


def main(arguments: list[str]) -> int:
    checkpoint, folder, validation, generations, result = map(Path, arguments)
    exported = export_checkpoint(checkpoint, folder)
    same, number = compare_export(folder, validation, generations)
    dtype = str(exported.kept.dtype).removeprefix("torch.")
    figures = {"kept": exported.kept.share, "dtype": dtype, "same": same, "prompts": number}
    result.write_text(json.dumps(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
