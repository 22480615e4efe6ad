"""The original weights on both sides of a sync: read from the checkpoint, and proven to be the same."""

from __future__ import annotations

import json
import math
import resource
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin import apply_allocation
from hybrid_lora_plugin.errors import WeightSyncError
from hybrid_lora_plugin.sync.base_weights import STORAGE, CheckpointWeights, base_digests, check_base, value_digest
from hybrid_lora_plugin.sync.hybrid_weights import original_weights
from hybrid_lora_plugin.training.apply import parts_of
from tests.support.sync_models import ALPHA, RANK, each_case, full_names, outgoing, saved_as, tied_and_untied, update

# -- the checkpoint beside the engine -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded_qwen2(tiny_qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "qwen2"
    saved_as(AutoModelForCausalLM.from_pretrained(tiny_qwen2), folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2 and not (folder / "model.safetensors").exists()
    return folder


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("which", ["tied", "untied", "bf16", "sharded"])
def test_checkpoint_weights_are_those_of_the_model(cases, sharded_qwen2, which, storage):
    folder = sharded_qwen2 if which == "sharded" else cases[which].folder
    weights = CheckpointWeights(folder, storage)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, parameter in model.named_parameters():
        for _ in range(2):
            assert torch.equal(weights[name], parameter) and weights[name].dtype == parameter.dtype
        assert weights.shape(name) == tuple(parameter.shape) and name in weights
    assert ("lm_head.weight" in weights) == (which == "untied")


def test_a_weight_that_the_checkpoint_lacks_is_a_key_error(tiny_qwen2, sharded_qwen2):
    for folder in (tiny_qwen2, sharded_qwen2):
        weights = CheckpointWeights(folder)
        assert "lm_head.weight" not in weights
        with pytest.raises(KeyError, match="lm_head.weight"):
            weights["lm_head.weight"]
        with pytest.raises(KeyError, match="lm_head.weight"):
            weights.shape("lm_head.weight")


def test_pinned_storage_keeps_one_copy_and_memory_map_reads_again(tiny_qwen2, tmp_path):
    folder = shutil.copytree(tiny_qwen2, tmp_path / "copy")
    pinned, mapped = (CheckpointWeights(folder, storage) for storage in ("pinned", "memory_map"))
    name = "model.norm.weight"
    assert pinned[name] is pinned[name]
    assert mapped[name] is not mapped[name]
    # Its own memory: what happens to the file is nothing to it.
    kept = pinned[name].clone()
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        (header,) = struct.unpack("<Q", (file.seek(0), file.read(8))[1])
        file.seek(8 + header)
        file.write(b"\0" * (size - 8 - header))
    assert torch.equal(pinned[name], kept) and kept.any()


@pytest.mark.parametrize("storage", STORAGE)
def test_writing_to_a_weight_that_was_read_never_reaches_the_file(tiny_qwen2, tmp_path, storage):
    folder = shutil.copytree(tiny_qwen2, tmp_path / "copy")
    before = (folder / "model.safetensors").read_bytes()
    CheckpointWeights(folder, storage)["model.norm.weight"].zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_folder_without_safetensors_is_named(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"not these")
    with pytest.raises(WeightSyncError, match=f"{tmp_path}: no safetensors"):
        CheckpointWeights(tmp_path)
    with pytest.raises(WeightSyncError, match=f"{tmp_path / 'nowhere'}: no safetensors"):
        CheckpointWeights(tmp_path / "nowhere")


@pytest.mark.parametrize("storage", STORAGE)
def test_shape_is_told_without_reading_the_tensor(tmp_path, storage):
    # A sparse file of one tensor of 4 GiB, of which hardly a page may come into memory.
    size = 4 << 30
    header = {"huge": {"dtype": "F32", "shape": [1 << 20, 1 << 10], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert CheckpointWeights(tmp_path, storage).shape("huge") == (1 << 20, 1 << 10)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


# -- one base -------------------------------------------------------------------------------------------------------


def test_values_have_one_digest_in_whatever_type_they_are_held(cases):
    checkpoint = CheckpointWeights(cases["bf16"].folder)
    trainer = AutoModelForCausalLM.from_pretrained(cases["bf16"].folder, dtype=torch.float32)
    for name, parameter in trainer.named_parameters():
        assert checkpoint[name].dtype == torch.bfloat16 and parameter.dtype == torch.float32
        assert value_digest(checkpoint[name]) == value_digest(parameter)
    weight = torch.randn(7, 5)
    assert value_digest(weight.t()) == value_digest(weight.t().contiguous()) != value_digest(weight)
    assert value_digest(weight.half()) == value_digest(weight.half().float()) != value_digest(weight)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3e38])
    assert value_digest(special.bfloat16()) == value_digest(special.bfloat16().float())
    assert value_digest(torch.tensor([1e38])) != value_digest(torch.tensor([3.4e38]))


@pytest.mark.parametrize("bit", [0, 1, 15, 16, 22, 23, 30, 31])
def test_a_changed_bit_of_an_fp32_weight_changes_its_value_digest(bit):
    # Of a weight that bf16 holds exactly, too: bits below its last are the ones that a look at bf16 alone would miss.
    for weight in (torch.randn(6, 5), torch.randn(6, 5).bfloat16().float()):
        changed = weight.clone()
        changed.view(torch.int32)[3, 2] ^= -(2**31) if bit == 31 else 1 << bit
        assert value_digest(changed) != value_digest(weight)


@each_case
def test_trainer_and_rollout_of_one_checkpoint_have_one_base(case):
    folder, hybrid = case.folder, case.hybrid()
    before = base_digests(original_weights(hybrid, "cpu"))
    check_base(before, CheckpointWeights(folder).__getitem__, str(folder))
    # Training changes nothing of it.
    update(hybrid, torch.Generator().manual_seed(5))
    assert base_digests(original_weights(hybrid, "cpu")) == before


@tied_and_untied
def test_original_weights_are_exactly_what_training_leaves_alone(case):
    folder, allocation, hybrid = case.folder, case.allocation, case.hybrid()
    everything = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    pairs = list(original_weights(hybrid, "cpu"))
    original = dict(pairs)
    assert len(original) == len(pairs)
    trained = {name for name in everything if name.rpartition(".")[0] in allocation.full_names}
    assert original.keys() == everything.keys() - trained
    assert all(torch.equal(tensor, everything[name]) for name, tensor in original.items())
    assert {f"{module}.weight" for module in allocation.lora_names} <= original.keys()
    # Biases of adapted modules do not train.
    assert any(f"{module}.bias" in original for module in allocation.lora_names)
    # Nothing is both kept and sent.
    sent = {name for name, _ in outgoing(hybrid, "adapter")}
    assert not sent & original.keys()


def test_digests_leave_out_what_has_no_values_to_compare():
    weights = {"w": torch.ones(2), "positions": torch.arange(4)}
    assert base_digests(weights.items()) == {"w": value_digest(torch.ones(2))}


def other_checkpoint(folder, target, change):
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return CheckpointWeights(target)


def nudge(tensors, name):
    """The smallest change there is, to one element."""
    flat = tensors[name].view(-1)
    flat[3] = torch.nextafter(flat[3], torch.tensor(math.inf))


@pytest.mark.parametrize("which", ["the base of an adapter", "a bias of it", "a norm", "the embedding"])
def test_a_differing_base_weight_is_named(hybrid, tiny_qwen2, tmp_path, which):
    biased = next(m for m in parts_of(hybrid).lora_modules if m.endswith(("q_proj", "k_proj", "v_proj")))
    name = {
        "the base of an adapter": f"{parts_of(hybrid).lora_modules[-1]}.weight",
        "a bias of it": f"{biased}.bias",
        "a norm": "model.layers.1.input_layernorm.weight",
        "the embedding": "model.embed_tokens.weight",
    }[which]
    wanted = base_digests(original_weights(hybrid, "cpu"))
    other = other_checkpoint(tiny_qwen2, tmp_path / "other", lambda tensors: nudge(tensors, name))
    with pytest.raises(WeightSyncError, match=f"{name}: .*{other.folder} holds other values"):
        check_base(wanted, other.__getitem__, str(other.folder))


def test_a_differing_full_weight_is_no_matter(hybrid, tiny_qwen2, tmp_path):
    # The first sync replaces it.
    wanted = base_digests(original_weights(hybrid, "cpu"))
    other = other_checkpoint(tiny_qwen2, tmp_path / "other", lambda tensors: nudge(tensors, full_names(hybrid)[0]))
    check_base(wanted, other.__getitem__, str(other.folder))


def test_a_missing_base_weight_is_named(hybrid, tiny_qwen2, tmp_path):
    name = f"{parts_of(hybrid).lora_modules[2]}.weight"
    wanted = base_digests(original_weights(hybrid, "cpu"))
    other = other_checkpoint(tiny_qwen2, tmp_path / "other", lambda tensors: tensors.pop(name))
    with pytest.raises(WeightSyncError, match=f"{name}: .*{other.folder}, has not"):
        check_base(wanted, other.__getitem__, str(other.folder))


def test_a_trainer_that_rounded_its_base_is_told(cases):
    # Loaded in bf16 from an fp32 checkpoint, which the rollout engine would merge into unrounded.
    folder = cases["tied"].folder
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    hybrid = apply_allocation(rounded, cases["tied"].allocation, rank=RANK, alpha=ALPHA)
    wanted = base_digests(original_weights(hybrid, "cpu"))
    with pytest.raises(WeightSyncError, match="embed_tokens.weight: .* holds other values"):
        check_base(wanted, CheckpointWeights(folder).__getitem__, str(folder))
