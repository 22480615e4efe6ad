"""The model that a run started from: everything but its weights at once, and those one at a time."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError

from hybrid_lora_plugin.candidates import meta_model
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.training.model_folder import file_order
from hybrid_lora_plugin.training.tensor_file import TensorEntry, entry_of, read_tensor, shapes_in

#: what transformers raises where it cannot load something
UNLOADABLE = (OSError, ValueError, KeyError, ImportError)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def weightless_model(
    base: str | os.PathLike, held: str | None, dtype: torch.dtype | None = None, trust_remote_code: bool = False
):
    """The base model as an ``AutoModelForCausalLM`` on the meta device: configuration and structure, no weights.

    Args:
        base: Hugging Face folder or name.
        held: type in which the run holds it; None is the checkpoint's own.
        dtype: that its parameters and its configuration then get; None leaves them.
        trust_remote_code: as in transformers.
    """
    from transformers import AutoModelForCausalLM

    # In the type that the run held it in: a checkpoint's config may name another than its tensors have.
    options = {"dtype": held or "auto", "trust_remote_code": trust_remote_code}
    try:
        model = AutoModelForCausalLM.from_pretrained(base, device_map="meta", **options)
    except NotImplementedError:
        # transformers compares tied weights that a checkpoint holds twice, and cannot without their values.
        model = _from_config(base, **options)
    if dtype is not None:
        model = model.to(dtype)
        model.config.dtype = dtype
    return model


def _from_config(base: str | os.PathLike, dtype: str, trust_remote_code: bool):
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    named = getattr(torch, dtype) if dtype != "auto" else config.dtype
    model = meta_model(config, trust_remote_code).to(named or torch.float32)
    try:
        model.generation_config = GenerationConfig.from_pretrained(base)
    except OSError:
        pass  # it has none, and the model's own follows from its config
    return model


def cannot_be_loaded(base: str, error: Exception) -> ConfigurationError:
    """The error for a base model that cannot be loaded because of another one."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigurationError(f"base: {base!r} cannot be loaded ({reason}); give base=PATH")


class BaseModel:
    """The base model for an export.

    Where the weights lie in safetensors files under the names of the model, each is read when it is asked for and held
    by nobody else. Any other checkpoint is loaded whole by transformers.

    Args:
        base: Hugging Face folder or name.
        held: type in which the run held it; None is the checkpoint's own.
        trust_remote_code: as in transformers.

    Attributes:
        structure: the model on the meta device, in the type that the run held it in.
        entries: type and shape of each weight, a tied one once, in the order of the files of a ``ModelFolder``.
        is_streamed: whether weights are read one at a time.

    Raises:
        ConfigurationError: it cannot be loaded.
    """

    def __init__(self, base: str | os.PathLike, held: str | None, trust_remote_code: bool = False) -> None:
        self.name, self._trust = str(base), trust_remote_code
        try:
            self.structure = weightless_model(base, held, trust_remote_code=trust_remote_code)
        except UNLOADABLE as error:
            raise cannot_be_loaded(self.name, error) from error
        state, once = self.structure.state_dict(), dict(self.structure.named_parameters())
        tied = dict(self.structure.named_parameters(remove_duplicate=False)).keys() - once.keys()
        self.entries: dict[str, TensorEntry] = {
            name: entry_of(state[name]) for name in file_order(state) if name not in tied
        }
        self._file_of = self._files(set(tied))
        self.is_streamed = bool(self._file_of)
        self._whole: dict[str, torch.Tensor] = {}
        if not self.is_streamed:
            self._load_whole(held)

    @property
    def location(self) -> str:
        """Its name on a hub, or its folder wherever one stands."""
        return os.path.abspath(self.name) if os.path.isdir(self.name) else self.name

    def read(self, name: str) -> torch.Tensor:
        """A weight on the CPU, in the type that the run held it in; it may be a view of a file and is not changed.

        Raises:
            ConfigurationError: it cannot be read.
        """
        if not self.is_streamed:
            return self._whole[name]
        try:
            tensor = read_tensor(self._file_of[name], name)
        except (OSError, SafetensorError) as error:
            raise cannot_be_loaded(self.name, error) from error
        return tensor.to(self.entries[name].dtype) if tensor.is_floating_point() else tensor

    def _files(self, tied: set[str]) -> dict[str, Path]:
        """File of each weight, where each is in one under its own name and shape; else nothing."""
        try:
            folder = _local_folder(self.name)
            if (folder / _SINGLE).is_file():
                files = [folder / _SINGLE]
            elif (folder / _INDEX).is_file():
                files = sorted(folder.glob("*.safetensors"))
            else:
                return {}
            shapes, file_of = {}, {}
            for file in files:
                shapes |= (found := shapes_in(file))
                file_of |= dict.fromkeys(found, file)
        except (OSError, SafetensorError):
            return {}  # transformers says what is wrong with it
        if tied & shapes.keys() or any(shapes.get(name) != entry.shape for name, entry in self.entries.items()):
            return {}
        return file_of

    def _load_whole(self, held: str | None) -> None:
        from transformers import AutoModelForCausalLM

        options = {"dtype": held or "auto", "trust_remote_code": self._trust}
        try:
            model = AutoModelForCausalLM.from_pretrained(self.name, **options)
        except UNLOADABLE as error:
            raise cannot_be_loaded(self.name, error) from error
        state, once = model.state_dict(), dict(model.named_parameters())
        # Weights that the config ties and the checkpoint does not are two here.
        tied = dict(model.named_parameters(remove_duplicate=False)).keys() - once.keys()
        self._whole = {name: state[name] for name in file_order(state) if name not in tied}
        self.entries = {name: entry_of(tensor) for name, tensor in self._whole.items()}


def _local_folder(base: str) -> Path:
    """Folder of a model's files on this machine; OSError where there is none."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base, local_files_only=True))
