"""A Hugging Face folder whose weights come one at a time, so that nobody has to hold a second whole model.

It is what ``save_pretrained(folder, max_shard_size=LARGEST_FILE)`` writes of a model with those weights, byte for byte.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

#: most weights in one file, and so about as much as a writer holds
LARGEST_FILE = "5GB"


def file_order(names: Iterable[str]) -> list[str]:
    """Names of weights in the order in which ``save_pretrained`` fills its files: alphabetical by module, with numbers
    of layers by size."""
    return sorted(names, key=lambda name: [(not p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")])


class ModelFolder:
    """A folder that is being written; ``finish`` it after the last weight.

    Args:
        folder: exists; nothing else in it is touched.
        model: a plain Hugging Face model of the weights' type, on the meta device; it gives everything but weights.
        names: of all weights that will come; in ``file_order``, no more than a file of them is held.
        largest_file: as ``save_pretrained``'s ``max_shard_size``.

    Raises:
        RuntimeError: they are not the model's.
    """

    def __init__(self, folder: Path, model, names: Iterable[str], largest_file: int | str = LARGEST_FILE) -> None:
        self._folder, self._parameters = folder, model.num_parameters()
        state = model.state_dict()
        weights = {name: state[name] for name in file_order(names)}
        # A tied weight once.
        if missing := dict(model.named_parameters()).keys() - weights.keys():
            raise RuntimeError(f"{min(missing)}: in the base model, and not among the weights to write")
        # Configuration, that of generation, and a model's own code.
        model.save_pretrained(folder, state_dict={})
        self._split = split_torch_state_dict_into_shards(weights, max_shard_size=largest_file)
        self._held: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        self._written = 0

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Take a weight on the CPU, and write each file once all of its weights are there."""
        file = self._split.tensor_to_filename[name]
        held = self._held[file]
        held[name] = weight.contiguous()
        if len(held) == len(self._split.filename_to_tensors[file]):
            save_file(self._held.pop(file), self._folder / file, metadata={"format": "pt"})
            self._written += 1

    def finish(self) -> None:
        """Write the index, where there is more than one file.

        Raises:
            RuntimeError: a weight did not come.
        """
        if self._written < len(self._split.filename_to_tensors):
            raise RuntimeError(f"{self._folder}: not all weights of the model came")
        if self._split.is_sharded:
            metadata = {"total_parameters": self._parameters, **self._split.metadata}
            index = {"metadata": metadata, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
