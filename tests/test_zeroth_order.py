"""Zeroth order on frozen weights: the direction, the slope along it, and moves that can be made again bit for bit."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.training.zeroth_order.move_log import MoveLog, replayed
from hybrid_lora_plugin.training.zeroth_order.signs import signs
from hybrid_lora_plugin.training.zeroth_order.two_point import direction_seed, mean_over_ranks, two_point_step
from hybrid_lora_plugin.training.zeroth_order.weights import Move, PerturbedWeights
from tests.support.allocations import make_allocation

NAME = "model.layers.0.mlp.up_proj.weight"


def slow_sign(seed: int, name: str, index: int) -> float:
    """One sign, with Python's whole numbers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()

    def mixed(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    word = index // 16
    x = mixed(word % 2**32 ^ int.from_bytes(digest[:4], "big"))
    x = mixed(x ^ word >> 32 ^ int.from_bytes(digest[4:8], "big"))
    return -1.0 if x >> 16 + index % 16 & 1 else 1.0


# -- the direction ----------------------------------------------------------------------------------------------------


def test_signs_are_those_of_the_slow_hash_wherever_a_part_begins():
    # The last one passes 32 bits of words.
    for first in (0, 1, 15, 16, 17, 1000, 2**31 - 3, 2**36 - 5, 2**36 + 7):
        for seed, name in ((0, NAME), (2**48 - 1, "b")):
            found = signs(seed, name, first, 40)
            assert found.dtype == torch.float32
            assert found.tolist() == [slow_sign(seed, name, first + at) for at in range(40)]
    assert signs(0, NAME, 3, 0).shape == (0,)


def test_any_part_of_a_tensor_has_the_signs_of_the_whole():
    all_of_it = signs(5, NAME, 0, 10_007)
    for first, count in ((0, 1), (1, 10_006), (33, 500), (9_999, 8)):
        assert torch.equal(signs(5, NAME, first, count), all_of_it[first : first + count])


def test_signs_are_balanced_and_depend_on_seed_name_and_index():
    n = 1 << 18
    ones = [signs(seed, name, 0, n) for seed in (0, 1, 2) for name in (NAME, NAME.replace("0", "1"))]
    limit = 4.5 / math.sqrt(n)
    for at, one in enumerate(ones):
        assert one.abs().eq(1).all() and abs(one.mean()) < limit
        for shift in (1, 2, 15, 16, 17, 32, 64, 4096):
            assert abs((one[shift:] * one[:-shift]).mean()) < limit * 1.1
        for other in ones[:at]:
            assert abs((one * other).mean()) < limit
    # Each of the sixteen signs of a hash.
    assert ones[0].view(-1, 16).mean(0).abs().max() < 4 * limit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_makes_the_same_signs_and_the_same_moves():
    assert torch.equal(signs(5, NAME, 77, 1 << 20, "cuda").cpu(), signs(5, NAME, 77, 1 << 20))
    values = torch.randn(300, 70)
    moves = [Move(0, 3, 0.123456789, 1e-2), Move(1, 4, -7.7, 1e-3)]
    found = []
    for device in ("cpu", "cuda"):
        held = values.to(device, torch.bfloat16)
        weights = PerturbedWeights([(NAME, held)], 1e-3)
        weights.move(moves)
        weights.perturb(9, -1)
        found.append((weights.masters[NAME].cpu(), held.cpu()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_directions_of_a_run_have_seeds_of_their_own():
    seeds = {direction_seed(seed, step, number) for seed in range(4) for step in range(50) for number in range(8)}
    assert len(seeds) == 1600 and max(seeds) < 2**48
    assert direction_seed(1, 2, 3) == direction_seed(1, 2, 3)


# -- the slope --------------------------------------------------------------------------------------------------------


def language_model(folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    ids = torch.randint(0, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))

    def loss():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits.double(), ids[:, 1:].flatten())

    return model, loss


def slopes_and_projections(folder, dtype, epsilon, count=24):
    """c along ``count`` directions in ``dtype``, and the float64 gradient's projection onto them."""
    exact, loss = language_model(folder, torch.float64)
    named = [(name, p.requires_grad_(True)) for name, p in exact.named_parameters() if p.ndim == 2]
    gradients = torch.autograd.grad(loss(), [p for _, p in named])
    model, measured = language_model(folder, dtype)
    weights = PerturbedWeights([(name, p) for name, p in model.named_parameters() if p.ndim == 2], epsilon)
    slopes, projections = [], []
    for step in range(count):
        done = two_point_step(weights, lambda: measured().item(), seed=1, step=step, rate=0.0)
        slopes.append(done.moves[0].slope)
        z = done.moves[0].seed
        projections.append(
            sum(
                (signs(z, name, 0, p.numel()).double() @ gradient.flatten()).item()
                for (name, p), gradient in zip(named, gradients, strict=True)
            )
        )
    return torch.tensor(slopes, dtype=torch.float64), torch.tensor(projections, dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "epsilon", "correlation", "slope"),
    [
        (torch.float64, 1e-4, 0.999999, 1e-4),
        (torch.float32, 1e-3, 0.9999, 0.01),
        (torch.bfloat16, 3e-4, 0.95, 0.15),
        (torch.bfloat16, 2e-3, 0.999, 0.05),
    ],
)
def test_c_is_the_projection_of_the_exact_gradient(tiny_qwen2, dtype, epsilon, correlation, slope):
    slopes, projections = slopes_and_projections(tiny_qwen2, dtype, epsilon)
    found = torch.corrcoef(torch.stack([slopes, projections]))[0, 1].item()
    regression = (slopes @ projections / projections.square().sum()).item()
    print(f"{dtype} {epsilon:g}: correlation {found:.6f}, slope {regression:.4f}")
    assert found >= correlation and abs(regression - 1) < slope


def test_the_mean_of_c_z_is_the_gradient():
    """E[c z] = ∇f, by a Monte Carlo estimate against autograd in float64."""
    generator = torch.Generator().manual_seed(0)
    parameters = {"a.weight": torch.randn(3, 4, generator=generator, dtype=torch.float64), "b": torch.ones(5).double()}
    target = torch.randn(3, generator=generator, dtype=torch.float64)

    def f():
        hidden = torch.tanh(parameters["a.weight"] @ parameters["b"][:4])
        return (hidden - target).square().sum() + parameters["b"].pow(4).mean()

    for parameter in parameters.values():
        parameter.requires_grad_(True)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(f(), list(parameters.values()))])
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in parameters.items()}
    weights = PerturbedWeights(parameters.items(), 1e-5)
    trials, k = 1500, 2
    estimates = torch.empty(trials, exact.numel(), dtype=torch.float64)
    for step in range(trials):
        done = two_point_step(weights, lambda: f().item(), seed=11, step=step, rate=0.0, directions=k)
        total = torch.zeros_like(exact)
        for move in done.moves:
            z = torch.cat([signs(move.seed, name, 0, p.numel()) for name, p in parameters.items()])
            total += move.slope * z.double() / k
        estimates[step] = total
    error = estimates.std(0) / math.sqrt(trials)
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all()
    assert (estimates.mean(0) - exact).norm() < 0.2 * exact.norm()
    # K directions at one point: the variance of one is the squared norm of the others' slopes, by K.
    expected = (exact.square().sum() - exact.square()) / k
    torch.testing.assert_close(estimates.var(0), expected, rtol=0.2, atol=0.02)
    assert all(torch.equal(p, before[name]) for name, p in parameters.items()), "a rate of 0 moves nothing"


