"""The probe's arithmetic: Eq. 7, Algorithm 1 and the warm-up against slow float64 references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import AdapterConfig, ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.distributed import Ranks
from hybrid_lora_plugin.probing.forward import IGNORED, Batch, Passes, negative_log_likelihood
from hybrid_lora_plugin.probing.layers import SvdLoraLinear, attach, detach
from hybrid_lora_plugin.probing.measure import batch_sensitivities, draw_partition, prepare_scoring
from hybrid_lora_plugin.probing.methods.svd_lora import SvdLoraMethod, check_trained
from hybrid_lora_plugin.seeding import generator
from tests.support.tiny_models import tiny_qwen2_config

RANK = 3


def randomised(layer, seed=0):
    """Give all parameters of a layer values that no initialisation would."""
    rng = generator(seed, "test")
    for parameter in (layer.A, layer.B, layer.e, layer.alpha):
        parameter.data = torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter)
    return layer


def make_layer(dtype=torch.float64, seed=0):
    layer = randomised(SvdLoraLinear(nn.Linear(5, 4), RANK, generator(seed, "init")), seed).to(dtype)
    layer.base.requires_grad_(False)
    return layer


def tiny_model(dtype=torch.float64, seed=0, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_qwen2_config(40, **changes)).to(dtype)


def random_batch(rows=3, length=9, seed=0):
    rng = generator(seed, "batch")
    batch = Batch(
        torch.randint(0, 40, (rows, length), generator=rng),
        torch.ones(rows, length, dtype=torch.long),
        torch.full((rows, length), IGNORED),
    )
    for row in range(rows):
        start, end = 2 + row, length - row
        batch.labels[row, start:end] = batch.input_ids[row, start:end]
        batch.attention_mask[row, end:] = 0
    return batch


def passes_of(model, micro_batch_size=None):
    return Passes(model, Ranks(torch.device("cpu")), micro_batch_size)


def response_loss(model, batch):
    return negative_log_likelihood(model, batch) / batch.response_tokens


# ---------------------------------------------------------------------------------------------- Eq. 7


def test_branch_is_eq_7_component_by_component():
    layer = make_layer()
    x = torch.randn(2, 3, 5, generator=generator(1, "x"), dtype=torch.float64)
    got = layer(x).detach()
    for index in ((0, 0), (1, 2)):
        for o in range(4):
            value = sum(float(x[index][i] * layer.base.weight[o, i]) for i in range(5)) + float(layer.base.bias[o])
            for j in range(RANK):
                component = sum(float(x[index][i] * layer.A[i, j].detach()) for i in range(5))
                value += float((layer.alpha * layer.e[j] * layer.B[j, o]).detach()) * component
            assert float(got[index][o]) == pytest.approx(value, rel=1e-12)


def test_disabled_branch_leaves_the_base_output_exactly():
    layer = make_layer()
    x = torch.randn(2, 5, dtype=torch.float64)
    layer.active = False
    assert torch.equal(layer(x), layer.base(x))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_e_times_its_gradient_equals_the_same_sum_over_a_and_over_b(seed):
    layer = make_layer(seed=seed)
    x = torch.randn(6, 5, generator=generator(seed, "x"), dtype=torch.float64)
    layer(x).square().sum().backward()
    over_e = layer.e * layer.e.grad
    torch.testing.assert_close(over_e, (layer.A * layer.A.grad).sum(dim=0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(over_e, (layer.B * layer.B.grad).sum(dim=1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(over_e.sum()[None], layer.alpha * layer.alpha.grad, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_sensitivity_does_not_change_when_scale_moves_between_alpha_e_a_and_b(seed):
    layer = make_layer(seed=seed)
    x = torch.randn(6, 5, generator=generator(seed, "x"), dtype=torch.float64)

    def sensitivity():
        layer.zero_grad()
        layer(x).square().sum().backward()
        return (layer.e * layer.e.grad).detach().abs()

    before = sensitivity()
    a, b, c = (torch.rand(RANK, generator=generator(seed, name), dtype=torch.float64) + 0.5 for name in "abc")
    with torch.no_grad():
        layer.A.mul_(a)
        layer.B.mul_(b[:, None])
        layer.e.mul_(c[0] / (a * b))
        layer.alpha.div_(c[0])
    torch.testing.assert_close(sensitivity(), before, rtol=1e-9, atol=1e-12)


def test_initial_adapters_change_nothing_and_parameters_stay_float32_on_a_bfloat16_base():
    layer = SvdLoraLinear(nn.Linear(64, 8).bfloat16(), RANK, generator(0, "init"))
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == torch.bfloat16
    assert {p.dtype for p in (layer.A, layer.B, layer.e, layer.alpha)} == {torch.float32}
    assert layer.B.abs().max() == 0 and torch.equal(layer.e, torch.ones(RANK)) and layer.alpha == 1
    assert 0 < layer.A.abs().max() <= 1 / math.sqrt(64)


def test_detach_restores_the_very_modules_that_were_there():
    model = tiny_model()
    candidates = find_candidates(model)
    before = {c.name: model.get_submodule(c.name) for c in candidates}
    layers = attach(model, candidates, RANK, seed=0)
    assert list(layers) == [c.name for c in candidates]
    assert all(isinstance(model.get_submodule(c.name), SvdLoraLinear) for c in candidates)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{c.name}.{which}" for c in candidates for which in ("A", "B", "e", "alpha")
    }
    detach(model, layers)
    assert all(model.get_submodule(name) is module for name, module in before.items())


# ---------------------------------------------------------------------------------------------- loss and score


def reference_loss(model, batch):
    """One response token at a time, from the full logits."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
    terms = []
    for row in range(batch.labels.shape[0]):
        for position in range(1, batch.labels.shape[1]):
            label = int(batch.labels[row, position])
            if label != IGNORED:
                terms.append(-functional.log_softmax(logits[row, position - 1], dim=-1)[label])
    return torch.stack(terms).sum() / len(terms)


