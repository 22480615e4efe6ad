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

from hybrid_lora_plugin.names import ADAPTER
from hybrid_lora_plugin.training.lora_linear import LoraLinear, share_inputs

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
    """Layers, recomputed for the backward pass where ``checkpointed`` is not None: whether by reentrant checkpoints."""

    checkpointed: bool | None = None

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.checkpointed is None else checkpoint(layer, x, use_reentrant=self.checkpointed)
        return x


def with_adapters(model, ours=True, targets=tuple(OUT), **changes):
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), **changes)
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
@pytest.mark.parametrize("checkpointed", [None, False, True])
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
    ours, peft = (with_adapters(plain, ours=which, lora_dropout=0.5) for which in (True, False))
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
    assert all(ours[name] < 1.2 * peft[name] + 0.02 for name in exact), (ours, peft)


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


def kept(model):
    """What the sets of adapters that share an input hold, and the adapters that believe to be in a call."""
    sets = {hook.__self__ for module in model.modules() for hook in module._forward_pre_hooks.values()}
    assert len(sets) == 2 and all(len(one.members) == 3 for one in sets)
    inside = [m for m in model.modules() if getattr(m, "shared_input", None) is not None]
    return [one for one in sets if one._of is not None or one._parts], inside


def test_nothing_of_a_call_is_kept(plain, x):
    model = with_adapters(plain)
    gradients(model, x)
    assert kept(model) == ([], [])
    model.base_model.model.layers[1].v_proj.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert kept(model) == ([], [])


def test_a_copy_shares_with_itself_alone(plain, x):
    model = with_adapters(plain)
    copied = copy.deepcopy(model)
    wanted = gradients(model, x)
    model.zero_grad()
    assert_same(gradients(copied, x), wanted, rtol=0, atol=0)
    assert kept(copied) == kept(model) == ([], [])
    assert all(p.grad is None for p in model.parameters())


def changed(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.neg_()


def test_a_layer_called_alone_answers_for_the_input_and_the_weights_it_has(plain, x):
    ours, peft = with_adapters(plain), with_adapters(plain, ours=False)
    layer, wanted = ours.base_model.model.layers[0], peft.base_model.model.layers[0]

    def compare(*calls):
        for name, given in calls:
            torch.testing.assert_close(getattr(layer, name)(given), getattr(wanted, name)(given))

    other = x + 1
    compare(("q_proj", x), ("q_proj", x), ("k_proj", other), ("v_proj", x), ("k_proj", x), ("v_proj", other))
    changed(ours), changed(peft)
    compare(("k_proj", x), ("v_proj", x))
    with torch.no_grad():
        layer.q_proj(x)
    layer.k_proj(x).sum().backward()
    assert layer.k_proj.lora_A[ADAPTER].weight.grad is not None


class Restless(Attention):
    """Calls a layer twice, first without gradients, and changes the tensor it calls them with where nobody needs it."""

    def forward(self, x):
        x = x.clone()
        with torch.no_grad():
            first = self.q_proj(x)
        gate = self.k_proj(x)[..., :6]
        first = first + self.q_proj(x) * self.q_proj(x)
        if not torch.is_grad_enabled():
            x.add_(1)
        return self.o_proj(first * torch.cat([gate, self.v_proj(x)[..., :6]], -1))


def test_within_a_call_too_each_answers_for_what_it_is_given(x):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Restless().double())
    ours, peft = with_adapters(model), with_adapters(model, ours=False)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peft(x))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), peft(x))
    assert_same(gradients(ours, x), gradients(peft, x))


def test_adapters_of_different_widths_do_not_share(x):
    class Cross(Attention):
        def __init__(self):
            super().__init__()
            self.k_proj = torch.nn.Linear(5, 8)
            self.v_proj = torch.nn.Linear(5, 8)

        def forward(self, x):
            gate = torch.cat([self.k_proj(x[..., :5])[..., :6], self.v_proj(x[..., :5])[..., :6]], -1)
            return self.o_proj(self.q_proj(x) * gate)

    torch.manual_seed(0)
    model = torch.nn.Sequential(Cross().double())
    assert_same(gradients(with_adapters(model), x), gradients(with_adapters(model, ours=False), x))


def test_adapters_that_are_merged_switched_or_of_another_kind_are_pefts_affair(plain, x):
    ours, peft = with_adapters(plain), with_adapters(plain, ours=False)
    for model in (ours, peft):
        model.merge_adapter()
    torch.testing.assert_close(ours(x), peft(x))
    for model in (ours, peft):
        model.unmerge_adapter()
        torch.manual_seed(7)
        model.add_adapter("other", LoraConfig(r=RANK, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter("other")
    torch.testing.assert_close(ours(x), peft(x))
    for model in (ours, peft):
        model.base_model.set_adapter([ADAPTER, "other"])
    torch.testing.assert_close(ours(x), peft(x))
    dora = [with_adapters(plain, which, use_dora=True) for which in (True, False)]
    torch.testing.assert_close(dora[0](x), dora[1](x))
    biased = [with_adapters(plain, which, lora_bias=True, targets=("q_proj", "k_proj")) for which in (True, False)]
    for model in biased:
        for name, parameter in model.named_parameters():
            if name.endswith(f"lora_B.{ADAPTER}.bias"):
                torch.nn.init.ones_(parameter)
    torch.testing.assert_close(biased[0](x), biased[1](x))


def test_a_single_row_and_pefts_own_arguments_are_taken(plain, x):
    ours, peft = (with_adapters(plain, which).base_model.model.layers[0].q_proj for which in (True, False))
    torch.testing.assert_close(ours(x[0, 0]), peft(x[0, 0]))
    names = ["__base__", ADAPTER]
    torch.testing.assert_close(ours(x, adapter_names=names), peft(x, adapter_names=names))
    assert not torch.allclose(ours(x, adapter_names=names)[0], ours(x)[0])


def test_a_model_without_memory_can_be_run(plain, x):
    assert with_adapters(plain.to("meta"))(x.to("meta")).shape == x.shape


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
