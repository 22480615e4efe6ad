"""Our LoRA layer: PEFT's numbers, names and files, with one product for adapters that read the same input."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hybrid_lora_plugin.training.lora_linear import ADAPTER, LoraLinear, share_inputs

WIDTH, RANK, ALPHA = 12, 3, 6
OUT = {"q_proj": 12, "k_proj": 8, "v_proj": 8, "o_proj": 12}


class Attention(torch.nn.Module):
    """The four linear layers of an attention block, and something between them that no layer can undo."""

    def __init__(self):
        super().__init__()
        for name, out in OUT.items():
            self.add_module(name, torch.nn.Linear(WIDTH, out, bias=name != "o_proj"))

    def forward(self, x):
        gate = torch.cat([self.k_proj(x)[..., :6], self.v_proj(x)[..., :6]], -1)
        return self.o_proj(torch.tanh(self.q_proj(x)) * gate)


class Model(torch.nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def with_adapters(model, ours=True, dropout=0.0, targets=tuple(OUT)):
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(targets))
    if ours:
        config._register_custom_module({torch.nn.Linear: LoraLinear})
    adapted = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
    if ours:
        share_inputs(adapted)
    return adapted


def gradients(model, x, dtype=None):
    """Loss and the gradients of all that trains, and of the input."""
    x = x.clone().requires_grad_(True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = model(x).float().square().sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"input": x.grad}
    assert all(gradient is not None for gradient in found.values())
    return {"loss": loss.detach()} | found


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Model().double()


@pytest.fixture
def x():
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def assert_same(ours, wanted, **tolerance):
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("targets", [tuple(OUT), ("q_proj", "v_proj"), ("k_proj", "o_proj")], ids="-".join)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_and_gradients_are_pefts(plain, x, targets, checkpointed):
    ours, peft = with_adapters(plain, targets=targets), with_adapters(plain, ours=False, targets=targets)
    assert {type(m) for m in ours.modules() if isinstance(m, Linear)} == {LoraLinear}
    ours.base_model.model.checkpointed = checkpointed
    assert_same(gradients(ours, x), gradients(peft, x), rtol=1e-10, atol=1e-10)


def test_output_is_the_formula(plain, x):
    model = with_adapters(plain)
    layer = model.base_model.model.layers[0].q_proj
    weight = layer.base_layer.weight + ALPHA / RANK * layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
    wanted = torch.einsum("bsk,mk->bsm", x, weight) + layer.base_layer.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(x[0]), wanted[0], rtol=1e-10, atol=1e-10)
    assert layer(x.transpose(0, 1)).shape == (5, 2, OUT["q_proj"])


def test_dropout_draws_as_peft_does(plain, x):
    ours, peft = (with_adapters(plain, ours=which, dropout=0.5) for which in (True, False))
    found = []
    for model in (ours, peft):
        torch.manual_seed(5)
        found.append(gradients(model, x))
    assert_same(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_under_autocast_and_in_bf16_it_is_as_near_to_the_exact_as_peft(plain, x, held):
    exact = gradients(with_adapters(plain), x)
    cast = torch.bfloat16

    def apart(ours):
        found = gradients(with_adapters(plain, ours).to(held), x.to(held), cast)
        return {name: ((found[name].double() - exact[name]).norm() / exact[name].norm()).item() for name in exact}

    ours, peft = apart(True), apart(False)
    assert max(ours.values()) < max(0.05, 1.2 * max(peft.values()))


def test_adapters_that_read_one_input_share_one_product(plain, x):
    model, products = with_adapters(plain), Counter()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if function is torch.ops.aten.mm.default:
                products[result.shape[-1]] += 1
            return result

    with Products(), torch.no_grad():
        model(x)
    # q, k and v at once, and o alone; in two layers. o's base product has no bias either.
    assert products == {3 * RANK: 2, RANK: 2, OUT["o_proj"]: 2}


def test_nothing_of_a_call_is_kept(plain, x):
    model = with_adapters(plain)
    model(x)
    layer = model.base_model.model.layers[0]
    assert layer.q_proj.shared_input is layer.v_proj.shared_input and layer.o_proj.shared_input is None
    assert layer.q_proj.shared_input._input is None and not layer.q_proj.shared_input._parts
    broken = model.base_model.model.layers[1].v_proj
    broken.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(x)
    shared = broken.shared_input
    assert shared._input is None and not shared._parts


def test_weights_that_changed_between_two_calls_count(plain, x):
    model = with_adapters(plain)
    before = model(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.neg_()
    assert_same({"y": model(x)}, {"y": with_adapters_negated(plain)(x)}, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(x), before)


def with_adapters_negated(plain):
    peft = with_adapters(plain, ours=False)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_A." in name:
                parameter.neg_()
    return peft


def test_a_layer_called_alone_and_again_answers_for_the_input_it_is_given(plain, x):
    layer = with_adapters(plain).base_model.model.layers[0]
    wanted = with_adapters(plain, ours=False).base_model.model.layers[0]
    other = x + 1
    calls = (("q_proj", x), ("q_proj", x), ("k_proj", other), ("v_proj", x), ("k_proj", x), ("v_proj", other))
    for name, given in calls:
        torch.testing.assert_close(getattr(layer, name)(given), getattr(wanted, name)(given), rtol=1e-10, atol=1e-10)


def test_with_adapters_off_it_is_the_base(plain, x):
    model = with_adapters(plain)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))


def test_files_are_pefts_own_both_ways(plain, x, tmp_path):
    ours, peft = with_adapters(plain), with_adapters(plain, ours=False)
    assert list(ours.state_dict()) == list(peft.state_dict())
    assert all(torch.equal(tensor, peft.state_dict()[name]) for name, tensor in ours.state_dict().items())
    ours.save_pretrained(tmp_path / "ours")
    peft.save_pretrained(tmp_path / "peft")
    names = sorted(file.name for file in (tmp_path / "peft").iterdir())
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == names
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    torch.testing.assert_close(loaded(x), ours(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.merge_and_unload()(x), peft(x), rtol=1e-10, atol=1e-10)
