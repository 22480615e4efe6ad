"""Add the adapter that verl's model merger leaves in ``lora_adapter`` to the base model beside it.

From the command line: ``python -m recipes.merge_lora FOLDER``, with the folder that the merger has written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def merge_lora(folder: str | Path) -> bool:
    """Merge in float32 and save in the model's own type.

    Args:
        folder: of a model, with its adapter in ``lora_adapter``.

    Returns:
        False where there is no adapter, e.g. because it was merged before.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    adapter = folder / "lora_adapter"
    if not adapter.is_dir():
        return False
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    dtype = model.dtype
    merged = PeftModel.from_pretrained(model.float(), adapter).merge_and_unload()
    merged.to(dtype).save_pretrained(folder)
    adapter.rename(folder / "merged_lora_adapter")
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.merge_lora", description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    folder = parser.parse_args(arguments).folder
    print(f"merged: {folder}" if merge_lora(folder) else f"no adapter to merge in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
