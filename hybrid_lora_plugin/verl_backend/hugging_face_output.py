"""Plain models from a checkpoint: what verl itself would write or merge lacks the adapters.

``checkpoint.save_contents=[…,hf_model]`` makes verl (0.9.1 ``utils/checkpoint/fsdp_checkpoint_manager.py``) write the
module's state under ``huggingface/`` as it is, with PEFT's names and the factors apart, of which transformers makes
random weights. ``python -m verl.model_merger`` (``model_merger/fsdp_model_merger.py``) takes the shards apart into a
model without the adapters and a folder with them, both to nearest in bfloat16. So the engine writes the merged model,
and the merger finds no shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch

from hybrid_lora_plugin.files import complete_file, complete_folder
from hybrid_lora_plugin.names import is_wrapped
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.sync.hybrid_weights import factors_of, plain_state, unmerged
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.training.base_model import weightless_model
from hybrid_lora_plugin.training.dtensor import whole
from hybrid_lora_plugin.training.export import load_tokenizer
from hybrid_lora_plugin.training.merge import merge_weight
from hybrid_lora_plugin.training.model_folder import ModelFolder, file_order

HF_MODEL, FOLDER = "hf_model", "huggingface"
#: verl's file for its merger, which nothing else reads
MERGER_FILE = "fsdp_config.json"

Result = TypeVar("Result")


def take_over(manager) -> bool:
    """Whether ``hf_model`` is to be saved, which verl's checkpoint manager ``manager`` then does no longer."""
    contents = manager.checkpoint_save_contents
    manager.checkpoint_save_contents = [name for name in contents if name != HF_MODEL]
    return HF_MODEL in contents


@torch.no_grad()
def save_merged(
    model: torch.nn.Module, plan: SyncPlan, checkpoint: Path, ranks: Ranks, model_config, base_dtype: str
) -> None:
    """Write the model that ``hybrid-lora-export`` writes from a checkpoint, byte for byte, into its ``huggingface``.

    Tokenizer and chat template are the run's; it has no model card.

    Every rank draws every weight; rank 0 merges on the CPU, as the export does, and writes each at once.

    Args:
        model: the hybrid model, in any sharding.
        plan: how its weights become those of a rollout engine.
        checkpoint: folder of the actor's; what is in ``huggingface`` gives way once all is written.
        ranks: of the trainer.
        model_config: verl's, of the base model.
        base_dtype: type in which the run holds the base model.

    Raises:
        ConfigurationError, RuntimeError: on every rank, where rank 0 cannot write it.
        WeightSyncError: a weight is too large for float16, or no number.
    """
    state = plan.state_of(model)
    weights = plain_state(model, state)
    with ExitStack() as entered:
        first = _FirstRank(ranks)

        def begin() -> ModelFolder:
            folder = entered.enter_context(complete_folder(checkpoint / FOLDER, replace=True))
            base, trust = model_config.local_path, bool(model_config.trust_remote_code)
            # The run's, with its own chat template, which need not come from the base model's folder.
            (model_config.tokenizer or load_tokenizer(base, trust)).save_pretrained(folder)
            return ModelFolder(folder, weightless_model(base, base_dtype, plan.dtype, trust), weights)

        output = first.do(begin)
        first.tell()
        for plain in file_order(weights):
            name, tensor = weights[plain]
            if is_wrapped(name):
                parts = (whole(tensor, plan.device), *factors_of(state, name, plan.device))
                first.do(lambda plain=plain, parts=parts: output.add(plain, _merged(plain, parts, plan)))
            else:
                value = unmerged(model, plain, name, tensor, plan)
                first.do(lambda plain=plain, value=value: output.add(plain, value.cpu()))
        first.do(lambda: output.finish())
        first.do(entered.close)
        first.tell()


def _merged(plain: str, parts: tuple[torch.Tensor, ...], plan: SyncPlan) -> torch.Tensor:
    base, lora_a, lora_b = (part.cpu() for part in parts)
    return merge_weight(base, lora_a, lora_b, plan.scaling, plan.dtype, plan.rounding, plain)


class _FirstRank:
    """Work of rank 0 between collectives, in which an error would leave the others waiting: it is told later."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._error: Exception | None = None

    def do(self, work: Callable[[], Result]) -> Result | None:
        """Do it on rank 0, unless something failed before."""
        if self._ranks.first and self._error is None:
            try:
                return work()
            except Exception as error:
                self._error = error
        return None

    def tell(self) -> None:
        """Raise on every rank what failed on rank 0."""
        self._ranks.from_first(self._raise)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def end_mergers(folder: Path) -> None:
    """Make ``python -m verl.model_merger`` fail on a checkpoint, on any machine, with a line that names the way.

    It opens ``model_world_size_<world_size>_rank_0.pt`` first and reads ``world_size`` in this one file.

    Args:
        folder: of the actor's checkpoint, as verl's manager wrote it.
    """
    file = folder / MERGER_FILE
    content = json.loads(file.read_text())
    ranks = content["world_size"]
    content["world_size"] = f"{ranks} (verl's merger would leave the adapters out: run hybrid-lora-export instead)"
    with complete_file(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=4))