# -- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_in", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_moves_the_masters_by_the_mean_of_its_directions_and_writes_them_afresh(held_in):
    held = torch.randn(40, 33, generator=torch.Generator().manual_seed(1)).to(held_in)
    begun, seen = held.clone(), []
    weights = PerturbedWeights([("base_model.model.w.base_layer.weight", held)], 1e-3)
    assert list(weights.masters) == ["w.weight"] and weights.bytes == 4 * held.numel()
    losses = iter([2.0, 1.0, 0.5, 1.0])

    def measure():
        seen.append(held.clone())
        return next(losses)

    done = two_point_step(weights, measure, seed=3, step=5, rate=1e-2, directions=2)
    assert [m.slope for m in done.moves] == pytest.approx([500.0, -250.0])
    assert done.mean_slope == pytest.approx(125.0) and done.slope_rms == pytest.approx(395.2847)
    expected = begun.float()
    for number, move in enumerate(done.moves):
        z = torch.tensor([slow_sign(direction_seed(3, 5, number), "w.weight", at) for at in range(held.numel())])
        z = z.view_as(held)
        assert torch.equal(seen[2 * number], (begun.float() + 1e-3 * z).to(held_in))
        assert torch.equal(seen[2 * number + 1], (begun.float() - 1e-3 * z).to(held_in))
        expected = expected - torch.tensor(1e-2 / 2 * move.slope, dtype=torch.float64).float() * z
    assert torch.equal(weights.masters["w.weight"].view_as(held), expected)
    assert torch.equal(held, expected.to(held_in))


