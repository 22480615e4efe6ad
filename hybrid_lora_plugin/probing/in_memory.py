"""A probe of a model that is in memory already: measurements alone, with no file, no rows and no artifact.

For studies of criteria, which probe many small models. ``runner.py`` is the probe of a command: data, resuming, saving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.forward import Batch, Passes
from hybrid_lora_plugin.probing.layers import replace
from hybrid_lora_plugin.probing.runner import METHODS
from hybrid_lora_plugin.scoring import get_criterion


def measure_in_memory(
    model: nn.Module,
    candidates: Sequence[Candidate],
    config: ProbeCommandConfig,
    warmup_batch: Callable[[int], Batch],
    validation_batch: Callable[[int], Batch],
) -> dict[str, Tensor]:
    """What a probe with ``config.criterion`` measures, for ``scoring.score_modules`` or ``allocation.select``.

    Args:
        model: a Hugging Face model on its device, on this process alone. Its linear modules are put back afterwards
            with their own bits; its parameters stay frozen and it stays in eval mode.
        candidates: the M candidates.
        config: criterion, probe and lora are read.
        warmup_batch: step from 0 -> batch ``[B, S]``.
        validation_batch: number from 0 -> batch ``[B, S]``, equal each time it is asked for; below
            ``probe.partitions / probe.partitions_per_batch``.

    Returns:
        Measurements by name, ``[T, M]`` or ``[M]`` float64; none for a criterion without a probe.

    Raises:
        ProbeError: as the method: a loss that is no number, adapters that learned nothing.
    """
    name = get_criterion(config.criterion).method
    if name is None:
        return {}
    method = METHODS[name](model, candidates, config)
    try:
        device = next(model.parameters()).device
        method.start(Passes(model, Ranks(device), config.probe.micro_batch_size))
        batches = -(-method.rows // config.probe.partitions_per_batch) or 1
        while method.step < method.warmup_steps:
            method.warm_up(warmup_batch(method.step), validation_batch(method.step % batches))
        method.finish_warmup()
        method.begin_scoring(validation_batch)
        rows: dict[str, list[Tensor]] = {}
        for row in range(method.rows):
            measured, _ = method.score(row, validation_batch(row // config.probe.partitions_per_batch))
            for key, values in measured.items():
                rows.setdefault(key, []).append(values)
        return method.measurements({key: torch.stack(values) for key, values in rows.items()}) | method.results()
    finally:
        for key, layer in method.layers.items():
            replace(model, key, getattr(layer, "base", layer))
