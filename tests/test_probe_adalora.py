"""AdaLoRA's importance, schedule and threshold against slow references (arXiv 2303.10512, loralib/adalora.py)."""

import math

import pytest
import torch

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.methods.adalora import AdaLoraMethod, keep_most_important, orthogonality, schedule_of
from tests.support.tiny_probe import assert_resumes_bit_for_bit, begin, passes_of, ragged_batch, tiny_model


def configured(steps=10, **changes):
    config = ProbeCommandConfig()
    config.probe.warmup_steps = steps
    settings = dict(lr=1e-2, initial_rank=4, target_rank=2, start=0.2, final=0.3, interval=2) | changes
    for name, value in settings.items():
        setattr(config.probe.adalora, name, value)
    return config


def test_budget_falls_from_initial_to_target_as_in_the_official_schedule():
    config = configured(steps=100, initial_rank=24, target_rank=16, start=0.1, final=0.3, interval=10)
    schedule = schedule_of(100, 7, config.probe.adalora)
    for step in range(1, 101):
        if step <= 10:
            budget, prunes = 24 * 7, False
        elif step > 100 - 30:
            budget, prunes = 16 * 7, True
        else:
            left = 1 - (step - 10) / (100 - 30 - 10)
            budget, prunes = int(16 * 7 + (24 * 7 - 16 * 7) * left**3), step % 10 == 0
        assert (schedule.budget(step), schedule.prunes(step)) == (budget, prunes)
        assert schedule.learns(step) == (step < 70)


def test_threshold_is_global_and_takes_ties_with_it():
    importance = torch.tensor([[5.0, 1.0, 3.0], [0.5, 3.0, 4.0]])
    assert keep_most_important(importance, 4).tolist() == [[True, False, True], [False, True, True]]
    # The third smallest is 3, which two components have: 2 are left of a budget of 3.
    assert keep_most_important(importance, 3).tolist() == [[True, False, False], [False, False, True]]
    assert keep_most_important(importance, 6).all() and keep_most_important(importance, 9).all()
    assert not keep_most_important(importance, 0).any()


def test_orthogonality_is_the_mean_norm_of_gram_minus_identity():
    matrices = [torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)]
    norms = []
    for matrix in matrices:
        square = 0.0
        for i in range(3):
            for j in range(3):
                dot = sum(float(matrix[i, k] * matrix[j, k]) for k in range(matrix.shape[1]))
                square += (dot - (i == j)) ** 2
        norms.append(math.sqrt(square))
    assert float(orthogonality(matrices)) == pytest.approx(sum(norms) / 2, rel=1e-12)


def test_importance_ranks_and_pruned_values_equal_a_loop_over_elements():
    config = configured()
    run, model = begin(AdaLoraMethod, config)
    settings, names = config.probe.adalora, list(run.layers)
    rank, modules = settings.initial_rank, len(names)
    average, spread, kept, stepped = {}, {}, None, {}
    optimizer_step = run._optimizer.step

    def step_and_remember():
        optimizer_step()
        # Importance comes after the step and before the mask.
        stepped.update({name: p.detach().clone() for name, p in model.named_parameters()})

    run._optimizer.step = step_and_remember
    for step in range(1, 11):
        batch = ragged_batch(seed=step)
        # The gradient of loss + penalty, by autograd at the values before the step.
        parameters = {f"{n}.{which}": getattr(run.layers[n], which) for n in names for which in ("A", "B", "e")}
        penalty = 0
        for name in names:
            a, b = run.layers[name].A, run.layers[name].B
            eye = torch.eye(rank, dtype=a.dtype)
            penalty = penalty + torch.linalg.norm(a.T @ a - eye) + torch.linalg.norm(b @ b.T - eye)
        model.zero_grad()
        passes_of(model).backward(batch, list(parameters.values()))
        slow_penalty = settings.orthogonal * penalty / (2 * modules)
        extra = torch.autograd.grad(slow_penalty, list(parameters.values()), allow_unused=True)
        gradients = {
            name: p.grad + (0 if e is None else e) for (name, p), e in zip(parameters.items(), extra, strict=True)
        }
        run.warm_up(batch, None)
        if step < 7:
            for name in parameters:
                values = (stepped[name] * gradients[name]).flatten().tolist()
                means = average.setdefault(name, [0.0] * len(values))
                spreads = spread.setdefault(name, [0.0] * len(values))
                for i, value in enumerate(values):
                    means[i] = 0.85 * means[i] + 0.15 * abs(value)
                    spreads[i] = 0.85 * spreads[i] + 0.15 * abs(abs(value) - means[i])
        # After the final part began, the moving averages stand still.
        importance = []
        for name in names:
            layer = run.layers[name]
            d_in, d_out = layer.A.shape[0], layer.B.shape[1]
            for j in range(rank):
                s = average[f"{name}.e"][j] * spread[f"{name}.e"][j]
                a, b = f"{name}.A", f"{name}.B"
                s += sum(average[a][i * rank + j] * spread[a][i * rank + j] for i in range(d_in)) / d_in
                s += sum(average[b][j * d_out + o] * spread[b][j * d_out + o] for o in range(d_out)) / d_out
                importance.append(s)
        torch.testing.assert_close(
            run.triplet_importance().flatten(), torch.tensor(importance, dtype=torch.float64), rtol=1e-9, atol=0
        )
        if step in (4, 6, 8, 9, 10):
            left = 1 - (step - 2) / (10 - 3 - 2)
            budget = modules * 2 if step > 7 else int(modules * 2 + modules * 2 * left**3)
            threshold = sorted(importance)[modules * 4 - budget - 1]
            kept = [[importance[m * rank + j] > threshold for j in range(rank)] for m in range(modules)]
            for m, name in enumerate(names):
                zero = [value == 0 for value in run.layers[name].e.tolist()]
                assert zero == [not on for on in kept[m]]
    run.finish_warmup()
    results = run.results()
    assert results["adalora_rank"].tolist() == [sum(row) for row in kept]
    assert results["adalora_rank"].sum() == 2 * modules
    sums = [sum(importance[m * rank : (m + 1) * rank]) for m in range(modules)]
    assert results["adalora_importance"].tolist() == pytest.approx(sums, rel=1e-9)
    assert len(set(results["adalora_rank"].tolist())) > 1