def test_loss_is_the_mean_over_response_tokens_of_the_whole_batch():
    model, batch = tiny_model(), random_batch()
    torch.testing.assert_close(response_loss(model, batch), reference_loss(model, batch), rtol=1e-9, atol=0)


def test_padding_does_not_change_the_loss():
    model, batch = tiny_model(), random_batch(rows=1)
    padded = Batch(
        *(
            functional.pad(t, (0, 4), value=v)
            for t, v in ((batch.input_ids, 0), (batch.attention_mask, 0), (batch.labels, IGNORED))
        )
    )
    torch.testing.assert_close(response_loss(model, padded), response_loss(model, batch))


def test_algorithm_1_agrees_with_two_separate_autograd_passes_in_float64():
    model, batch = tiny_model(), random_batch()
    layers = attach(model, find_candidates(model), RANK, seed=0)
    for index, layer in enumerate(layers.values()):
        randomised(layer, index).to(torch.float64)
    prepare_scoring(model, layers)
    bucket_a = draw_partition(0, 0, len(layers))
    got, loss = batch_sensitivities(layers, passes_of(model), batch, bucket_a)
    assert all(layer.active for layer in layers.values())

    es = [layer.e for layer in layers.values()]
    gradients, losses = [torch.zeros_like(e) for e in es], []
    for disabled in (True, False):
        for layer, in_a in zip(layers.values(), bucket_a.tolist(), strict=False):
            layer.active = in_a is not disabled
        value = reference_loss(model, batch)
        losses.append(float(value.detach()))
        for total, gradient in zip(gradients, torch.autograd.grad(value, es, allow_unused=True), strict=False):
            if gradient is not None:
                total += gradient
    want = [
        sum(abs(float((e[j] * g[j]).detach())) for j in range(RANK)) / RANK for e, g in zip(es, gradients, strict=False)
    ]
    # Qwen2 normalises in float32 whatever its weights are, which bounds the agreement.
    assert got.tolist() == pytest.approx(want, rel=1e-6)
    assert got.dtype == torch.float64 and loss == pytest.approx(sum(losses) / 2, rel=1e-9)


def test_masks_are_complementary_and_every_module_is_active_in_exactly_one_pass():
    model, batch = tiny_model(torch.float32), random_batch()
    layers = attach(model, find_candidates(model), RANK, seed=0)
    for layer in layers.values():
        randomised(layer)
    prepare_scoring(model, layers)
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append([layer.active for layer in layers.values()]))
    bucket_a = draw_partition(0, 3, len(layers))
    batch_sensitivities(layers, passes_of(model), batch, bucket_a)
    assert len(passes) == 2
    assert passes[0] == (~bucket_a).tolist() and passes[1] == bucket_a.tolist()
    assert all(first != second for first, second in zip(*passes, strict=False))


def test_a_bucket_that_holds_everything_still_scores_every_module():
    model, batch = tiny_model(torch.float32), random_batch()
    layers = attach(model, find_candidates(model), RANK, seed=0)
    for layer in layers.values():
        randomised(layer)
    prepare_scoring(model, layers)
    sensitivities, _ = batch_sensitivities(layers, passes_of(model), batch, torch.ones(len(layers), dtype=torch.bool))
    assert (sensitivities > 0).all()


def test_only_e_receives_a_gradient_while_scoring():
    model, batch = tiny_model(torch.float32), random_batch()
    layers = attach(model, find_candidates(model), RANK, seed=0)
    for layer in layers.values():
        randomised(layer)
    prepare_scoring(model, layers)
    batch_sensitivities(layers, passes_of(model), batch, draw_partition(0, 0, len(layers)))
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {"e"}
    assert not model.training


