"""The hybrid model without verl: what trains, the merge, the reference snapshot, trainables and export."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_lora_plugin import apply_allocation, load_allocation
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.names import plain_name
from hybrid_lora_plugin.sync.base_weights import stored_dtypes
from hybrid_lora_plugin.sync.modes import sync_mode
from hybrid_lora_plugin.sync.plan import SyncPlan
from hybrid_lora_plugin.training.apply import parts_of, trainable_groups
from hybrid_lora_plugin.training.base_model import weightless_model
from hybrid_lora_plugin.training.checkpoint import load_trained, other_rounding, save_trained
from hybrid_lora_plugin.training.export import export_checkpoint
from hybrid_lora_plugin.training.lora_linear import SharedInput
from hybrid_lora_plugin.training.memory import least_bytes, rank_bytes
from hybrid_lora_plugin.training.merge import merge_weight
from hybrid_lora_plugin.training.model_folder import ModelFolder, file_order
from hybrid_lora_plugin.training.precision import frozen_dtype
from hybrid_lora_plugin.training.reference import BaseSnapshot, adapters_off
from hybrid_lora_plugin.training.rounding import Rounding
from hybrid_lora_plugin.training.tensor_file import UNFINISHED
from tests.support.allocations import make_allocation
from tests.support.checkpoints import IDS, save_checkpoint, train_a_little, trainables_of
from tests.support.folders import assert_same_files
from tests.support.tiny_models import make_tiny_qwen2


@pytest.fixture
def allocation(tiny_qwen2, tmp_path):
    return load_allocation(make_allocation(tiny_qwen2, tmp_path / "allocation"))


@pytest.fixture
def hybrid(tiny_qwen2, allocation):
    torch.manual_seed(0)
    return apply_allocation(AutoModelForCausalLM.from_pretrained(tiny_qwen2), allocation, rank=4, alpha=8)


def test_exactly_the_allocated_modules_train_each_in_its_own_way(hybrid, allocation):
    groups = trainable_groups(hybrid)
    full = {plain_name(name).rsplit(".", 1)[0] for name, _ in groups["full"]}
    lora = {plain_name(name).split(".lora_")[0] for name, _ in groups["lora"]}
    assert full == set(allocation.full_names) and lora == set(allocation.lora_names)
    # Biases of full q, k and v projections train with their weights.
    with_bias = [name for name in allocation.full_names if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert with_bias and {f"{name}.bias" for name in with_bias} <= {plain_name(name) for name, _ in groups["full"]}


def test_frozen_weights_are_bit_equal_after_training(hybrid):
    frozen = {n: p.detach().clone() for n, p in hybrid.named_parameters() if not p.requires_grad}
    train_a_little(hybrid)
    assert all(torch.equal(p, frozen[n]) for n, p in hybrid.named_parameters() if n in frozen)


def test_no_weight_gradient_is_computed_for_what_is_frozen(hybrid, tiny_qwen2):
    """A weight gradient is a product of the weight's own shape; there is one for each trained matrix and no other.

    The A of adapters that share an input are one matrix there.
    """
    products = Counter()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
                products[tuple(result.shape)] += 1
            return result

    loss = hybrid(input_ids=IDS, labels=IDS).loss
    with Products():
        loss.backward()
    trained = Counter(tuple(p.shape) for p in hybrid.parameters() if p.dim() == 2 and p.requires_grad)
    hooks = [hook for module in hybrid.modules() for hook in module._forward_pre_hooks.values()]
    together = [hook.__self__.members for hook in hooks if isinstance(getattr(hook, "__self__", None), SharedInput)]
    assert together
    for members in together:
        rank, width = members[0].lora_A["default"].weight.shape
        trained[rank, width] -= len(members)
        trained[rank * len(members), width] += 1
    matrices = {tuple(p.shape) for p in hybrid.parameters() if p.dim() == 2} | set(trained)
    assert Counter({shape: products[shape] for shape in matrices}) == trained
    assert all(p.grad is None for p in hybrid.parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_trains_is_fp32_and_starts_alike_whatever_the_base_is_held_in(tiny_qwen2, allocation, dtype):
    torch.manual_seed(3)
    held = apply_allocation(AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=dtype), allocation, rank=4, alpha=8)
    torch.manual_seed(3)
    plain = apply_allocation(AutoModelForCausalLM.from_pretrained(tiny_qwen2), allocation, rank=4, alpha=8)
    assert {p.dtype for p in held.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in held.parameters() if not p.requires_grad} == {dtype}
    wanted = dict(trainable_groups(plain)["lora"])
    assert all(torch.equal(p, wanted[name]) for name, p in trainable_groups(held)["lora"])


@pytest.mark.parametrize("stored, wanted", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_frozen_weights_keep_the_checkpoints_type(tiny_qwen2, tmp_path, stored, wanted):
    AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=getattr(torch, stored)).save_pretrained(tmp_path / "model")
    assert frozen_dtype("auto", stored_dtypes(str(tmp_path / "model"))) == getattr(torch, wanted)
    assert frozen_dtype("float32", stored_dtypes(str(tmp_path / "model"))) == torch.float32


def test_frozen_weights_of_mixed_or_unknown_types_are_fp32(tiny_qwen2, tmp_path):
    tensors = load_file(tiny_qwen2 / "model.safetensors")
    first = next(iter(tensors))
    (tmp_path / "mixed").mkdir()
    save_file(tensors | {first: tensors[first].bfloat16()}, tmp_path / "mixed" / "model.safetensors")
    assert len(stored_dtypes(str(tmp_path / "mixed"))) == 2 and not stored_dtypes(str(tmp_path))
    for folder in (tmp_path / "mixed", tmp_path, tmp_path / "nothing"):
        assert frozen_dtype("auto", stored_dtypes(str(folder))) == torch.float32


def test_bytes_of_one_rank_are_counted_from_its_parameters(hybrid):
    counted, snapshot = parts_of(hybrid).counts, BaseSnapshot(trainable_groups(hybrid)["full"])
    said, trains = rank_bytes(hybrid, snapshot), counted.full + counted.lora
    # The tiny model is fp32, and so is what is frozen; its values are no bfloat16 numbers.
    assert (said.frozen, said.trained, said.moments) == (4 * counted.frozen, 4 * trains, 8 * trains)
    assert said.reference == snapshot.bytes == 4 * counted.full
    floor = least_bytes(counted, 2)
    assert floor.total == pytest.approx((2 * counted.frozen + 16 * trains + 2 * counted.full) / 2)
    assert str(said).startswith(f"{said.total / 1e6:,.1f} MB on each rank: frozen") and "host" not in str(said)
    kept = sync_mode("sparse_merge").sent_weights().bytes_for(parts_of(hybrid).merged_shapes)
    with_lora = sum(p.numel() for n, p in hybrid.named_parameters() if n.endswith(".base_layer.weight"))
    assert kept == 2 * (counted.full + with_lora)
    remembering = rank_bytes(hybrid, snapshot, kept)
    # In the host's memory, wherever the model is.
    assert remembering.total == said.total and f"{kept / 1e6:,.1f} MB of the host" in str(remembering)


def test_every_parameter_is_counted_once(hybrid, tiny_qwen2, allocation):
    counted = parts_of(hybrid).counts
    plain = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_qwen2).parameters())
    assert counted.full == allocation.budget.used
    assert counted.frozen + counted.full == plain and counted.total == plain + counted.lora


def test_apply_refuses_a_model_that_is_wrapped_already(hybrid, allocation):
    with pytest.raises(ConfigurationError, match="already carries a PEFT adapter"):
        apply_allocation(hybrid, allocation)


def test_apply_refuses_the_allocation_of_another_model(allocation, tmp_path):
    from tests.support.tiny_models import make_tiny_qwen2

    other = AutoModelForCausalLM.from_pretrained(make_tiny_qwen2(tmp_path / "other", layers=3))
    with pytest.raises(ConfigurationError, match="artifact of another model"):
        apply_allocation(other, allocation)


def test_apply_refuses_an_allocation_that_leaves_nothing_to_lora(tiny_qwen2, tmp_path):
    everything = load_allocation(make_allocation(tiny_qwen2, tmp_path / "all", ratio=1.0))
    with pytest.raises(ConfigurationError, match="leaves no module to LoRA"):
        apply_allocation(AutoModelForCausalLM.from_pretrained(tiny_qwen2), everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_rounds_once_from_the_untouched_base(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(12, 10, generator=generator).to(dtype)
    lora_a, lora_b = torch.randn(4, 10, generator=generator), torch.randn(12, 4, generator=generator)
    kept = base.clone()
    exact = base.double() + 2.0 * (lora_b.double() @ lora_a.double())
    merged = merge_weight(base, lora_a, lora_b, 2.0, dtype)
    assert torch.equal(base, kept) and merged.dtype == dtype
    # One rounding: never further from the exact value than half a unit in the last place, up to fp32 noise.
    spacing = torch.finfo(dtype).eps * exact.abs()
    assert ((merged.double() - exact).abs() <= 0.5 * spacing + 1e-5).all()


def test_merge_is_exact_fp32_inside_autocast_and_with_reduced_matmul_precision():
    base, lora_a, lora_b = torch.randn(12, 10), torch.randn(4, 10), torch.randn(12, 4)
    expected = merge_weight(base, lora_a, lora_b, 2.0, torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(merge_weight(base, lora_a, lora_b, 2.0, torch.float32), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_merged_model_computes_what_the_adapted_model_computes(hybrid, tiny_qwen2, tmp_path):
    train_a_little(hybrid)
    save_checkpoint(hybrid, tiny_qwen2, tmp_path / "allocation", tmp_path / "actor")
    exported = export_checkpoint(tmp_path / "actor", tmp_path / "exported").folder
    merged = AutoModelForCausalLM.from_pretrained(exported)
    hybrid.eval()
    torch.testing.assert_close(merged(IDS).logits, hybrid(IDS).logits, rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["actor", "allocation", "exported"]


def test_reference_is_the_base_model_after_full_weights_moved(hybrid, tiny_qwen2):
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2).eval()
    snapshot = BaseSnapshot(trainable_groups(hybrid)["full"])
    train_a_little(hybrid)
    hybrid.eval()
    trained = hybrid(IDS).logits
    with adapters_off(hybrid):
        assert not torch.equal(hybrid(IDS).logits, base(IDS).logits), "adapters off alone is not the base model"
    with snapshot.swapped_in(trainable_groups(hybrid)["full"]), adapters_off(hybrid):
        assert torch.equal(hybrid(IDS).logits, base(IDS).logits)
    assert torch.equal(hybrid(IDS).logits, trained)


def test_adapters_off_is_the_base_layer_and_leaves_every_gradient_on(hybrid):
    train_a_little(hybrid)
    hybrid.eval()
    with_adapters, required = hybrid(IDS).logits, {n: p.requires_grad for n, p in hybrid.named_parameters()}
    with hybrid.disable_adapter():
        wanted = hybrid(IDS).logits
    with pytest.raises(ZeroDivisionError), adapters_off(hybrid):
        assert torch.equal(hybrid(IDS).logits, wanted) and not torch.equal(wanted, with_adapters)
        assert {n: p.requires_grad for n, p in hybrid.named_parameters()} == required
        raise ZeroDivisionError
    assert torch.equal(hybrid(IDS).logits, with_adapters), "also after an error"
    assert {n: p.requires_grad for n, p in hybrid.named_parameters()} == required


def test_trained_weights_come_back_when_the_reference_pass_fails(hybrid):
    snapshot = BaseSnapshot(trainable_groups(hybrid)["full"])
    train_a_little(hybrid)
    trained = trainables_of(hybrid)
    with pytest.raises(ZeroDivisionError), snapshot.swapped_in(trainable_groups(hybrid)["full"]):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, trained[name]) for name, tensor in trainables_of(hybrid).items())


def test_snapshot_of_bf16_values_in_fp32_masters_takes_two_bytes_a_weight():
    exact = torch.randn(8, 8).bfloat16().float()
    assert BaseSnapshot([("w", exact)]).bytes == 2 * 64
    assert BaseSnapshot([("w", exact + 2**-20)]).bytes == 4 * 64


def test_snapshot_refuses_other_modules_than_it_was_taken_of(hybrid):
    snapshot = BaseSnapshot(trainable_groups(hybrid)["full"][1:])
    with pytest.raises(RuntimeError, match="reference snapshot"), snapshot.swapped_in(trainable_groups(hybrid)["full"]):
        pass


def test_bf16_base_exports_in_bf16(tiny_qwen2, allocation, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(tmp_path / "base")
    hybrid = apply_allocation(base.float(), allocation, rank=4, alpha=8)
    train_a_little(hybrid)
    save_checkpoint(hybrid, tmp_path / "base", tmp_path / "allocation", tmp_path / "actor")
    exported = AutoModelForCausalLM.from_pretrained(
        export_checkpoint(tmp_path / "actor", tmp_path / "out").folder, dtype="auto"
    )
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}


@pytest.fixture
def bf16_run(tiny_qwen2, allocation, tmp_path):
    """A short run at a small rate from a bf16 checkpoint, saved as a run with a bf16 rollout saves it."""
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(tmp_path / "base")
    hybrid = apply_allocation(base.float(), allocation, rank=4, alpha=8)
    train_a_little(hybrid, lr=1e-5)
    rounding = {"rollout_dtype": "bfloat16", "rounding_mode": "stochastic", "rounding_seed": 5}
    save_checkpoint(hybrid, tmp_path / "base", tmp_path / "allocation", tmp_path / "actor", **rounding)
    return hybrid


def exported_weights(tmp_path, dtype):
    exported = export_checkpoint(tmp_path / "actor", tmp_path / dtype, dtype=dtype)
    weights = load_file(exported.folder / "model.safetensors")
    return weights, str(exported.kept), json.loads((exported.folder / "config.json").read_text())["dtype"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_export_has_the_rollout_engine_s_own_weights(bf16_run, tmp_path, dtype):
    weights, kept, said = exported_weights(tmp_path, dtype)
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    assert said == str(wanted).removeprefix("torch.")
    synced = dict(sync_mode("merge").outgoing(bf16_run, SyncPlan(2.0, wanted, "cpu", Rounding("stochastic", 5))))
    assert weights.keys() == synced.keys()
    assert all(torch.equal(tensor, synced[name]) for name, tensor in weights.items())
    shares = [float(share) for share in re.findall(r"([\d.]+)% of the update", kept)]
    assert len(shares) == 2 and all(90 < share < 110 for share in shares), kept
    assert ("by the run's thresholds" in kept) == (dtype != "float32")


@pytest.mark.parametrize("said", ["float32", "bfloat16"])
def test_export_of_a_float32_checkpoint_has_the_rollout_engine_s_own_weights(hybrid, tiny_qwen2, tmp_path, said):
    """Also where its config names another type than its tensors have."""
    base = tmp_path / "base"
    shutil.copytree(tiny_qwen2, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": said}))
    originals = BaseSnapshot(trainable_groups(hybrid)["full"]).values
    train_a_little(hybrid, lr=1e-5)
    rounding = {"rollout_dtype": "bfloat16", "rounding_mode": "stochastic", "rounding_seed": 5}
    save_checkpoint(hybrid, base, tmp_path / "allocation", tmp_path / "actor", base_dtype="float32", **rounding)
    weights, _, _ = exported_weights(tmp_path, "auto")
    plan = SyncPlan(2.0, torch.bfloat16, "cpu", Rounding("stochastic", 5), originals=originals)
    synced = dict(sync_mode("merge").outgoing(hybrid, plan))
    assert weights.keys() == synced.keys()
    assert all(torch.equal(tensor, synced[name]) for name, tensor in weights.items())


def test_what_is_kept_of_a_float32_checkpoint_is_measured_against_its_own_values(hybrid, tiny_qwen2, tmp_path):
    train_a_little(hybrid)
    save_checkpoint(hybrid, tiny_qwen2, tmp_path / "allocation", tmp_path / "actor")
    share = export_checkpoint(tmp_path / "actor", tmp_path / "out", dtype="bfloat16").kept.share
    assert share == pytest.approx({"full": 1, "lora": 1}, abs=0.1)


def test_export_says_what_nearest_loses(bf16_run, tmp_path):
    file = tmp_path / "actor" / "hybrid_lora" / "trainables.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"rounding_mode": "nearest"}))
    _, kept, _ = exported_weights(tmp_path, "bfloat16")
    assert "rounded to nearest" in kept and "give dtype=float32 to keep all of it" in kept


def test_a_checkpoint_from_before_rounding_is_exported_as_it_was(bf16_run, tmp_path):
    file = tmp_path / "actor" / "hybrid_lora" / "trainables.json"
    raw = json.loads(file.read_text())
    old = {name: raw[name] for name in ("base_model", "rank", "alpha", "global_step")} | {"schema_version": 1}
    file.write_text(json.dumps(old))
    weights, _, said = exported_weights(tmp_path, "auto")
    assert said == "bfloat16"
    synced = dict(sync_mode("merge").outgoing(bf16_run, SyncPlan(2.0, torch.bfloat16, "cpu")))
    assert all(torch.equal(tensor, synced[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "rounding, said",
    [(Rounding("nearest", 5), None), (Rounding("stochastic", 0), "sync_rounding is stochastic and was nearest")],
)
def test_a_resume_of_a_checkpoint_from_before_rounding_knows_that_it_was_to_nearest(
    hybrid, tiny_qwen2, tmp_path, rounding, said
):
    """Its rollout type is not known, and to nearest a seed means nothing."""
    folder = save_checkpoint(hybrid, tiny_qwen2, tmp_path / "allocation", tmp_path / "actor")
    raw = json.loads((folder / "trainables.json").read_text())
    old = {name: raw[name] for name in ("base_model", "rank", "alpha", "global_step")} | {"schema_version": 1}
    (folder / "trainables.json").write_text(json.dumps(old))
    warning = other_rounding(folder, "bfloat16", rounding)
    assert warning is None if said is None else said in warning and "rollout.dtype" not in warning


def test_export_refuses_a_type_that_does_not_hold_the_weights(bf16_run, tiny_qwen2, allocation, tmp_path):
    with torch.no_grad():
        trainable_groups(bf16_run)["full"][0][1][0] = 1e5
    save_checkpoint(bf16_run, tmp_path / "base", tmp_path / "allocation", tmp_path / "actor")
    with pytest.raises(ConfigurationError, match=r"dtype: float16 does not hold all weights .*give dtype=float32"):
        export_checkpoint(tmp_path / "actor", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_export_never_writes_into_an_existing_folder(hybrid, tiny_qwen2, tmp_path):
    save_checkpoint(hybrid, tiny_qwen2, tmp_path / "allocation", tmp_path / "actor")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigurationError, match="output_dir: .* exists already"):
        export_checkpoint(tmp_path / "actor", tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_export_names_a_missing_tensor(hybrid, tiny_qwen2, allocation, tmp_path):
    folder = save_checkpoint(hybrid, tiny_qwen2, tmp_path / "allocation", tmp_path / "actor")
    tensors, description, _ = load_trained(folder)
    missing = f"{allocation.full_names[0]}.weight"
    del tensors[missing]
    text = (folder / "allocation.json").read_text()
    save_trained(tmp_path / "actor", tensors, description, text)
    with pytest.raises(ConfigurationError, match=f"{missing}.* is missing"):
        export_checkpoint(tmp_path / "actor", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
    from hybrid_lora_plugin.cli.export import main

    assert main([f"checkpoint={tmp_path}", f"output_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "trainables.safetensors" in error and "global_step_N" in error
    assert main([f"checkpoint={tmp_path}"]) == 2
    assert "output_dir: not given" in capsys.readouterr().err


def test_unreadable_description_is_named(hybrid, tiny_qwen2, tmp_path):
    folder = save_checkpoint(hybrid, tiny_qwen2, tmp_path / "allocation", tmp_path / "actor")
    raw = json.loads((folder / "trainables.json").read_text())
    (folder / "trainables.json").write_text(json.dumps(raw | {"schema_version": 99}))
    with pytest.raises(ConfigurationError, match="schema_version is 99"):
        load_trained(folder)


@pytest.mark.parametrize("largest_file", ["5GB", "30KB", "4KB"])
def test_a_folder_written_one_weight_at_a_time_is_transformers_own(tiny_qwen2, tmp_path, largest_file):
    """Files of many sizes, down to those that hold one weight; twelve layers, whose numbers sort by size."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_qwen2(tmp_path / "base", layers=12), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "whole", max_shard_size=largest_file)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weightless = weightless_model(tmp_path / "base", "float32", torch.bfloat16)
    assert {tensor.device.type for tensor in weightless.state_dict().values()} == {"meta"}
    (tmp_path / "one").mkdir()
    folder = ModelFolder(tmp_path / "one", weightless, weights, largest_file)
    begun = []
    for name in file_order(weights):
        folder.add(name, weights[name])
        begun.append(len(list((tmp_path / "one").glob(f"*{UNFINISHED}"))))
    folder.finish()
    assert_same_files(tmp_path / "one", tmp_path / "whole")
    files = len(list((tmp_path / "whole").glob("*.safetensors")))
    # One file after the other, each under another name until it is complete.
    assert (files == 1) == (largest_file == "5GB") and max(begun) <= 1 and begun[-1] == 0


def test_a_folder_without_all_weights_is_not_finished(tiny_qwen2, tmp_path):
    weightless = weightless_model(tiny_qwen2, "float32", torch.float32)
    names = dict(weightless.named_parameters())
    with pytest.raises(RuntimeError, match="model.norm.weight: in the base model"):
        ModelFolder(tmp_path, weightless, [name for name in names if name != "model.norm.weight"])
    folder = ModelFolder(tmp_path, weightless, names)
    for name in file_order(names)[:-1]:
        folder.add(name, torch.zeros(names[name].shape))
    with pytest.raises(RuntimeError, match="not all weights of the model came"):
        folder.finish()