def test_scale_is_lora_alpha_over_the_initial_rank_and_is_not_trained():
    run, _ = begin(AdaLoraMethod, configured())
    for step in range(3):
        run.warm_up(ragged_batch(seed=step), None)
    assert all(layer.alpha.item() == 32 / 4 and layer.alpha.grad is None for layer in run.layers.values())
    assert not any(name.endswith(".alpha") for name in run.tensors())
    assert run.rows == 0 and all(any(p is layer.alpha for p in run.replicated) for layer in run.layers.values())


def test_penalty_is_added_once_whatever_the_micro_batches():
    one, _ = begin(AdaLoraMethod, configured())
    three, _ = begin(AdaLoraMethod, configured(), micro_batch_size=1)
    for run in (one, three):
        for step in range(10):
            run.warm_up(ragged_batch(seed=step), None)
    torch.testing.assert_close(one.triplet_importance(), three.triplet_importance(), rtol=1e-8, atol=0)
    assert torch.equal(one.results()["adalora_rank"], three.results()["adalora_rank"])


@pytest.mark.parametrize("before", [3, 6, 9])
def test_a_resumed_run_is_bit_equal(before):
    assert_resumes_bit_for_bit(AdaLoraMethod, configured(), before, 10 - before)


@pytest.mark.parametrize("steps, changes", [(0, {}), (1, {}), (9, dict(final=0.0, interval=10))])
def test_a_warmup_that_cannot_reach_the_budget_is_refused_and_the_named_one_is_not(steps, changes):
    model = tiny_model()
    with pytest.raises(ProbeError, match="probe.warmup_steps") as error:
        AdaLoraMethod(model, find_candidates(model), configured(steps, **changes))
    enough = int(str(error.value).split("give at least ")[1].split()[0])
    assert enough > steps
    run, _ = begin(AdaLoraMethod, configured(enough, **changes))
    for step in range(enough):
        run.warm_up(ragged_batch(seed=step), None)
    assert run.results()["adalora_rank"].sum() == 2 * len(run.layers)


def test_a_decay_of_zero_is_refused_because_it_ranks_nothing():
    model = tiny_model()
    with pytest.raises(ProbeError, match="probe.adalora.beta"):
        AdaLoraMethod(model, find_candidates(model), configured(beta=0.0))


def test_a_loss_that_is_not_finite_names_the_learning_rate():
    run, model = begin(AdaLoraMethod, configured())
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ProbeError, match="probe.adalora.lr"):
        run.warm_up(ragged_batch(), None)


def test_importance_that_is_not_finite_is_refused():
    run, _ = begin(AdaLoraMethod, configured())
    for step in range(10):
        run.warm_up(ragged_batch(seed=step), None)
    run._importance[f"{list(run.layers)[-1]}.A"][0, 0] = float("nan")
    with pytest.raises(ProbeError, match="probe.adalora.lr"):
        run.finish_warmup()
