"""``signal_to_noise``, ``sign_consistency`` and ``residual_gradient`` against gradients of unfrozen weights."""

import math

import pytest
import torch

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.probing.forward import negative_log_likelihood
from hybrid_lora_plugin.probing.methods import weight_gradient
from hybrid_lora_plugin.probing.methods.weight_gradient import (
    WeightGradientMethod,
    agreement,
    mean_square_of_mean,
    products_of,
    span,
)
from hybrid_lora_plugin.probing.sketch import GradientSketch
from hybrid_lora_plugin.scoring import Measured, score_modules
from hybrid_lora_plugin.seeding import generator
from tests.support.tiny_probe import begin, ragged_batch, tiny_model

BATCHES = 4
CANDIDATES = find_candidates(tiny_model(layers=2))


def batch_of(index):
    return ragged_batch(rows=3, seed=20 + index)


def measured_by(criterion, per_batch=1, **settings):
    config = ProbeCommandConfig(criterion=criterion)
    config.probe.partitions, config.probe.partitions_per_batch = BATCHES * per_batch, per_batch
    config.probe.warmup_steps, config.probe.lr = 2, 1e-2
    run, model = begin(WeightGradientMethod, config, layers=2, **settings)
    for step in range(run.warmup_steps):
        run.warm_up(ragged_batch(seed=step), None)
    run.finish_warmup()
    run.begin_scoring(batch_of)
    rows, losses = {}, []
    for row in range(run.rows):
        measured, loss = run.score(row, batch_of(row // per_batch))
        losses.append(loss)
        for name, values in measured.items():
            rows.setdefault(name, []).append(values)
    measured = run.measurements({name: torch.stack(values) for name, values in rows.items()}) | run.results()
    return run, model, measured, losses


def gradients_of(model):
    """Of each module and batch, by autograd on the unfrozen weights of a plain model: ``[M][T]``."""
    found = [[] for _ in CANDIDATES]
    for index in range(BATCHES):
        batch = batch_of(index)
        weights = [model.get_submodule(candidate.name).weight.requires_grad_(True) for candidate in CANDIDATES]
        loss = negative_log_likelihood(model, batch) / batch.response_tokens
        for module, gradient in zip(found, torch.autograd.grad(loss, weights), strict=True):
            module.append(gradient)
    return found


def square(matrix):
    return sum(value * value for value in matrix.flatten().tolist())


def signal_of(gradients):
    """``(‖Σ G‖² − Σ ‖G‖²) / (T (T − 1))``."""
    count = len(gradients)
    return (square(sum(gradients)) - sum(map(square, gradients))) / (count * (count - 1))


@pytest.mark.parametrize("criterion", ["signal_to_noise", "residual_gradient"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_signal_energy_and_signs_are_those_of_the_base_model(criterion, micro_batch_size):
    _, model, measured, _ = measured_by(criterion, micro_batch_size=micro_batch_size)
    found = gradients_of(tiny_model(layers=2))
    scores = score_modules("signal_to_noise", Measured(CANDIDATES, measured)).scores.tolist()
    expected = [signal_of(g) / (sum(map(square, g)) / BATCHES) for g in found]
    assert scores == pytest.approx(expected, rel=1e-8)
    assert measured["gradient_energy"].T.tolist() == [pytest.approx([square(g) for g in m], rel=1e-9) for m in found]
    scores = score_modules("sign_consistency", Measured(CANDIDATES, measured)).scores.tolist()
    chance = math.sqrt(2 / (math.pi * BATCHES))
    expected = []
    for gradients in found:
        sums = [
            abs(sum(math.copysign(v != 0, v) for v in entry))
            for entry in zip(*(g.flatten().tolist() for g in gradients), strict=True)
        ]
        expected.append(sum(sums) / len(sums) / BATCHES - chance)
    assert scores == pytest.approx(expected, rel=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_residual_is_what_no_change_of_a_or_b_makes():
    run, _, measured, _ = measured_by("residual_gradient")
    plain = tiny_model(layers=2)
    for name, layer in run.layers.items():
        plain.get_submodule(name).weight.data += (layer.alpha * (layer.A * layer.e) @ layer.B).detach().T
    expected = []
    for gradients, candidate in zip(gradients_of(plain), CANDIDATES, strict=True):
        layer = run.layers[candidate.name]
        a, b = layer.A.detach(), layer.B.detach().T
        # I − P by least squares, and not by a basis.
        inputs, outputs = (torch.eye(len(m), dtype=m.dtype) - m @ torch.linalg.pinv(m) for m in (a, b))
        residuals = [outputs @ gradient @ inputs for gradient in gradients]
        # Neither a column of B nor a row of A has anything of it.
        assert max((residual @ a).abs().max() for residual in residuals) < 1e-12
        expected.append(signal_of(residuals) / gradients[0].numel())
    scores = score_modules("residual_gradient", Measured(CANDIDATES, measured)).scores.tolist()
    assert scores == pytest.approx(expected, rel=1e-6)
    assert set(measured) >= {"alpha", "delta_norm", "residual_signal"}


def test_the_model_as_it_is_has_no_warm_up_and_no_adapter_that_counts():
    run, model, measured, losses = measured_by("sign_consistency")
    assert run.warmup_steps == 0 and set(measured) == {"gradient_signal", "gradient_energy", "sign_agreement"}
    batch = batch_of(0)
    with torch.no_grad():
        assert losses[0] == (negative_log_likelihood(tiny_model(layers=2), batch) / batch.response_tokens).item()
    assert all(layer.active for layer in run.layers.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_it_is_measured_once_a_batch():
    _, _, twice, losses = measured_by("signal_to_noise", per_batch=2)
    _, _, once, _ = measured_by("signal_to_noise")
    assert all(torch.equal(twice[name], once[name]) for name in once)
    assert losses[0] == losses[1] and len(losses) == 2 * BATCHES


def test_pseudo_values_are_the_jackknife_of_the_estimate():
    drawn = torch.randn(6, 1, 50, generator=generator(0, "test"), dtype=torch.float64) + 0.3
    rows = mean_square_of_mean(products_of(drawn))
    gradients = list(drawn[:, 0])
    whole = signal_of(gradients)
    assert rows.mean().item() == pytest.approx(whole, rel=1e-12)
    without = [signal_of(gradients[:t] + gradients[t + 1 :]) for t in range(6)]
    assert rows[:, 0].tolist() == pytest.approx([6 * whole - 5 * value for value in without], rel=1e-10)
    assert mean_square_of_mean(products_of(drawn[:2]))[:, 0].tolist() == pytest.approx([signal_of(gradients[:2])] * 2)


def test_noise_alone_has_neither_signal_nor_agreement_and_a_constant_has_all():
    noise = torch.randn(8, 200, 300, generator=generator(0, "noise"))
    signal = mean_square_of_mean(products_of(noise)).mean(dim=0)
    assert abs(signal.mean().item()) < 4 * signal.std().item() / math.sqrt(200)
    found = agreement(noise.sign().to(torch.int8), [300] * 200).mean().item()
    # |Σ of 8 signs| / 8 is 0.273 in the mean; the formula of many batches says 0.282.
    assert found == pytest.approx(math.sqrt(2 / (math.pi * 8)), rel=0.05)
    constant = torch.ones(8, 3, 10, dtype=torch.int8)
    assert agreement(constant, [10] * 3).tolist() == [[1.0] * 3] * 8
    # Padding does not count, and neither do entries that never had a gradient.
    constant[:, 0, 5:], constant[:, 1, 5:] = 0, 0
    assert agreement(constant, [5, 10, 10]).mean(dim=0).tolist() == [1.0, 0.5, 1.0]


@pytest.mark.parametrize("shape", [(96, 160), (64, 1000), (300, 70)], ids=str)
@pytest.mark.parametrize("outlier", [False, True])
def test_a_sketch_keeps_products_without_bias_and_within_its_error(shape, outlier):
    """Also where one input feature holds nearly all, as in language models."""
    rng = generator(0, "sketch test")
    first, second = (torch.randn(40, width, generator=rng, dtype=torch.float64) for width in shape)
    if outlier:
        second[:, 7] *= 50
    deltas = [first, first + torch.randn(40, shape[0], generator=rng, dtype=torch.float64)]
    exact = [delta.T @ second for delta in deltas]
    width, errors = 701, []
    for seed in range(60):
        sketch = GradientSketch(shape, width, seed, 0, torch.device("cpu"))
        made = torch.zeros(2, width, dtype=torch.float64)
        for row, delta in zip(made, deltas, strict=True):
            # In two micro-batches.
            sketch.add_(row, None, delta[:15], second[:15])
            sketch.add_(row, None, delta[15:], second[15:])
        errors.append(((made[0] @ made[1]) - (exact[0] * exact[1]).sum()).item())
    scale = exact[0].norm().item() * exact[1].norm().item()
    errors = torch.tensor(errors) / scale
    assert errors.std() < 1.5 * math.sqrt(2 / width)
    assert errors.mean().abs() < 4 * errors.std() / math.sqrt(60)


def test_a_sample_is_of_the_matrix_itself_and_a_small_matrix_is_its_own_sketch():
    rng = generator(0, "sample test")
    delta, x = torch.randn(9, 6, generator=rng), torch.randn(9, 5, generator=rng)
    matrix = (delta.T @ x).flatten()
    sketch = GradientSketch((6, 5), 40, 0, 0, torch.device("cpu"))
    made, sample = torch.zeros(2, 40)
    sketch.add_(made, sample, delta, x)
    torch.testing.assert_close(made[:30].abs(), matrix.abs())
    torch.testing.assert_close(sample[:30], matrix)
    assert sketch.sampled == 30 and not made[30:].any() and not sample[30:].any()
    sketch = GradientSketch((6, 5), 13, 0, 0, torch.device("cpu"))
    made, sample = torch.zeros(2, 13)
    sketch.add_(made, sample, delta, x)
    torch.testing.assert_close(sample, matrix[sketch._sample])


def test_a_span_has_the_rank_of_its_matrix():
    matrix = torch.randn(9, 2, generator=generator(0, "span test"))
    assert span(torch.cat([matrix, matrix.sum(dim=1, keepdim=True)], dim=1)).shape == (9, 2)
    basis = span(matrix)
    torch.testing.assert_close(basis @ (basis.T @ matrix), matrix)


def test_large_modules_are_sketched_and_give_nearly_the_same(monkeypatch):
    _, _, exact, _ = measured_by("residual_gradient")
    monkeypatch.setattr(weight_gradient, "WIDTH", 251)
    _, _, sketched, _ = measured_by("residual_gradient")
    for name in ("gradient_energy", "sign_agreement"):
        assert not torch.equal(sketched[name], exact[name])
        torch.testing.assert_close(sketched[name].mean(dim=0), exact[name].mean(dim=0), rtol=0.3, atol=0.15)