def test_a_hundred_measurements_change_no_bit_of_bfloat16():
    held = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    begun, weights = held.clone(), PerturbedWeights([("w", held)], 1e-3)
    for step in range(100):
        two_point_step(weights, lambda: 1.0, seed=0, step=step, rate=1.0)
    assert torch.equal(held, begun)


def test_moves_too_small_for_bfloat16_add_up_in_the_masters():
    held = torch.ones(16, 16).bfloat16()
    weights = PerturbedWeights([("w", held)], 1e-3)
    z = signs(4, "w", 0, held.numel()).view_as(held)
    for _ in range(40):
        weights.move([Move(0, 4, 1.0, 2e-4)])
        weights.restore()
    torch.testing.assert_close(held.float(), (1 - 8e-3 * z).bfloat16().float(), rtol=0, atol=0)
    assert not torch.equal(held, torch.ones_like(held))


def test_a_slope_that_is_no_number_moves_nothing_and_is_counted():
    held = torch.ones(4, 4)
    weights = PerturbedWeights([("w", held)], 1e-3)
    losses = iter([1.0, math.nan, 2.0, 1.0, math.inf, 1.0, 1e300, -1e300])
    done = two_point_step(weights, lambda: next(losses), seed=0, step=0, rate=1e-4, directions=4)
    assert done.skipped == 3 and [m.seed for m in done.moves] == [direction_seed(0, 0, 1)]
    assert held.isfinite().all() and not torch.equal(held, torch.ones(4, 4))


def test_what_is_held_is_put_back_when_a_measurement_fails():
    held = torch.randn(8, 8).bfloat16()
    begun, weights = held.clone(), PerturbedWeights([("w", held)], 1e-3)

    def failing():
        assert not torch.equal(held, begun)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        two_point_step(weights, failing, seed=0, step=0, rate=1.0)
    assert torch.equal(held, begun)


def test_a_mean_weighs_the_ranks_by_what_they_have():
    assert mean_over_ranks(6.0, 4.0) == 1.5 and math.isnan(mean_over_ranks(0.0, 0.0))


@pytest.mark.parametrize(
    ("tensor", "epsilon", "said"),
    [
        (torch.ones(2).bfloat16(), 2e-4, "epsilon is 0.0002 with weights in bfloat16"),
        (torch.ones(2).half(), 2.9e-4, "epsilon is 0.00029 with weights in float16"),
        (torch.ones(2), 0.0, "epsilon is 0; give a number above 0"),
        (torch.ones(2), math.inf, "epsilon is inf"),
        (torch.ones(2, dtype=torch.int8), 1e-3, "w is held in int8, wanted one of float32"),
        (torch.ones(2).to(torch.float8_e4m3fn), 1e-3, "w is held in float8_e4m3fn"),
        (torch.ones(2, 3).T, 1e-3, "w is not contiguous in memory"),
    ],
)
def test_weights_that_cannot_be_moved_are_refused_by_name(tensor, epsilon, said):
    with pytest.raises(ConfigurationError, match=said):
        PerturbedWeights([("w", tensor)], epsilon)
    PerturbedWeights([("w", torch.ones(2).bfloat16())], 3e-4)
    PerturbedWeights([("w", torch.ones(2))], 1e-7)
    with pytest.raises(ConfigurationError, match="no frozen weight is named"):
        PerturbedWeights([], 1e-3)


# -- the log ----------------------------------------------------------------------------------------------------------


