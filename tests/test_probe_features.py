"""``plop``: normalised feature norms against a token at a time, and against random inputs."""

import math

import pytest
import torch

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.probing.forward import negative_log_likelihood
from hybrid_lora_plugin.probing.methods.features import FeatureMethod
from hybrid_lora_plugin.seeding import generator
from tests.support.tiny_probe import begin, ragged_batch, tiny_model


def begun(per_batch=1, **settings):
    config = ProbeCommandConfig(criterion="plop")
    config.probe.partitions, config.probe.partitions_per_batch = 4, per_batch
    run, model = begin(FeatureMethod, config, layers=2, **settings)
    run.finish_warmup()
    return run, model


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_feature_norm_is_the_mean_over_tokens_that_are_not_padding(micro_batch_size):
    run, model = begun(micro_batch_size=micro_batch_size)
    batch = ragged_batch(rows=5)
    assert (batch.attention_mask == 0).any()
    measured, loss = run.score(0, batch)
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in run.layers.items()
    ]
    ratios = {name: [] for name in run.layers}
    for row in range(batch.rows):
        # One unpadded row at a time.
        length = int(batch.attention_mask[row].sum())
        with torch.no_grad():
            model(input_ids=batch.input_ids[row : row + 1, :length])
        for name, layer in run.layers.items():
            for z in inputs[name][0]:
                expected = layer.weight.norm() * z.norm() / math.sqrt(len(z))
                ratios[name].append(float((layer.weight @ z).norm() / expected))
    for hook in hooks:
        hook.remove()
    assert measured["feature_norm"].dtype == torch.float64
    assert measured["feature_norm"].tolist() == pytest.approx([sum(r) / len(r) for r in ratios.values()], rel=1e-9)
    with torch.no_grad():
        assert loss == pytest.approx((negative_log_likelihood(model, batch) / batch.response_tokens).item(), rel=1e-12)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_it_is_divided_by_is_the_root_mean_square_over_random_inputs():
    """PLoP's own definition draws one Gaussian input of the same norm."""
    rng = generator(0, "random inputs")
    weight, z = torch.randn(30, 20, generator=rng), torch.randn(20, generator=rng)
    drawn = torch.randn(20_000, 20, generator=rng)
    drawn *= z.norm() / drawn.norm(dim=1, keepdim=True)
    root_mean_square = (drawn @ weight.T).square().sum(dim=1).mean().sqrt()
    assert root_mean_square.item() == pytest.approx((weight.norm() * z.norm() / math.sqrt(20)).item(), rel=0.01)


def test_nothing_is_attached_and_it_is_measured_once_a_batch():
    run, model = begun(per_batch=2)
    rows = [run.score(row, ragged_batch(seed=row // 2)) for row in range(4)]
    assert [set(measured) for measured, _ in rows] == [{"feature_norm"}, set()] * 2
    assert rows[0][1] == rows[1][1] != rows[2][1]
    assert [c.name for c in find_candidates(model)] == list(run.layers)
    assert model.state_dict().keys() == tiny_model(layers=2).state_dict().keys()
    assert (run.warmup_steps, run.replicated, run.results(), run.tensors()) == (0, [], {}, {})
