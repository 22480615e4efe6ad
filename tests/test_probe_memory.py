"""What bounds the memory of a probe changes memory, not what it measures."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from hybrid_lora_plugin.allocation.storage import load_allocation
from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.cli.probe import main
from hybrid_lora_plugin.probing.distributed import Ranks, decoder_layers
from hybrid_lora_plugin.probing.forward import Passes, negative_log_likelihood
from hybrid_lora_plugin.probing.in_memory import measure_in_memory
from hybrid_lora_plugin.probing.recompute import recompute_activations
from tests.support.tiny_models import sums, write_jsonl
from tests.support.tiny_probe import ragged_batch, tiny_model
from tests.test_probe_in_memory import ONE_A_METHOD, configured

CPU = torch.device("cpu")


PROBED = [criterion for method, criterion in ONE_A_METHOD.items() if method is not None]


@pytest.mark.parametrize("criterion", [*PROBED, "perturbation", "signal_to_noise"])
def test_every_method_measures_the_same_bits_with_activations_computed_again(criterion):
    config = configured(criterion, warmup_steps=10)

    def measured(again):
        model = tiny_model(torch.float32, layers=3)
        candidates = find_candidates(model)
        if again:
            recompute_activations(decoder_layers(model, candidates))
        return measure_in_memory(
            model, candidates, config, lambda step: ragged_batch(seed=step), lambda index: ragged_batch(seed=50 + index)
        )

    plain, again = measured(False), measured(True)
    assert plain.keys() == again.keys()
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []


def test_between_forward_and_backward_one_input_a_layer_is_held():
    def held(layers, again):
        model, batch, kept = tiny_model(torch.float32, layers=layers), ragged_batch(rows=8, length=40), {}
        if again:
            recompute_activations(decoder_layers(model, find_candidates(model)))
        # Weights are saved too; they are there anyway.
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = negative_log_likelihood(model, batch)
        loss.backward()
        return sum(kept.values())

    plain = held(6, False) - held(2, False)
    again = held(6, True) - held(2, True)
    assert 0 <= again < plain / 10, (again, plain)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [4, 9, 16, 40, 1000])
def test_rows_that_come_by_tokens_are_all_there_and_fit(size, tokens):
    batch = ragged_batch(rows=11, length=9)
    seen, counts = [], set()
    for rank in range(size):
        ranks = SimpleNamespace(rank=rank, size=size, device=CPU)
        micros = list(Passes(None, ranks, micro_batch_tokens=tokens).micro_batches(batch))
        assert [last for _, last in micros] == [False] * (len(micros) - 1) + [True]
        counts.add(len(micros))
        for micro, _ in micros:
            longest = int(micro.attention_mask.sum(dim=1).max())
            assert micro.input_ids.shape[1] == longest
            assert micro.rows == 1 or micro.rows * longest <= tokens
            seen += [row.tolist() for row in micro.labels if (row != -100).any()]
    assert len(counts) == 1, "a sharded model needs every rank in every pass"
    assert len(seen) == batch.rows
    wanted = sorted([label for label in row.tolist() if label != -100] for row in batch.labels)
    assert sorted([label for label in row if label != -100] for row in seen) == wanted
    if size == 1 and tokens == 1000:
        assert counts == {1}


def test_loss_and_gradient_do_not_depend_on_how_rows_are_grouped():
    model, batch = tiny_model(torch.float64, layers=2), ragged_batch(rows=7, length=9)
    parameters = list(model.parameters())

    def found(**given):
        for parameter in parameters:
            parameter.grad = None
        loss = Passes(model, Ranks(CPU), **given).backward(batch, parameters)
        return loss, copy.deepcopy([parameter.grad for parameter in parameters])

    loss, gradients = found(micro_batch_size=7)
    for given in ({"micro_batch_tokens": 9}, {"micro_batch_tokens": 20}, {"micro_batch_size": 2}):
        other, others = found(**given)
        assert other == pytest.approx(loss, rel=1e-12)
        for got, want in zip(others, gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_the_command_chooses_the_same_with_both(tiny_qwen2, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(40))
    given = [
        f"model.path={tiny_qwen2}", f"probe.files=[{rows}]", "probe.warmup_steps=6", "probe.partitions=4",
        "probe.batch_size=6", "probe.max_length=64", "probe.lr=5e-3", "lora.rank=2", "budget.ratio=0.3",
    ]  # fmt: skip
    assert main([*given, f"output_dir={tmp_path / 'plain'}"]) == 0
    both = ["probe.gradient_checkpointing=true", "probe.micro_batch_tokens=60"]
    assert main([*given, *both, f"output_dir={tmp_path / 'less'}"]) == 0
    plain, less = (load_allocation(tmp_path / name) for name in ("plain", "less"))
    assert plain.full_names == less.full_names
    for one, other in zip(plain.modules, less.modules, strict=True):
        assert other.score == pytest.approx(one.score, rel=1e-4)
    capsys.readouterr()
    assert main([*given, *both, "probe.micro_batch_size=2", f"output_dir={tmp_path / 'other'}"]) == 2
    assert "probe.micro_batch_size: 2 has no effect here" in capsys.readouterr().err
