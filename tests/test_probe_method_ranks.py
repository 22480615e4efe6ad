"""Probe methods beside the paper's on 2 and 4 ranks, whole or sharded by FSDP2: the measurements of one process."""

import pytest
import torch
from torch import distributed

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.probing.distributed import Ranks, place
from hybrid_lora_plugin.probing.methods import lookahead
from hybrid_lora_plugin.probing.runner import METHODS
from hybrid_lora_plugin.scoring import get_criterion
from tests.support.served_ranks import run_ranks
from tests.support.tiny_probe import passes_of, ragged_batch, tiny_model

# residual_gradient measures what the others of its method do as well.
CRITERIA = ["lookahead", "residual_gradient", "plop"]
BATCHES = 4


def batch_of(index):
    # Neither 2 nor 4 divides it: some ranks have a row less, or none.
    return ragged_batch(rows=5, seed=20 + index)


def measure(criterion, sharded=False, micro_batch_size=None):
    """All measurements of a probe on the ranks that there are, in float64."""
    config = ProbeCommandConfig(criterion=criterion)
    config.probe.partitions, config.probe.warmup_steps, config.probe.lr = BATCHES, 2, 1e-2
    config.probe.lookahead.lr = 1e-4
    model = tiny_model(layers=2)
    candidates = find_candidates(model)
    method = METHODS[get_criterion(criterion).method](model, candidates, config)
    model.double()
    if sharded:
        place(model, candidates, method.replicated, Ranks(torch.device("cpu")))
    method.start(passes_of(model, micro_batch_size))
    for step in range(method.warmup_steps):
        method.warm_up(ragged_batch(rows=5, seed=step), None)
    method.finish_warmup()
    method.begin_scoring(batch_of)
    rows = {}
    for row in range(method.rows):
        for name, values in method.score(row, batch_of(row))[0].items():
            rows.setdefault(name, []).append(values)
    return method.measurements({name: torch.stack(values) for name, values in rows.items()}) | method.results()


def _one_of_many(rank, ranks, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    # A module a group: the backward pass then ends in another layer each time.
    lookahead.SUMMED_BYTES = 1
    try:
        ways = [(True, 1), (False, None)] if ranks == 2 else [(True, None)]
        measured = [(name, measure(name, *way)) for name in CRITERIA for way in ways]
        torch.save(measured, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_measure_what_one_does(tmp_path, ranks):
    run_ranks(_one_of_many, (ranks, str(tmp_path)), ranks)
    alone = {name: measure(name) for name in CRITERIA}
    for rank in range(ranks):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert {name for name, _ in found} == set(CRITERIA)
        for criterion, together in found:
            assert together.keys() == alone[criterion].keys()
            for name, values in alone[criterion].items():
                # What is left of larger numbers is as exact as those were.
                torch.testing.assert_close(together[name], values, rtol=1e-7, atol=1e-11, msg=f"{criterion}: {name}")
