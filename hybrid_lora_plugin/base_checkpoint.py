"""A folder with the checkpoint to start from, as far as its files tell whether it can be trained and served; nothing is
loaded.
"""

from __future__ import annotations

import json
from pathlib import Path

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.model_families import refuse_quantised

_INDEX = "model.safetensors.index.json"
#: what Git LFS leaves in the place of a file whose content was not fetched
_POINTER = b"version https://git-lfs"


def check_model_folder(folder: str | Path, *, safetensors: bool) -> None:
    """Refuse a checkpoint that is quantised, has an adapter beside it, or lacks its weights.

    Args:
        folder: of the checkpoint.
        safetensors: whether its weights must be in safetensors, as the rollout engine reads no others.

    Raises:
        ConfigurationError: naming the file that says so, or the one that is missing.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"model: {folder} holds an adapter (adapter_config.json), which transformers would load and the rollout "
            f"engine would leave out; merge it into the weights with PEFT's merge_and_unload and save_pretrained, or "
            f"move it to another folder",
            see="checkpoint-with-an-adapter",
        )
    _refuse_quantised(folder)
    _require_weights(folder, safetensors)


def _refuse_quantised(folder: Path) -> None:
    described = [(folder / "config.json", ("quantization_config", "compression_config"))]
    # ModelOpt writes a file of its own, which vLLM reads.
    described.append((folder / "hf_quant_config.json", ("quantization",)))
    for file, fields in described:
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # what is missing or no JSON is said by those who read all of it
        for field in fields:
            value = config.get(field) if isinstance(config, dict) else None
            if value:
                method = value.get("quant_method") or value.get("quant_algo") if isinstance(value, dict) else None
                refuse_quantised(str(folder), f"{field} in {file.name}: {method or value}")


def _require_weights(folder: Path, safetensors: bool) -> None:
    index = folder / _INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            _refuse(f"{index} is no index of weights", "copy the checkpoint again")
        for shard in shards:
            if not (folder / shard).is_file():
                _refuse(f"{index} names {shard}, which is not there", "copy the checkpoint again, with all its shards")
        files = [folder / shard for shard in shards]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                _refuse(f"{file} is a Git LFS pointer without the weights", "fetch them with git lfs pull")
    if files:
        return
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    others = [name for name in others if not name.startswith("training_args")]
    if not others:
        _refuse(f"{folder} has no weights", "give a folder with model.safetensors")
    if safetensors:
        _refuse(
            f"{folder} has its weights in {others[0]} and none in safetensors",
            "save it again with transformers' save_pretrained, or, with hybrid_lora.sync=merge, give "
            "actor_rollout_ref.rollout.load_format=auto",
        )


def _refuse(what: str, way_out: str) -> None:
    raise ConfigurationError(f"model: {what}; {way_out}", see="checkpoint-without-weights")
