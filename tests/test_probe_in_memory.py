"""A probe of a model in memory measures what the command does, and gives the model back."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import CRITERIA, AdapterConfig, BudgetConfig, ModelConfig, ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.in_memory import measure_in_memory
from hybrid_lora_plugin.probing.prepare import prepare_data
from hybrid_lora_plugin.probing.progress import Progress
from hybrid_lora_plugin.probing.runner import run_probe
from hybrid_lora_plugin.scoring import Measured, get_criterion, score_modules
from tests.support.tiny_models import sums, write_jsonl
from tests.support.tiny_probe import ragged_batch, tiny_model

#: A trial trains allocations and measures no module; ``probing/trial/in_memory.py`` is for that.
ONE_A_METHOD = {get_criterion(name).method: name for name in reversed(CRITERIA) if name != "trial"}


def configured(criterion, **probe):
    config = ProbeCommandConfig(criterion=criterion, lora=AdapterConfig(rank=2), budget=BudgetConfig(ratio=0.3))
    config.probe.warmup_steps, config.probe.partitions, config.probe.lr, config.probe.full_lr = 3, 4, 5e-3, 1e-3
    config.probe.lookahead.lr = 1e-4
    config.probe.adalora.initial_rank, config.probe.adalora.target_rank, config.probe.adalora.interval = 4, 2, 1
    for name, value in probe.items():
        setattr(config.probe, name, value)
    return config


@pytest.mark.parametrize("method", ONE_A_METHOD)
def test_every_method_measures_and_leaves_the_model_as_it_was(method):
    model = tiny_model(torch.float32, layers=2)
    before, candidates = {k: v.clone() for k, v in model.state_dict().items()}, find_candidates(model)
    config = configured(ONE_A_METHOD[method], warmup_steps=10)
    measured = measure_in_memory(
        model, candidates, config, lambda step: ragged_batch(seed=step), lambda index: ragged_batch(seed=50 + index)
    )
    scored = score_modules(config.criterion, Measured(candidates, measured, config.control))
    assert scored.scores.isfinite().all() and all(tensor.dtype == torch.float64 for tensor in measured.values())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failed_probe_gives_the_model_back_too():
    model = tiny_model(torch.float32)
    names = list(model.state_dict())
    with pytest.raises(ProbeError, match="probe.warmup_steps"):
        measure_in_memory(
            model, find_candidates(model), configured("hybrid", warmup_steps=0), ragged_batch, lambda _: ragged_batch()
        )
    assert list(model.state_dict()) == names


def test_it_measures_what_the_command_does(tiny_qwen2, tmp_path):
    config = configured("lookahead", files=[write_jsonl(tmp_path / "rows.jsonl", sums(60))], max_length=64)
    config.model, config.output_dir = ModelConfig(path=str(tiny_qwen2)), str(tmp_path / "out")
    data = prepare_data(config, Progress())
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    found = measure_in_memory(model, find_candidates(model), config, data.warmup_batch, data.validation_batch)
    written = load_file(run_probe(config) / "sensitivities.safetensors")
    assert found.keys() == written.keys() and all(torch.equal(found[name], written[name]) for name in written)
