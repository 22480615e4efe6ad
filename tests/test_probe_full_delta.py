"""Full deltas under Algorithm 1's masks (criterion ``full_pruning``)."""

import pytest
import torch
from torch import nn

from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.forward import negative_log_likelihood
from hybrid_lora_plugin.probing.measure import draw_partition
from hybrid_lora_plugin.probing.methods.full_delta import FullDeltaLinear, FullDeltaMethod
from hybrid_lora_plugin.seeding import generator
from tests.support.tiny_probe import assert_resumes_bit_for_bit, begin, ragged_batch, tiny_model


def configured(steps=4):
    config = ProbeCommandConfig()
    config.probe.warmup_steps, config.probe.full_lr, config.probe.partitions = steps, 1e-2, 6
    return config


def warmed_up(**settings):
    run, model = begin(FullDeltaMethod, configured(), **settings)
    for step in range(2):
        run.warm_up(ragged_batch(seed=step), None)
    run.finish_warmup()
    return run, model


def test_layer_adds_x_times_d_and_starts_as_the_base():
    layer = FullDeltaLinear(nn.Linear(5, 4).bfloat16())
    x = torch.randn(2, 3, 5).bfloat16()
    assert torch.equal(layer(x), layer.base(x)) and layer.D.dtype == torch.float32 and layer.D.shape == (5, 4)
    layer = FullDeltaLinear(nn.Linear(5, 4)).double()
    nn.init.normal_(layer.D)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.base.weight + layer.D.T, layer.base.bias), rtol=1e-12, atol=1e-12
    )
    layer.active = False
    assert torch.equal(layer(x), layer.base(x))


def test_first_step_is_adamw_on_the_gradient_of_full_fine_tuning():
    run, model = begin(FullDeltaMethod, configured())
    batch = ragged_batch()
    full = tiny_model()
    loss = negative_log_likelihood(full, batch) / batch.response_tokens
    loss.backward()
    assert run.warm_up(batch, None) == pytest.approx(loss.item(), rel=1e-12)
    for name, layer in run.layers.items():
        gradient = full.get_submodule(name).weight.grad.T
        expected = -1e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(layer.D.detach(), expected, rtol=1e-6, atol=1e-9)
        assert layer.base.weight.grad is None


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_sensitivity_is_the_mean_of_d_times_the_summed_gradient_of_both_masked_passes(micro_batch_size):
    run, model = warmed_up(micro_batch_size=micro_batch_size)
    batch, row = ragged_batch(rows=5, seed=7), 3
    names = list(run.layers)
    in_a = draw_partition(0, row, len(names)).tolist()
    assert 0 < sum(in_a) < len(in_a)
    got, loss = run.score(row, batch)
    assert all(layer.active and layer.D.grad is None for layer in run.layers.values())

    # The same two models built from plain weights: W + D where a module is active, W where it is not.
    gradients, losses = {}, []
    for active in ([not a for a in in_a], in_a):
        plain = tiny_model()
        for name, on in zip(names, active, strict=True):
            plain.get_submodule(name).weight.data += on * run.layers[name].D.detach().T
        value = negative_log_likelihood(plain, batch) / batch.response_tokens
        value.backward()
        losses.append(value.item())
        for name, on in zip(names, active, strict=True):
            if on:
                # Complementary masks: no module is active twice.
                assert name not in gradients
                gradients[name] = plain.get_submodule(name).weight.grad.T
    expected = [(run.layers[name].D.detach() * gradients[name]).abs().mean().item() for name in names]
    assert list(got) == ["full_sensitivities"] and got["full_sensitivities"].dtype == torch.float64
    assert got["full_sensitivities"].tolist() == pytest.approx(expected, rel=1e-9)
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-12)


def test_results_are_frobenius_norms_and_rows_are_partitions():
    run, _ = warmed_up()
    slow = [sum(float(v) ** 2 for v in layer.D.detach().flatten()) ** 0.5 for layer in run.layers.values()]
    assert run.results()["delta_norm"].tolist() == pytest.approx(slow, rel=1e-12)
    assert run.rows == 6 and len(run.replicated) == len(run.layers)


def test_a_resumed_run_is_bit_equal():
    whole, resumed = assert_resumes_bit_for_bit(FullDeltaMethod, configured(), 2, 2)
    batch = ragged_batch(seed=9)
    assert torch.equal(whole.score(1, batch)[0]["full_sensitivities"], resumed.score(1, batch)[0]["full_sensitivities"])


def test_several_processes_are_refused():
    FullDeltaMethod.check_ranks(1)
    with pytest.raises(ProbeError, match="criterion: full_pruning .* 2 processes"):
        FullDeltaMethod.check_ranks(2)


def test_nothing_learned_and_values_that_are_not_finite_are_refused():
    run, model = begin(FullDeltaMethod, configured())
    with pytest.raises(ProbeError, match="probe.warmup_steps"):
        run.finish_warmup()
    nn.init.normal_(run.replicated[0], generator=generator(0, "test"))
    run.replicated[0].data[0, 0] = float("nan")
    with pytest.raises(ProbeError, match="probe.full_lr"):
        run.warm_up(ragged_batch(), None)
    with pytest.raises(ProbeError, match="probe.full_lr"):
        run.finish_warmup()
