"""``lookahead`` against a slow reference on plain weights, over micro-batches and groups, and what it leaves behind."""

import pytest
import torch

from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.forward import negative_log_likelihood
from hybrid_lora_plugin.probing.methods import lookahead
from hybrid_lora_plugin.probing.methods.lookahead import LookaheadMethod, groups_of, other_half
from tests.support.tiny_probe import begin, ragged_batch, tiny_model

BATCHES = 5


def batch_of(index):
    return ragged_batch(rows=3, seed=20 + index)


def configured(per_batch=1, **options):
    config = ProbeCommandConfig(criterion="lookahead")
    config.probe.partitions, config.probe.partitions_per_batch = BATCHES * per_batch, per_batch
    config.probe.warmup_steps, config.probe.lr = 2, 1e-2
    config.probe.lookahead.steps, config.probe.lookahead.lr = 10, 1e-3
    for name, value in options.items():
        setattr(config.probe.lookahead, name, value)
    return config


def warmed_up(config=None, **settings):
    run, model = begin(LookaheadMethod, config or configured(), layers=2, **settings)
    for step in range(2):
        run.warm_up(ragged_batch(seed=step), None)
    run.finish_warmup()
    run.begin_scoring(batch_of)
    return run, model


def scored(run):
    rows = [run.score(row, batch_of(row)) for row in range(BATCHES)]
    return torch.stack([measured["lookahead"] for measured, _ in rows])


def plain_with_adapters(run):
    """A model of plain weights W + ΔW that computes what the warmed-up one does: name -> base weight, and the model."""
    plain = tiny_model(layers=2)
    for name, layer in run.layers.items():
        update = layer.alpha * (layer.A * layer.e) @ layer.B  # [d_in, d_out]
        plain.get_submodule(name).weight.data += update.detach().T
    return plain


def reference(run, length):
    """One module and one batch at a time, with autograd on unfrozen weights."""

    def loss(batch):
        return negative_log_likelihood(plain, batch) / batch.response_tokens

    plain, rows = plain_with_adapters(run), []
    for index in range(BATCHES):
        # Three of the five batches are in the second half.
        half = (2, 3, 4) if index < 2 else (0, 1)
        gradients = {name: 0.0 for name in run.layers}
        for other in half:
            weights = [plain.get_submodule(name).weight for name in run.layers]
            found = torch.autograd.grad(loss(batch_of(other)), weights)
            for name, gradient in zip(run.layers, found, strict=True):
                gradients[name] = gradients[name] + gradient
        row = []
        with torch.no_grad():
            before = loss(batch_of(index)).item()
            for name in run.layers:
                weight = plain.get_submodule(name).weight
                kept = weight.data.clone()
                weight.data -= length * gradients[name].sign()
                row.append(before - loss(batch_of(index)).item())
                weight.data = kept
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("limit", [lookahead.SUMMED_BYTES, 1], ids=["one group", "a module a group"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_loss_saved_is_that_of_plain_weights_moved_by_the_sign_of_the_other_half(monkeypatch, micro_batch_size, limit):
    monkeypatch.setattr(lookahead, "SUMMED_BYTES", limit)
    run, _ = warmed_up(micro_batch_size=micro_batch_size)
    expected = reference(run, 10 * 1e-3)
    assert (expected > 0).any() and expected.abs().min() > 1e-9
    torch.testing.assert_close(scored(run), expected, rtol=1e-7, atol=1e-12)


def test_each_batch_is_measured_by_the_half_that_it_is_not_in():
    for batches in (2, 3, 8):
        halves = [other_half(index, batches) for index in range(batches)]
        assert all(index not in half and len(half) >= batches // 2 for index, half in enumerate(halves))
        assert len(set(halves)) == 2


def test_weights_are_put_back_bit_for_bit_and_the_rest_is_measured_as_without():
    config = configured()
    run, model = warmed_up(config, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured, loss = run.score(0, batch_of(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not name.endswith(".e"))
    assert [name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad] == ["e"] * 14
    plain, _ = warmed_up(config, dtype=torch.float32)
    alone, loss_alone = super(LookaheadMethod, plain).score(0, batch_of(0))
    assert loss == loss_alone and all(torch.equal(measured[name], values) for name, values in alone.items())
    # A second measurement finds everything as the first did.
    again, _ = run.score(0, batch_of(0))
    assert all(torch.equal(measured[name], values) for name, values in again.items())


def test_an_exception_in_a_pass_puts_the_weight_back_and_leaves_no_hook(monkeypatch):
    run, model = warmed_up()
    run.score(0, batch_of(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def failing(batch):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return 1.0

    monkeypatch.setattr(run._passes, "loss", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.score(0, batch_of(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not layer._forward_hooks for layer in run.layers.values())


def test_it_is_measured_once_a_batch():
    run, _ = warmed_up(configured(per_batch=2))
    assert ["lookahead" in run.score(row, batch_of(row // 2))[0] for row in range(4)] == [True, False, True, False]
    assert run._batches == BATCHES


def test_a_step_that_the_dtype_loses_is_refused():
    run, model = warmed_up(configured(steps=1, lr=1e-20), dtype=torch.float32)
    with pytest.raises(ProbeError, match="probe.lookahead.steps: no weight moves.* 1e-20 is lost in torch.float32"):
        run.score(0, batch_of(0))


def test_bfloat16_moves_to_where_a_forward_pass_would_see_float32_weights():
    weight = torch.tensor([[1.0, 0.01, -0.01, 0.5]]).bfloat16()
    before = weight.float()
    sign = torch.tensor([[1, 1, -1, 0]], dtype=torch.int8)
    with lookahead._moved(torch.nn.Parameter(weight, requires_grad=False), sign, 1e-3):
        # The grid at 1 is wider than twice the step.
        assert weight.tolist() == (before - 1e-3 * sign).bfloat16().tolist()
        assert weight[0, 0] == 1 and weight[0, 1] < 0.0092
    assert torch.equal(weight.float(), before)


def test_groups_are_consecutive_whole_and_within_the_limit():
    run, _ = warmed_up()
    layers = list(run.layers.values())
    sizes = [4 * layer.base.weight.numel() for layer in layers]
    for limit in (1, max(sizes), 3 * max(sizes), sum(sizes)):
        groups = list(groups_of(layers, limit))
        assert [index for group in groups for index in group] == list(range(14))
        assert all(len(group) == 1 or sum(sizes[index] for index in group) <= limit for group in groups)
    assert len(list(groups_of(layers, sum(sizes)))) == 1


def test_the_distance_is_steps_times_rate_and_null_has_a_number():
    config = ProbeCommandConfig()
    assert config.probe.lookahead.length == pytest.approx(100 * 1e-6)
    assert configured(steps=7).probe.lookahead.length == pytest.approx(7e-3)