def test_a_log_read_back_makes_the_same_weights(tmp_path):
    base = {"a": torch.randn(9, 7).bfloat16(), "b": torch.randn(5)}
    held = {name: value.clone() for name, value in base.items()}
    weights = PerturbedWeights(held.items(), 1e-3)
    log, losses = MoveLog.of(weights), iter(torch.randn(40, dtype=torch.float64).tolist())
    for step in range(10):
        log.add(two_point_step(weights, lambda: next(losses), seed=1, step=step, rate=0.1 / 3, directions=2).moves)
    log.save(tmp_path / "log.json")
    read = MoveLog.load(tmp_path / "log.json")
    assert read == log and len(read.moves) == 20 and read.steps == 10 and not list(tmp_path.glob("*.tmp"))
    found = replayed(read, base)
    for name, master in weights.masters.items():
        assert torch.equal(found[name].flatten(), master) and found[name].shape == base[name].shape
        assert not torch.equal(found[name], base[name].float())
    # A wider type holds the same values; in another order, or with one move less, they are others.
    wider = replayed(read, {name: value.float() for name, value in base.items()})
    assert all(torch.equal(wider[name], found[name]) for name in base)
    read.moves.pop()
    assert not torch.equal(replayed(read, base)["a"], found["a"])


def test_a_log_is_refused_on_another_model_and_when_it_was_changed(tmp_path):
    base = {"a": torch.ones(4, 3)}
    log = MoveLog.of(PerturbedWeights(base.items(), 1e-3))
    log.add([Move(1, 2, 0.5, 1e-3)])
    for other, said in (
        ({"a": torch.ones(3, 4)}, r"a is \(3, 4\) in this model and \(4, 3\) in the log"),
        ({"b": torch.ones(4, 3)}, "a is absent in this model"),
        ({"a": torch.ones(4, 3), "b": torch.ones(1)}, r"b is \(1,\) in this model and absent in the log"),
        ({"a": torch.ones(4, 3).bfloat16()}, "a is held in bfloat16 here and was in float32"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            replayed(log, other)
    log.save(tmp_path / "log.json")
    content = json.loads((tmp_path / "log.json").read_text())
    for changed in (
        content | {"schema_version": 1},
        {name: value for name, value in content.items() if name != "steps"},
        content | {"moves": [[1, 2, 0.5]]},
        content | {"moves": [[1, 2, True, 1e-3]]},
        content | {"moves": [[1, -2, 0.5, 1e-3]]},
        content | {"parameters": {"a": {"shape": [4, 3], "dtype": "int4"}}},
        [],
    ):
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigurationError, match="changed.json is no log of moves .*; give an unchanged file"):
            MoveLog.load(tmp_path / "changed.json")
    with pytest.raises(ConfigurationError, match="nowhere.json cannot be read"):
        MoveLog.load(tmp_path / "nowhere.json")


@pytest.fixture(scope="module")
def ranks_run(tmp_path_factory, tiny_qwen2):
    """What one, two and four ranks of FSDP2 came to: folder and base model."""
    pytest.importorskip("verl", reason="the ranks are forked from a process that has imported verl")
    from tests.support.verl_processes import ranks

    out = tmp_path_factory.mktemp("zeroth-order")
    arguments = {"model": str(tiny_qwen2), "out": str(out)}
    arguments["allocation"] = str(make_allocation(tiny_qwen2, out / "allocation"))
    (out / "arguments.json").write_text(json.dumps(arguments))
    for count in (1, 2, 4):
        ranks(count, ["tests/support/zeroth_order_worker.py", str(out / "arguments.json")], timeout=120)
    return out, tiny_qwen2


@pytest.mark.verl
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_log_gives_the_weights_of_any_number_of_ranks_bit_for_bit(ranks_run, dtype, count):
    out, model = ranks_run
    found = load_file(out / f"{dtype}-{count}.safetensors")
    log, one = MoveLog.load(out / f"{dtype}-{count}.json"), MoveLog.load(out / f"{dtype}-1.json")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).state_dict()
    base = {name: base[name] for name in log.shapes}
    assert len(log.moves) == 6 and "model.embed_tokens.weight" in base and len(base) > 4
    whole, of_one = replayed(log, base), replayed(one, base)
    for name in base:
        assert torch.equal(found[f"master/{name}"], whole[name]), name
        assert torch.equal(found[f"held/{name}"], whole[name].to(base[name].dtype)), name
        # The log of one rank, replayed on these ranks.
        assert torch.equal(found[f"replayed/{name}"], of_one[name]), name
    # Along the same directions all measure the same slopes, but for the order of sums.
    assert [m.seed for m in log.moves] == [m.seed for m in one.moves]
    assert [m.slope for m in log.moves] == pytest.approx([m.slope for m in one.moves], rel=2e-2, abs=2e-3)
