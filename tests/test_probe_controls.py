"""LoRA-Drop, gradient norm, SNIP and perturbation against slow references, over micro-batches and ranks."""

import pytest
import torch
from torch import distributed

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.probing.controls import ControlPass
from hybrid_lora_plugin.probing.distributed import Ranks, place
from hybrid_lora_plugin.probing.forward import IGNORED, negative_log_likelihood
from hybrid_lora_plugin.probing.layers import attach
from hybrid_lora_plugin.probing.measure import perturbation, prepare_scoring
from hybrid_lora_plugin.seeding import generator
from tests.support.served_ranks import run_ranks
from tests.support.tiny_probe import passes_of, ragged_batch, tiny_model

NAMES = ["lora_output", "gradient_norm", "snip"]


def probed_model(dtype=torch.float64, layers=2):
    """A model with trained-looking adapters, ready to score."""
    model = tiny_model(dtype, layers=layers)
    adapters = attach(model, find_candidates(model), rank=2, seed=0)
    rng = generator(0, "test")
    for layer in adapters.values():
        layer.B.data = 0.3 * torch.randn(layer.B.shape, generator=rng)
        layer.alpha.data = torch.rand(1, generator=rng) + 0.5
    model.to(dtype)
    prepare_scoring(model, adapters)
    return model, adapters


def measure(micro_batch_size=None, dtype=torch.float64, batch=None, sharded=False):
    model, adapters = probed_model(dtype)
    if sharded:
        own = [p for layer in adapters.values() for p in (layer.A, layer.B, layer.e, layer.alpha)]
        ranks = Ranks(torch.device("cpu"))
        place(model, find_candidates(tiny_model(layers=2)), own, ranks)
    return ControlPass(model, adapters, passes_of(model, micro_batch_size)).measure(batch or ragged_batch(rows=5))


def test_gradient_norm_and_snip_equal_autograd_on_unfrozen_weights():
    model, adapters = probed_model()
    batch = ragged_batch(rows=5)
    got = ControlPass(model, adapters, passes_of(model)).measure(batch)
    assert list(got) == NAMES and all(v.dtype == torch.float64 and v.shape == (14,) for v in got.values())
    assert all(p.grad is None for p in model.parameters())
    weights = [layer.base.weight.requires_grad_(True) for layer in adapters.values()]
    loss = negative_log_likelihood(model, batch) / batch.response_tokens
    gradients = torch.autograd.grad(loss, weights)
    assert got["gradient_norm"].tolist() == pytest.approx([g.norm().item() for g in gradients], rel=1e-10)
    expected = [(w * g).abs().sum().item() for w, g in zip(weights, gradients, strict=True)]
    assert got["snip"].tolist() == pytest.approx(expected, rel=1e-10)


def test_lora_output_sums_the_update_s_output_token_by_token_without_padding():
    model, adapters = probed_model()
    batch = ragged_batch(rows=5)
    assert (batch.attention_mask == 0).any()
    got = ControlPass(model, adapters, passes_of(model)).measure(batch)["lora_output"]
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in adapters.items()
    ]
    expected = dict.fromkeys(adapters, 0.0)
    for row in range(batch.rows):
        # One unpadded row at a time.
        length = int(batch.attention_mask[row].sum())
        with torch.no_grad():
            model(input_ids=batch.input_ids[row : row + 1, :length])
        for name, layer in adapters.items():
            update = (layer.alpha * (layer.A * layer.e) @ layer.B).detach()  # [d_in, d_out]
            for token in range(length):
                expected[name] += float((inputs[name][0, token] @ update).square().sum())
    for hook in hooks:
        hook.remove()
    assert got.tolist() == pytest.approx(list(expected.values()), rel=1e-10)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_micro_batches_change_nothing(micro_batch_size, dtype, tolerance):
    whole, parts = measure(None, dtype), measure(micro_batch_size, dtype)
    for name in NAMES:
        torch.testing.assert_close(parts[name], whole[name], rtol=tolerance, atol=0)


def test_a_row_without_response_tokens_still_counts_in_the_lora_output():
    batch = ragged_batch(rows=5)
    batch.labels[4] = IGNORED
    whole, parts = measure(None, batch=batch), measure(1, batch=batch)
    without = measure(None, batch=batch.take([0, 1, 2, 3]))
    assert (whole["lora_output"] > without["lora_output"]).all()
    for name in NAMES:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=0)


def test_an_exception_in_the_pass_leaves_no_hook_and_no_gradient(monkeypatch):
    model, adapters = probed_model()
    controls = ControlPass(model, adapters, passes_of(model, 1))
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return negative_log_likelihood(*arguments)

    batch = ragged_batch(rows=5)
    with monkeypatch.context() as patch:
        patch.setattr("hybrid_lora_plugin.probing.controls.negative_log_likelihood", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            controls.measure(batch)
    assert all(not layer._forward_hooks for layer in adapters.values())
    assert all(p.grad is None for p in model.parameters())
    again, fresh = controls.measure(batch), measure(1)
    assert all(torch.equal(again[name], fresh[name]) for name in NAMES)


def test_bfloat16_gradients_are_formed_in_float32():
    model, adapters = probed_model(torch.float32)
    for layer in adapters.values():
        layer.base.bfloat16()
    model.model.embed_tokens.bfloat16()
    model.lm_head.bfloat16()
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.bfloat16()
    got = ControlPass(model, adapters, passes_of(model, 2)).measure(ragged_batch(rows=5))
    exact = measure()
    for name in NAMES:
        torch.testing.assert_close(got[name], exact[name], rtol=0.1, atol=0)


def test_perturbation_is_the_loss_without_a_module_minus_the_loss():
    model, adapters = probed_model()
    batch = ragged_batch(rows=5)
    got = perturbation(adapters, passes_of(model, 2), batch)
    assert got.dtype == torch.float64 and all(layer.active for layer in adapters.values())

    def loss():
        with torch.no_grad():
            return (negative_log_likelihood(model, batch) / batch.response_tokens).item()

    whole, expected = loss(), []
    for layer in adapters.values():
        kept = layer.B.data
        layer.B.data = torch.zeros_like(kept)
        expected.append(loss() - whole)
        layer.B.data = kept
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-12)


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        measured = {(size, sharded): measure(size, sharded=sharded) for size in (None, 1) for sharded in (False, True)}
        torch.save(measured, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks_whole_or_sharded_give_what_one_gives(tmp_path):
    # Five rows on two ranks: in the last of three micro-batches the second rank has no row of its own.
    run_ranks(_one_of_two, (str(tmp_path),), 2)
    alone = measure()
    for rank in range(2):
        for together in torch.load(tmp_path / f"{rank}.pt").values():
            for name in NAMES:
                torch.testing.assert_close(together[name], alone[name], rtol=1e-10, atol=0)
