"""A trial of a model that is in memory already, on this process alone, with no file and no artifact: for studies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from hybrid_lora_plugin.allocation.schema import TrialRecord
from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.forward import Batch
from hybrid_lora_plugin.probing.loading import parameter_count
from hybrid_lora_plugin.probing.provenance import model_identity
from hybrid_lora_plugin.probing.trial.contender import ContenderModel, allocation_of
from hybrid_lora_plugin.probing.trial.halving import Halving
from hybrid_lora_plugin.probing.trial.options import check_trial, settled
from hybrid_lora_plugin.probing.trial.portfolio import contenders_of, entries_of, matched_lora
from hybrid_lora_plugin.probing.trial.schedule import rounds_of
from hybrid_lora_plugin.probing.trial.state import InMemory


def trial_in_memory(
    model: nn.Module,
    candidates: Sequence[Candidate],
    config: ProbeCommandConfig,
    measurements: Callable[[ProbeCommandConfig], Mapping[str, Tensor]],
    batch: Callable[[int, int], Batch],
    held_out: Callable[[int, int], Batch],
) -> tuple[tuple[str, ...], TrialRecord | None]:
    """What a trial chooses, and what it found.

    Args:
        model: a plain Hugging Face model on its device, which stays as it is.
        candidates: the M candidates.
        config: criterion ``trial``; trial, probe, lora and budget are read.
        measurements: of an entry's configuration -> what its criterion reads, ``[T, M]`` or ``[M]`` by name.
        batch: number of a step, rows -> its batch; the same for all candidates.
        held_out: number, rows -> a batch to compare on.

    Returns:
        Names of the modules to tune fully, in model order; and the record, None where all candidates chose the same.

    Raises:
        ConfigurationError: the options cannot work, or every candidate diverged.
    """
    check_trial(config)
    contenders = contenders_of(entries_of(config), candidates, lambda entry: measurements(entry.config))
    trial, settings = config.trial, settled(config)
    rounds = rounds_of(len(contenders), trial.steps, trial.rounds, trial.keep)
    if not rounds:
        return contenders[0].modules, None
    ranks = Ranks(next(model.parameters()).device)
    identity = model_identity("", model, candidates, parameter_count(model))
    size = settings.batch_size
    sizes = [min(size, trial.held_out_rows - first) for first in range(0, trial.held_out_rows, size)]
    record = Halving(
        contenders,
        matched_lora(contenders, candidates) if trial.lora else None,
        rounds,
        candidates,
        make=lambda one: ContenderModel(
            copy.deepcopy(model),
            candidates,
            allocation_of(one, identity, candidates),
            rank=one.rank,
            settings=settings,
            probe=config.probe,
            ranks=ranks,
        ),
        batch=lambda step: batch(step, size),
        held_out=[held_out(number, rows) for number, rows in enumerate(sizes)],
        memory=InMemory(),
        continues=True,
    ).run()
    return next(one.modules for one in contenders if one.name == record.chosen), record
