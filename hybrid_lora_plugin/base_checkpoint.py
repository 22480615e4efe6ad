"""A folder with the checkpoint to start from, as far as its files tell whether it can be trained and served; nothing is
loaded.
"""

from __future__ import annotations

import json
from pathlib import Path

from hybrid_lora_plugin.checkpoint_tensors import refuse, refuse_pointer, stored_tensors
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.model_families import refuse_quantised

ADAPTER = "adapter_config.json"


def check_model_folder(folder: str | Path, *, safetensors: bool, weights: bool = True) -> None:
    """Refuse a checkpoint that is quantised, has an adapter beside it, or lacks its config or its weights.

    Of the weights the headers are read.

    Args:
        folder: of the checkpoint.
        safetensors: whether its weights must be in safetensors, as the rollout engine reads no others.
        weights: whether there must be any; who looks at the config alone needs none.

    Raises:
        ConfigurationError: naming the file that says so, or the one that is missing.
    """
    folder = Path(folder)
    if (folder / ADAPTER).is_file():
        refuse_adapter(str(folder))
    for file in sorted(folder.glob("*.json")):
        if file.is_file():
            refuse_pointer(file)
    if not (folder / "config.json").is_file():
        refuse(f"{folder} has no config.json", "give the folder that save_pretrained or a download has made")
    _refuse_quantised(folder)
    if weights:
        _require_weights(folder, safetensors)


def refuse_adapter(name: str) -> None:
    """Raise the error for a model that has an adapter beside its weights.

    Args:
        name: of the model, for the message.
    """
    raise ConfigurationError(
        f"model: {name} holds an adapter ({ADAPTER}), which transformers would load and the rollout engine would leave "
        f"out; merge it into the weights with PEFT's merge_and_unload and save_pretrained, or move it elsewhere",
        see="checkpoint-with-an-adapter",
    )


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
    if stored_tensors(folder):
        return
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    others = [name for name in others if not name.startswith("training_args")]
    for name in others:
        if not (folder / name).is_file():
            refuse(f"{folder / name} is a link to a file that is not there", "copy the checkpoint with its files")
        refuse_pointer(folder / name)
    if not others:
        named = [file.name for file in sorted(folder.glob("*.safetensors"))]
        refuse(
            f"{folder} has no weights" + (f" under a name that is read ({named[0]})" if named else ""),
            "give a folder with model.safetensors, or with model.safetensors.index.json and the files it names",
        )
    if safetensors:
        refuse(
            f"{folder} has its weights in {others[0]} and none in safetensors",
            "save it again with transformers' save_pretrained, or, with hybrid_lora.sync=merge, give "
            "actor_rollout_ref.rollout.load_format=auto",
        )