def test_partitions_follow_the_seed_and_are_fair():
    assert torch.equal(draw_partition(1, 2, 50), draw_partition(1, 2, 50))
    assert not torch.equal(draw_partition(1, 2, 50), draw_partition(1, 3, 50))
    assert not torch.equal(draw_partition(1, 2, 50), draw_partition(2, 2, 50))
    share = torch.stack([draw_partition(0, t, 196).double() for t in range(200)]).mean()
    assert abs(float(share) - 0.5) < 0.01


# ---------------------------------------------------------------------------------------------- warm-up


def make_run(model, **probe):
    config = ProbeCommandConfig(lora=AdapterConfig(rank=RANK), probe=ProbeConfig(**({"lr": 1e-2} | probe)))
    run = SvdLoraMethod(model, find_candidates(model), config)
    run.start(passes_of(model))
    return run


@pytest.mark.parametrize("init", ["default", "adalora"])
def test_warmup_learns_and_reloading_it_continues_bit_for_bit(init):
    def fresh():
        return make_run(tiny_model(torch.float32), init=init)

    def steps(run, count):
        return [run.warm_up(random_batch(), random_batch()) for _ in range(count)]

    straight = fresh()
    losses = steps(straight, 6)
    assert losses[-1] < losses[0] - (0.01 if init == "default" else 0)
    first, second = fresh(), fresh()
    steps(first, 3)
    second.load(first.step, {name: tensor.clone() for name, tensor in first.tensors().items()})
    assert steps(second, 3) == losses[3:]
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    check_trained(straight.layers)


def test_adalora_initialisation_has_its_own_rate_and_starts_from_a_zero_update():
    run = make_run(tiny_model(torch.float32), init="adalora")
    assert run.lr == 5e-4
    layers = list(run.layers.values())
    assert all(layer.e.abs().max() == 0 and layer.B.abs().max() > 0 for layer in layers)
    spread = torch.cat([layer.A.detach().flatten() for layer in layers]).std()
    assert float(spread) == pytest.approx(0.02, rel=0.05)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_norm_of_the_update_is_that_of_the_matrix_it_stands_for(seed):
    layer = make_layer(seed=seed)
    delta = float(layer.alpha.detach()) * (layer.A * layer.e) @ layer.B
    assert float(layer.delta_norm()) == pytest.approx(float(delta.detach().norm()), rel=1e-9)


# ---------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_change_neither_loss_nor_sensitivities(micro_batch_size):
    model, batch = tiny_model(), random_batch(rows=4, length=12)
    layers = attach(model, find_candidates(model), RANK, seed=0)
    for index, layer in enumerate(layers.values()):
        randomised(layer, index).to(torch.float64)
    prepare_scoring(model, layers)
    bucket_a = draw_partition(0, 0, len(layers))
    whole, whole_loss = batch_sensitivities(layers, passes_of(model), batch, bucket_a)
    parts, loss = batch_sensitivities(layers, passes_of(model, micro_batch_size), batch, bucket_a)
    # Rows are padded differently in each micro-batch, and Qwen2 normalises in float32.
    assert parts.tolist() == pytest.approx(whole.tolist(), rel=1e-5) and loss == pytest.approx(whole_loss, rel=1e-6)
    assert passes_of(model, micro_batch_size).loss(batch) == pytest.approx(passes_of(model).loss(batch), rel=1e-6)


def test_a_row_without_response_tokens_adds_nothing():
    model, batch = tiny_model(), random_batch(rows=1)
    batch.labels.fill_(IGNORED)
    loss = negative_log_likelihood(model, batch)
    loss.backward()
    assert float(loss.detach()) == 0 and all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_untrained_or_vanished_adapters_are_refused():
    model = tiny_model(torch.float32)
    layers = attach(model, find_candidates(model), RANK, seed=0)
    with pytest.raises(ProbeError, match=r"probe.warmup_steps: max\|B\| is 0"):
        check_trained(layers)
    for layer in layers.values():
        layer.B.data.fill_(1.0)
        layer.e.data.zero_()
    with pytest.raises(ProbeError, match=r"max\|e\| is 0"):
        check_trained(layers)
    next(iter(layers.values())).B.data.fill_(float("nan"))
    with pytest.raises(ProbeError, match="left nan in B"):
        check_trained(layers)


def test_a_loss_that_is_not_a_number_stops_the_warmup_with_its_step():
    model = tiny_model(torch.float32)
    run = make_run(model)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ProbeError, match="probe.lr: the loss is nan at warm-up step 1;"):
        run.warm_up(random_batch(), random_batch())
