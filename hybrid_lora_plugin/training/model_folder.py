"""A Hugging Face folder whose weights come one at a time, so that nobody has to hold a second model, or one file of it.

It is what ``save_pretrained(folder, max_shard_size=LARGEST_FILE)`` writes of a model with those weights, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from hybrid_lora_plugin.training.tensor_file import TensorFile, entry_of

#: most weights in one file
LARGEST_FILE = "5GB"
CONFIG, GENERATION = "config.json", "generation_config.json"


def file_order(names: Iterable[str]) -> list[str]:
    """Names of weights in the order in which ``save_pretrained`` fills its files: alphabetical by module, with numbers
    of layers by size."""
    return sorted(names, key=lambda name: [(not p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")])


class ModelFolder:
    """A folder that is being written; ``finish`` it after the last weight.

    What is not weights is written at once, so that what cannot be written is known before anything is merged. A file of
    weights has its name once it is complete.

    Args:
        folder: exists; nothing else in it is touched.
        model: a plain Hugging Face model of the weights' type, on the meta device; it gives everything but weights.
        names: of all weights that will come; in ``file_order``, one file after the other is written.
        largest_file: as ``save_pretrained``'s ``max_shard_size``.

    Attributes:
        refused: what transformers had to say against a configuration that it read, and which was written all the same;
            None where nothing.

    Raises:
        RuntimeError: they are not the model's.
    """

    def __init__(self, folder: Path, model, names: Iterable[str], largest_file: int | str = LARGEST_FILE) -> None:
        self._folder = folder
        state = model.state_dict()
        weights = {name: state[name] for name in file_order(names)}
        # A tied weight once.
        if missing := dict(model.named_parameters()).keys() - weights.keys():
            raise RuntimeError(f"{min(missing)}: in the base model, and not among the weights to write")
        trained = dict(model.named_parameters(remove_duplicate=False)).keys()
        self._parameters = sum(weight.numel() for name, weight in weights.items() if name in trained)
        self.refused = _save_configuration(folder, model)
        self._split = split_torch_state_dict_into_shards(weights, max_shard_size=largest_file)
        self._entries = {name: entry_of(weight) for name, weight in weights.items()}
        self._open: dict[str, TensorFile] = {}
        self._written = 0

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Write a weight on the CPU."""
        file = self._split.tensor_to_filename[name]
        if file not in self._open:
            entries = {one: self._entries[one] for one in self._split.filename_to_tensors[file]}
            self._open[file] = TensorFile(self._folder / file, entries)
        self._open[file].add(name, weight)
        if self._open[file].is_complete:
            del self._open[file]
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


def _save_configuration(folder: Path, model) -> str | None:
    """Write configuration, that of generation, and a model's own code; returns what transformers had against it.

    transformers reads more than it writes, e.g. a ``temperature`` without ``do_sample``. What it has read is written as
    it would write it, without its look at the values.
    """
    try:
        model.save_pretrained(folder, state_dict={})
    except OSError:
        raise
    except Exception as error:
        model.config.to_json_file(folder / CONFIG, use_diff=True)
        if model.can_generate():
            model.generation_config.to_json_file(folder / GENERATION, use_diff=True, keys_to_pop=["compile_config"])
        return " ".join(str(error).split())
    return None
