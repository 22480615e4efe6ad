"""Rates of fully tuned modules of their own: by type, and a warm-up."""

from __future__ import annotations

import pytest
import torch

from hybrid_lora_plugin.config import HybridLoraConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.training.full_rate import FullRate, factors_of

pytest.importorskip("verl", reason="verl is not installed")

from hybrid_lora_plugin import load_allocation  # noqa: E402
from hybrid_lora_plugin.verl_backend.optimizer_settings import OPTIMIZERS  # noqa: E402
from tests.support.allocations import make_allocation  # noqa: E402
from tests.support.full_rate_worker import STEPS  # noqa: E402
from tests.support.tiny_models import make_tiny_qwen2  # noqa: E402
from tests.support.verl_processes import run_engine  # noqa: E402

pytestmark = pytest.mark.verl

NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight", "m.self_attn.q_proj.bias"]
RATE = 0.05


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_move_is_that_of_a_scaled_rate(name):
    """For every optimizer that a run may have, decay and momentum included, over steps of a changing rate."""
    torch.manual_seed(0)
    start, target = ([torch.randn(3, 4, dtype=torch.float64) for _ in NAMES] for _ in range(2))
    given = {"weight_decay": 0.1} | ({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})
    scale, factors, steps = FullRate({"q_proj": 0.2}, 3, NAMES), (1.0, 0.2, 0.2), 5

    def train(rates_of, scaled):
        weights = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        groups = [{"params": [weight], "lr": 0.0} for weight in weights]
        optimizer = getattr(torch.optim, name)(groups, lr=RATE, **given)
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, rates_of(step), strict=True):
                group["lr"] = rate
            optimizer.zero_grad()
            sum(((w - t) ** 2 * (1 + step)).sum() for w, t in zip(weights, target, strict=True)).backward()
            before = [weight.detach().clone() for weight in weights]
            optimizer.step()
            if scaled:
                scale.scale(before, [weight.detach() for weight in weights], step)
        return weights

    ours = train(lambda step: [RATE] * 3, scaled=True)
    wanted = train(lambda step: [RATE * factor * min(1, (step + 1) / 3) for factor in factors], scaled=False)
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_without_factors_and_warm_up_nothing_is_touched():
    old, new = torch.zeros(2), torch.tensor([1e-8, 3.0])
    FullRate({}, 0, ["a.q_proj.weight"]).scale([old], [new], 0)
    assert new.tolist() == torch.tensor([1e-8, 3.0]).tolist()


@pytest.mark.parametrize("entries", (["q_proj"], ["q_proj:0"], ["q_proj:-1"], ["q_proj:x"], ["q_proj:1.2.3"],
                                     [":0.1"], ["q_proj:0.1", "q_proj:0.2"], ["q_proj:inf"]))  # fmt: skip
def test_what_is_no_factor_is_refused_by_its_option(entries):
    with pytest.raises(ConfigurationError, match=r"hybrid_lora.full_lr_factors: .+ give each type of module once"):
        validate(HybridLoraConfig(full_lr_factors=entries), "hybrid_lora.")


def test_a_type_that_is_not_fully_tuned_is_refused_with_those_that_are():
    given = factors_of(["q_proj:0.1", "o_proj:2e-1"])
    assert given == {"q_proj": 0.1, "o_proj": 0.2}
    with pytest.raises(ConfigurationError, match="'o_proj' is no type .+ give some of q_proj, up_proj"):
        FullRate(given, 0, NAMES)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rates")
    model = make_tiny_qwen2(folder / "model", layers=3)
    return folder, model, make_allocation(model, folder / "allocation", ratio=0.3)


@pytest.fixture(scope="module")
def result(setting):
    folder, model, allocation = setting
    worker = "tests/support/full_rate_worker.py"
    return run_engine(folder / "run", 2, worker=worker, model=model, allocation=allocation)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_the_engine_moves_each_type_at_its_own_rate(result, setting, strategy):
    modules = load_allocation(setting[2]).full_names
    assert any(name.endswith(".down_proj") for name in modules) and len(modules) > 1

    def moved(name, step):
        before, after = (result[f"{strategy}, {name}, {number}"] for number in (step - 1, step))
        return {key: after[key] - before[key] for key in after}

    full = {key for key in result[f"{strategy}, plain, 0"] if plain_name(key).rpartition(".")[0] in modules}
    plain, factors, warmed = (moved(name, 1) for name in ("plain", "factors", "warm-up"))
    for key, change in plain.items():
        rate = 0.25 if key in full and ".down_proj." in key else 1.0
        torch.testing.assert_close(factors[key], rate * change, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(warmed[key], rate * (change / 4 if key in full else change), rtol=1e-3, atol=1e-7)
    # The update that is logged is the one that was made.
    logged = result[f"{strategy}, warm-up"][0]["update_norm_full"]
    assert logged == pytest.approx(torch.cat([warmed[name].flatten() for name in full]).norm().item(), rel=1e-4)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_the_rates_that_act_are_logged(result, strategy):
    rates = [{key: step[key] for key in step if key.startswith("lr_")} for step in result[f"{strategy}, warm-up"]]
    assert len(rates) == STEPS
    for number, seen in enumerate(rates):
        full = 1e-3 * (number + 1) / 4
        assert seen == {"lr_lora": 1e-2, "lr_full": pytest.approx(full), "lr_full_down_proj": pytest.approx(full / 4)}
