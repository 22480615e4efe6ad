"""AutoLoRA's bi-level step against explicit second derivatives (arXiv 2403.09113; DARTS, arXiv 1806.09055)."""

import pytest
import torch
from torch.func import functional_call

from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.forward import negative_log_likelihood
from hybrid_lora_plugin.probing.methods.autolora import AutoLoraMethod
from hybrid_lora_plugin.seeding import generator
from tests.support.tiny_probe import assert_resumes_bit_for_bit, begin, passes_of, ragged_batch

TRAINING, VALIDATION = ragged_batch(seed=1), ragged_batch(rows=4, seed=2)


def configured(lr=1e-2, alpha_lr=1e-2):
    config = ProbeCommandConfig()
    config.probe.warmup_steps, config.probe.lr, config.probe.autolora.alpha_lr = 4, lr, alpha_lr
    config.lora.rank = 2
    return config


def begin_somewhere(config, **settings):
    """A run whose parameters have left their start, so that nothing vanishes."""
    run, model = begin(AutoLoraMethod, config, **settings)
    rng = generator(0, "test")
    for parameter in run.replicated:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter)
    return run, model


def mean_loss(model, batch):
    return negative_log_likelihood(model, batch) / batch.response_tokens


def exact_alpha_gradients(run, model, lr):
    """Through the unrolled step by second derivatives, and its first-order part alone: two ``[M]``."""
    named = {n: p for n, p in model.named_parameters() if n.rsplit(".", 1)[1] in ("A", "B", "e")}
    alphas = [layer.alpha for layer in run.layers.values()]
    for parameter in (*named.values(), *alphas):
        parameter.requires_grad_(True)
    descent = torch.autograd.grad(mean_loss(model, TRAINING), list(named.values()), create_graph=True)
    moved = {name: p - lr * g for (name, p), g in zip(named.items(), descent, strict=True)}

    def gradient(weights):
        loss = mean_loss(lambda **arguments: functional_call(model, weights, (), arguments), VALIDATION)
        return torch.cat(torch.autograd.grad(loss, alphas))

    return gradient(moved), gradient({name: value.detach() for name, value in moved.items()})


def test_alpha_gradient_approaches_the_exact_derivative_through_the_unrolled_step(monkeypatch):
    # A large step makes the second-order term matter.
    lr = 0.5
    run, model = begin_somewhere(configured(lr), micro_batch_size=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    results = {}
    for length in (1e-2, 2.5e-3):
        monkeypatch.setattr("hybrid_lora_plugin.probing.methods.autolora._STEP_LENGTH", length)
        gradients, loss = run.alpha_gradients(TRAINING, VALIDATION)
        results[length] = torch.cat(gradients)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert loss == pytest.approx(passes_of(model).loss(TRAINING), rel=1e-12)
    exact, first_order = exact_alpha_gradients(run, model, lr)
    second_order = (exact - first_order).norm()
    assert second_order > 0.1 * exact.norm()
    errors = {length: float((got - exact).norm() / second_order) for length, got in results.items()}
    # A central difference: a quarter of the step leaves a sixteenth of the error.
    assert errors[1e-2] < 0.03 and errors[2.5e-3] < errors[1e-2] / 12


def adamw_first_step(value, gradient, lr):
    """AdamW's first step from zero moments, without weight decay."""
    return value - lr * gradient / (gradient.abs() + 1e-8)


def test_training_and_validation_gradients_do_not_mix():
    config = configured()
    run, model = begin_somewhere(config)
    weights = {n: p for n, p in model.named_parameters() if n.rsplit(".", 1)[1] in ("A", "B", "e")}
    gradients, _ = run.alpha_gradients(TRAINING, VALIDATION)
    alphas = [layer.alpha.detach().clone() for layer in run.layers.values()]
    start = {name: p.detach().clone() for name, p in weights.items()}
    run.warm_up(TRAINING, VALIDATION)
    for layer, value, gradient in zip(run.layers.values(), alphas, gradients, strict=True):
        torch.testing.assert_close(layer.alpha.detach(), adamw_first_step(value, gradient, 1e-2), rtol=1e-9, atol=1e-12)

    # A, B and e moved by the training gradient at the new alpha, and by nothing else.
    moved = {name: p.detach().clone() for name, p in weights.items()}
    for name, parameter in weights.items():
        parameter.data.copy_(start[name])
        parameter.requires_grad_(True)
    expected = torch.autograd.grad(mean_loss(model, TRAINING), list(weights.values()))
    for name, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(moved[name], adamw_first_step(start[name], gradient, 1e-2), rtol=1e-7, atol=1e-9)
    # The same holds of the moments, which see the gradient's size and not only its sign.
    tensors = run.tensors()
    for name, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(tensors[f"exp_avg/{name}"], 0.1 * gradient, rtol=1e-8, atol=1e-14)
    for name, gradient in zip(run.layers, gradients, strict=True):
        torch.testing.assert_close(tensors[f"exp_avg/{name}.alpha"], 0.1 * gradient, rtol=1e-12, atol=0)


def test_another_validation_batch_changes_only_alpha_and_what_follows_from_it():
    runs = [begin_somewhere(configured(alpha_lr=1e-30))[0] for _ in range(2)]
    for run, seed in zip(runs, (2, 3), strict=True):
        run.warm_up(TRAINING, ragged_batch(rows=4, seed=seed))
    first, second = (run.tensors() for run in runs)
    for name in first:
        same = torch.equal(first[name], second[name])
        # With alpha held by a rate of almost 0 only its moments show the validation batch.
        assert same == (not (name.startswith("exp_avg") and name.endswith(".alpha"))), name


def test_returns_the_training_loss_before_the_step_and_measures_no_rows():
    run, model = begin_somewhere(configured())
    expected = passes_of(model).loss(TRAINING)
    assert run.warm_up(TRAINING, VALIDATION) == pytest.approx(expected, rel=1e-12)
    assert run.step == 1 and run.rows == 0


def test_a_resumed_run_is_bit_equal_and_alpha_keeps_its_sign():
    run, _ = assert_resumes_bit_for_bit(AutoLoraMethod, configured(), 2, 2)
    next(iter(run.layers.values())).alpha.data.fill_(-0.5)
    assert run.results()["autolora_alpha"][0] == -0.5
    assert run.results()["autolora_alpha"].shape == (len(run.layers),)


def test_a_warmup_without_steps_or_without_movement_of_alpha_is_refused():
    run, _ = begin(AutoLoraMethod, configured())
    with pytest.raises(ProbeError, match="probe.warmup_steps"):
        run.finish_warmup()
    run, _ = begin(AutoLoraMethod, configured(alpha_lr=1e-30), dtype=torch.float32)
    run.warm_up(TRAINING, VALIDATION)
    with pytest.raises(ProbeError, match="every alpha is still 1"):
        run.finish_warmup()


def test_an_alpha_that_is_not_finite_is_refused():
    run, _ = begin(AutoLoraMethod, configured())
    run.warm_up(TRAINING, VALIDATION)
    run.replicated[-1].data.fill_(float("nan"))
    with pytest.raises(ProbeError, match="probe.autolora.alpha_lr"):
        run.finish_warmup()
