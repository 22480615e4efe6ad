"""The allocation a run trains under when it was given none: probed by its own workers before the actor is built.

The probe (objective ``sft``) runs on the ranks of the actor, with the base sharded over them, and is gone before the
actor takes the memory. The artifact lies beside the checkpoints; a resumed run finds it there and never probes again.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from verl.utils.device import get_device_id, get_torch_device

from hybrid_lora_plugin.allocation.learning import learned_in_words
from hybrid_lora_plugin.allocation.schema import Allocation
from hybrid_lora_plugin.allocation.storage import ALLOCATION_FILE, load_allocation
from hybrid_lora_plugin.allocation.trial_words import trial_in_words, trial_table
from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.loading import checkpoint_fingerprint
from hybrid_lora_plugin.probing.progress import LineProgress
from hybrid_lora_plugin.probing.runner import run_probe
from hybrid_lora_plugin.scoring import get_criterion
from hybrid_lora_plugin.verl_backend.probe.resume import command_config, has_earlier_allocation
from hybrid_lora_plugin.verl_backend.run_kinds import MODEL, kind_of_model


def probed_allocation(hybrid: HybridLoraConfig, model_config: Any) -> tuple[Allocation, str]:
    """Probe, unless an earlier start of this run did; every rank of the actor calls it.

    Args:
        hybrid: with ``output_dir`` set and no ``allocation``.
        model_config: verl's ``HFModelConfig``.

    Returns:
        The allocation and the text of its file, equal on every rank whether or not it can read rank 0's disk.

    Raises:
        ConfigurationError: something cannot be used, or the artifact found was made with other settings or for other
            weights.
    """
    folder, ranks = Path(hybrid.output_dir), Ranks(torch.device(get_device_id()))

    def data() -> dict[str, Any]:
        setting = kind_of_model(model_config).place(MODEL + "path")
        return {"checkpoint": checkpoint_fingerprint(model_config.local_path), "model": setting}

    def kept() -> bool:
        return has_earlier_allocation(folder, hybrid, data)

    if not ranks.from_first(kept):
        if hybrid.probe.objective == "policy" and get_criterion(hybrid.criterion).method is not None:
            raise ConfigurationError(
                f"hybrid_lora.output_dir: {folder} holds no allocation, and objective policy is probed before the "
                f"workers start; start the run with `python -m verl.trainer.main_ppo`",
                see="policy-probe-not-possible",
            )
        config = command_config(hybrid, model_config.local_path, model_config.trust_remote_code)
        run_probe(config, LineProgress(interval=30.0), ranks)
        # FSDP's modules refer to each other: without a collection the probe would sit beside the actor.
        gc.collect()
        get_torch_device().empty_cache()
        if ranks.first:
            allocation = load_allocation(folder)
            # Nothing to say of a criterion that warms nothing up.
            said = [words] if (words := learned_in_words(allocation.probe)) else []
            if allocation.trial is not None:
                said += [*trial_table(allocation.trial), *trial_in_words(allocation.trial)]
            for line in said:
                print(f"hybrid_lora: {line}", flush=True)
    return ranks.from_first(lambda: (load_allocation(folder), (folder / ALLOCATION_FILE).read_text(encoding="utf-8")))
