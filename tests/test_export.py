"""What is exported of a checkpoint: a plain model, a PEFT adapter with full weights, a delta; and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_lora_plugin import apply_allocation, load_allocation
from hybrid_lora_plugin.cli import export as command
from hybrid_lora_plugin.cli.export_progress import LineProgress
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.training import export as exporting
from hybrid_lora_plugin.training.bit_difference import pack, unpack
from hybrid_lora_plugin.training.export import apply_delta, export_checkpoint
from hybrid_lora_plugin.training.model_card import CARD, hub_name
from hybrid_lora_plugin.training.tensor_file import UNFINISHED, TensorFile, entry_of
from tests.support.allocations import make_allocation
from tests.support.checkpoints import IDS, save_checkpoint, train_a_little
from tests.support.folders import assert_same_files
from tests.support.tiny_families import make_family
from tests.support.tiny_models import make_tiny_qwen2

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: what an RL run with rollouts in bfloat16 records
ROLLOUT = {
    "rollout_dtype": "bfloat16",
    "rounding_mode": "stochastic",
    "rounding_seed": 5,
    "recipe": {"run": "reinforcement_learning", "full_lr": 1e-6, "lora_lr": 2.5e-5},
}
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}"


def trained(base: Path, folder: Path, **description) -> Path:
    """A checkpoint of a few steps from ``base``, with the tokenizer and template that its run took; its folder."""
    allocation = load_allocation(make_allocation(base, folder / "allocation"))
    torch.manual_seed(0)
    model = apply_allocation(AutoModelForCausalLM.from_pretrained(base).float(), allocation, rank=4, alpha=8)
    train_a_little(model, lr=1e-3)
    save_checkpoint(model, base, folder / "allocation", folder / "step" / "actor", **description)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "step" / "actor" / "huggingface")
    return folder / "step"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name: (folder of the base model, folder of the checkpoint)."""
    made: dict[str, tuple[Path, Path]] = {}

    def run(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name.startswith("qwen2"):
                base = make_tiny_qwen2(folder / "base", layers=3, on_grid=name == "qwen2")
            else:
                base = make_family(name, folder / "base")
            if name == "qwen2":
                # Stored in bfloat16, as most checkpoints are.
                AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
            held = "bfloat16" if name == "qwen2" else "float32"
            made[name] = (base, trained(base, folder, base_dtype=held, **ROLLOUT))
        return made[name]

    return run


#: tied and in bfloat16; tied and in float32; packed projections; packed, with biases
each_run = pytest.mark.parametrize("name", ["qwen2", "qwen2-float32", "phi3", "glm"])


def log_probs(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float().log_softmax(-1)


def loader_of(folder: Path) -> list[str]:
    """The lines of Python in a folder's card."""
    (text,) = re.findall(r"```python\n(.*?)\n```", (folder / CARD).read_text(), re.S)
    return text.splitlines()


def loaded_by_its_card(folder: Path, monkeypatch):
    """``model`` as the card's own lines make it, beside the folder, as a user would call them."""
    monkeypatch.chdir(folder.parent)
    names: dict = {}
    exec("\n".join(loader_of(folder)), names)
    return names["model"]


def without_card(folder: Path) -> Path:
    (folder / CARD).unlink()
    return folder


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_file_written_tensor_by_tensor_is_the_librarys_own(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, generator=generator),
        "a": torch.randn(7, generator=generator).bfloat16(),
        "größe.weight": torch.randn(2, 2, generator=generator).half(),
        "ids": torch.arange(5),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "nothing": torch.zeros(0, 4),
        "one": torch.tensor(2.5),
        "flags": torch.tensor([True, False]),
        "wide": torch.randn(2, generator=generator).double(),
    }
    save_file(tensors, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "parts.safetensors", {name: entry_of(tensor) for name, tensor in tensors.items()})
    for name in reversed(tensors):
        assert not (tmp_path / "parts.safetensors").exists() and not file.is_complete
        file.add(name, tensors[name])
    assert file.is_complete
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not list(tmp_path.glob(f"*{UNFINISHED}"))


def test_a_tensor_of_another_shape_is_not_written(tmp_path):
    file = TensorFile(tmp_path / "file", {"a": entry_of(torch.zeros(2, 3))})
    with pytest.raises(ValueError, match="a: .*came where"):
        file.add("a", torch.zeros(3, 2))


@settings(deadline=None)
@given(st.sampled_from(list(DTYPES.values())), st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 2), max_size=40))
def test_a_difference_gives_every_bit_back(dtype, pairs):
    """Also of infinities, of what is no number, and over the whole range of a type."""
    wide = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    width = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    values, reference = (wide[:, one].to(width).view(dtype) for one in (0, 1))
    back = unpack(pack(values, reference), reference)
    assert back.dtype == dtype and torch.equal(back.view(width), values.view(width))


def test_a_damaged_difference_is_refused():
    reference = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    data = pack(reference + 0.01, reference)
    for damaged in (data[:-3], data + b"more", data[:9] + b"\xff" + data[10:], b"", pack(reference[1:], reference[1:])):
        with pytest.raises(ValueError):
            unpack(damaged, reference)


def test_a_small_update_packs_well():
    """bfloat16 weights of which one in eight moved by one step take less than a fifth of their size."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 500, generator=generator).bfloat16()
    moved = reference.view(torch.int16) + (torch.rand(reference.shape, generator=generator) < 1 / 8).short()
    assert len(pack(moved.view(torch.bfloat16), reference)) < reference.nbytes / 5


# -- a plain model --------------------------------------------------------------------------------------------------


def test_the_run_s_tokenizer_and_chat_template_come_along(runs, tmp_path):
    base, checkpoint = runs("qwen2")
    exported = export_checkpoint(checkpoint, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(exported.folder).chat_template == TEMPLATE
    assert AutoTokenizer.from_pretrained(base).chat_template != TEMPLATE
    assert f"tokenizer and chat template: the run's, from {checkpoint / 'actor' / 'huggingface'}" in exported.notes


def test_without_a_run_s_tokenizer_the_base_model_s_is_taken_and_said(runs, tmp_path):
    base, checkpoint = runs("qwen2")
    exported = export_checkpoint(checkpoint / "actor" / "hybrid_lora", tmp_path / "with")
    assert "the run's" in " ".join(exported.notes)
    shutil.copytree(checkpoint / "actor" / "hybrid_lora", tmp_path / "alone" / "hybrid_lora")
    exported = export_checkpoint(tmp_path / "alone", tmp_path / "out")
    template = AutoTokenizer.from_pretrained(exported.folder).chat_template
    assert template == AutoTokenizer.from_pretrained(base).chat_template
    assert f"tokenizer and chat template: of {base}, since the checkpoint holds none" in exported.notes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.popitem(), "is missing; the checkpoint is incomplete"),
        (lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(3, 2)}), r"has shape \[3, 2\], and \["),
        (lambda tensors: tensors.update(odd=torch.zeros(1)), "'odd' belongs to no module of"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused_before_anything_is_written(runs, tmp_path, change, said):
    _, checkpoint = runs("qwen2")
    shutil.copytree(checkpoint / "actor", tmp_path / "actor")
    file = tmp_path / "actor" / "hybrid_lora" / "trainables.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ConfigurationError, match=f"^checkpoint: tensor .*{said}"):
        export_checkpoint(tmp_path / "actor", tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["actor"]


def test_small_files_and_one_large_file_are_one_model(runs, tmp_path):
    _, checkpoint = runs("qwen2")
    whole = export_checkpoint(checkpoint, tmp_path / "whole").folder
    parts = export_checkpoint(checkpoint, tmp_path / "parts", largest_file="30KB").folder
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert len(list(parts.glob("*.safetensors"))) == len(set(index["weight_map"].values())) > 2
    model, report = AutoModelForCausalLM.from_pretrained(parts, output_loading_info=True)
    wanted = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    assert not any(report.values()) and index["metadata"]["total_parameters"] == model.num_parameters()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("how", ["torch's format", "the head a second time"])
def test_a_base_model_that_is_loaded_whole_gives_the_same_files(runs, tmp_path, how):
    base, checkpoint = runs("qwen2")
    other = tmp_path / "base"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    if how == "torch's format":
        (other / "model.safetensors").unlink()
        torch.save(weights, other / "pytorch_model.bin")
    else:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    exported = export_checkpoint(checkpoint, tmp_path / "out", base=str(other))
    assert any("loaded whole" in note for note in exported.notes)
    streamed = export_checkpoint(checkpoint, tmp_path / "streamed")
    assert not any("loaded whole" in note for note in streamed.notes)
    assert_same_files(without_card(exported.folder), without_card(streamed.folder))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("generation_config.json", {"temperature": 0.6, "top_p": 0.9}),
        ("generation_config.json", {"early_stopping": True, "length_penalty": 2.0}),
    ],
)
def test_what_transformers_reads_and_does_not_write_loses_no_merge(runs, tmp_path, file, changes):
    base, checkpoint = runs("qwen2")
    shutil.copytree(base, tmp_path / "base")
    before = json.loads((base / file).read_text()) | changes
    (tmp_path / "base" / file).write_text(json.dumps(before))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "refused")
    exported = export_checkpoint(checkpoint, tmp_path / "out", base=str(tmp_path / "base"))
    after = json.loads((exported.folder / file).read_text())
    assert {name: after[name] for name in changes} == changes
    assert any("although transformers finds fault" in note for note in exported.notes)
    plain = export_checkpoint(checkpoint, tmp_path / "plain")
    assert not any("finds fault" in note for note in plain.notes)
    assert (exported.folder / "config.json").read_bytes() == (plain.folder / "config.json").read_bytes()


# -- an adapter -----------------------------------------------------------------------------------------------------


@each_run
def test_the_card_s_lines_load_adapter_and_full_weights(runs, tmp_path, monkeypatch, name):
    base, checkpoint = runs(name)
    folder = export_checkpoint(checkpoint, tmp_path / "adapter", format="adapter", dtype="float32").folder
    merged = export_checkpoint(checkpoint, tmp_path / "merged", dtype="float32").folder
    assert len(loader_of(folder)) <= 5
    wanted = log_probs(AutoModelForCausalLM.from_pretrained(merged))
    torch.testing.assert_close(log_probs(loaded_by_its_card(folder, monkeypatch)), wanted, rtol=0, atol=1e-4)
    # The adapter alone is another policy, and so is the base model: each part counts.
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    without = (log_probs(plain) - wanted).abs().max()
    alone = (log_probs(PeftModel.from_pretrained(plain, str(folder))) - wanted).abs().max()
    assert alone > 1e-3 and without > 1e-3


@each_run
def test_an_adapter_holds_what_the_checkpoint_holds(runs, tmp_path, name):
    base, checkpoint = runs(name)
    folder = export_checkpoint(checkpoint, tmp_path / "adapter", format="adapter", dtype="float32").folder
    saved = load_file(checkpoint / "actor" / "hybrid_lora" / "trainables.safetensors")
    factors = load_file(folder / "adapter_model.safetensors")
    exported = {name.removeprefix("base_model.model."): tensor for name, tensor in factors.items()}
    exported |= load_file(folder / "full_weights.safetensors")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in exported.items())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and (config["r"], config["lora_alpha"]) == (4, 8)
    assert sorted(config["target_modules"]) == config["target_modules"]


def test_full_weights_beside_an_adapter_are_the_rollout_engine_s_unless_asked_otherwise(runs, tmp_path):
    _, checkpoint = runs("qwen2-float32")
    folder = export_checkpoint(checkpoint, tmp_path / "adapter", format="adapter").folder
    full = load_file(folder / "full_weights.safetensors")
    merged = load_file(export_checkpoint(checkpoint, tmp_path / "merged").folder / "model.safetensors")
    assert full and {tensor.dtype for tensor in full.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, merged[name]) for name, tensor in full.items())
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    assert 'dtype="bfloat16"' in "\n".join(loader_of(folder))


# -- a delta --------------------------------------------------------------------------------------------------------


@each_run
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_delta_gives_the_merged_model_again_byte_for_byte(runs, tmp_path, name, dtype):
    base, checkpoint = runs(name)
    folder = export_checkpoint(checkpoint, tmp_path / "delta", format="delta", dtype=dtype).folder
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    for wanted in ("auto", "float32", "float16") if dtype == "float32" else ("auto",):
        merged = export_checkpoint(checkpoint, tmp_path / f"merged-{wanted}", dtype=wanted)
        again = apply_delta(folder, tmp_path / f"again-{wanted}", base=str(moved), dtype=wanted)
        assert_same_files(without_card(again.folder), without_card(merged.folder))
    adapter = export_checkpoint(checkpoint, tmp_path / "adapter", format="adapter", dtype=dtype).folder
    again = apply_delta(folder, tmp_path / "adapter-again", format="adapter", dtype=dtype).folder
    assert_same_files(without_card(again), without_card(adapter))


def test_a_delta_is_smaller_than_a_model_and_than_an_adapter(runs, tmp_path):
    _, checkpoint = runs("qwen2")
    size = {}
    for format in ("merged", "adapter", "delta"):
        folder = export_checkpoint(checkpoint, tmp_path / format, format=format, dtype="float32").folder
        size[format] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size["delta"] < size["adapter"] < size["merged"]


@pytest.mark.parametrize("other", ["another seed", "one element"])
@pytest.mark.parametrize("by", ["every bit", "samples"])
def test_a_delta_is_not_applied_to_another_base_model(runs, tmp_path, other, by):
    """Samples tell most other models before anything is merged, and the digests every one."""
    base, checkpoint = runs("qwen2")
    folder = export_checkpoint(checkpoint, tmp_path / "delta", format="delta").folder
    if by == "every bit":
        (folder / "base_weights.json").unlink()
        said = "base: model.* has other values than in the model that the delta was made against"
    else:
        said = "base: .* is not the model that the run started from"
    if other == "another seed":
        wrong = make_tiny_qwen2(tmp_path / "wrong", layers=3, seed=1, on_grid=True)
    else:
        wrong = tmp_path / "wrong"
        shutil.copytree(base, wrong)
        weights = load_file(wrong / "model.safetensors")
        # In no module that was trained.
        weights["model.norm.weight"][3] += 0.5
        save_file(weights, wrong / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=said):
        apply_delta(folder, tmp_path / "out", base=str(wrong))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["delta", "wrong"]


def test_a_delta_in_16_bits_gives_no_other_type(runs, tmp_path):
    _, checkpoint = runs("qwen2")
    folder = export_checkpoint(checkpoint, tmp_path / "delta", format="delta").folder
    assert "no other type can be made of it" in (folder / CARD).read_text()
    with pytest.raises(ConfigurationError, match="dtype: float32 is asked for and the delta holds bfloat16"):
        apply_delta(folder, tmp_path / "out", dtype="float32")


@pytest.mark.parametrize("damage", ["cut", "no json", "another version", "another dtype", "a bit", "a tensor less"])
def test_a_damaged_delta_is_refused(runs, tmp_path, damage):
    _, checkpoint = runs("qwen2")
    folder = export_checkpoint(checkpoint, tmp_path / "delta", format="delta").folder
    tensors, content = folder / "delta.safetensors", folder / "delta.json"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "no json":
        content.write_text("{")
    elif damage in ("another version", "another dtype"):
        change = {"schema_version": 9} if damage == "another version" else {"dtype": "int8"}
        content.write_text(json.dumps(json.loads(content.read_text()) | change))
    else:
        held = load_file(tensors)
        name = next(name for name, tensor in held.items() if tensor.dtype == torch.uint8)
        if damage == "a bit":
            held[name][10] ^= 4
        else:
            del held[name]
        save_file(held, tensors)
    with pytest.raises(ConfigurationError, match=r"^delta: [^\n]+$"):
        apply_delta(folder, tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["delta"]


# -- the card -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["merged", "adapter", "delta"])
def test_a_card_says_how_the_model_was_made(runs, tmp_path, format):
    base, checkpoint = runs("qwen2")
    folder = export_checkpoint(checkpoint, tmp_path / "out", format=format).folder
    card = ModelCard.load(folder / CARD)
    assert card.data.library_name == {"merged": "transformers", "adapter": "peft", "delta": "hybrid-lora"}[format]
    assert "hybrid-lora" in card.data.tags and card.data.base_model is None, "a folder is no name on the Hub"
    text = card.text
    assert str(base) in text and "rank 4, alpha 8" in text and "1e-06 for full modules, 2.5e-05 for LoRA" in text
    allocation = load_allocation(checkpoint / "actor" / "hybrid_lora" / "allocation.json")
    rows = dict(re.findall(r"^\| `(\w+)` \| \d+ \| (\d+) \|", text, re.M))
    assert sum(map(int, rows.values())) == len(allocation.full_names) and len(rows) == 7
    share = allocation.full_parameters / allocation.model.candidate_parameters
    assert f"{allocation.full_parameters:,} parameters or {share:.1%}" in text


def test_a_card_names_a_base_model_of_the_hub():
    assert hub_name("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B-Instruct"
    cached = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-1.5B/snapshots/8faed7/"
    assert hub_name(cached) == "Qwen/Qwen2.5-1.5B"
    assert hub_name("/data/models/mine") is hub_name("./mine") is hub_name("~/mine") is None


@pytest.mark.parametrize("recipe", ["absent", None, {"full_lr": "?"}])
def test_a_card_of_an_older_checkpoint_says_what_is_not_recorded(runs, tmp_path, recipe):
    base, checkpoint = runs("qwen2")
    shutil.copytree(checkpoint, tmp_path / "step")
    file = tmp_path / "step" / "actor" / "hybrid_lora" / "trainables.json"
    raw = json.loads(file.read_text())
    raw["recipe"] = recipe
    if recipe == "absent":
        del raw["recipe"]
    file.write_text(json.dumps(raw))
    folder = export_checkpoint(tmp_path / "step", tmp_path / "out").folder
    assert "| learning rates | not recorded in the checkpoint |" in (folder / CARD).read_text()


# -- memory and progress --------------------------------------------------------------------------------------------


def highest_resident() -> int:
    """Most bytes that this process has held since ``/proc/self/clear_refs`` was last written."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("format", ["merged", "adapter", "delta"])
def test_an_export_takes_the_memory_of_a_few_weights(tmp_path, format):
    """A model of 150 MB whose largest weight has 8 MB."""
    base = make_tiny_qwen2(tmp_path / "base", layers=6, hidden=1024, heads=8, kv_heads=8)
    checkpoint = trained_without_training(base, tmp_path)
    size = (base / "model.safetensors").stat().st_size
    Path("/proc/self/clear_refs").write_text("5")
    before = highest_resident()
    folder = export_checkpoint(checkpoint, tmp_path / "out", format=format, dtype="float32").folder
    taken = highest_resident() - before
    assert (folder / CARD).exists() and size > 150e6
    assert taken < 80e6, f"{taken / 1e6:.0f} MB"


def trained_without_training(base: Path, folder: Path) -> Path:
    """A checkpoint with random factors and moved full weights, without a backward pass."""
    allocation = load_allocation(make_allocation(base, folder / "allocation"))
    model = apply_allocation(AutoModelForCausalLM.from_pretrained(base), allocation, rank=4, alpha=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3)
    save_checkpoint(model, base, folder / "allocation", folder / "step")
    return folder / "step"


def test_progress_counts_every_weight_once_and_lines_are_rare(runs, tmp_path, capsys):
    _, checkpoint = runs("qwen2")
    for format in ("merged", "adapter", "delta"):
        seen = []
        export_checkpoint(
            checkpoint,
            tmp_path / format,
            format=format,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] and len({total for _, total in seen}) == 1
    capsys.readouterr()
    lines = LineProgress("exporting", interval=0.0)
    lines(1, 4)
    assert capsys.readouterr().err.startswith("exporting 25% of 0.0 GB, ")
    quiet = LineProgress("exporting")
    quiet(1, 4)
    assert capsys.readouterr().err == ""


# -- the command, and what goes wrong -------------------------------------------------------------------------------


def run_command(capsys, *arguments: str) -> tuple[int, str, str]:
    # What making a checkpoint has printed is not the command's.
    capsys.readouterr()
    status = command.main(list(arguments))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_exports_applies_and_says_what_it_did(runs, tmp_path, capsys):
    _, checkpoint = runs("qwen2")
    status, out, err = run_command(
        capsys, f"checkpoint={checkpoint}", f"output_dir={tmp_path / 'delta'}", "format=delta", "dtype=float32"
    )
    assert (status, err) == (0, "") and "makes a model of it" in out and "the run's, from" in out
    status, out, err = run_command(
        capsys, f"delta={tmp_path / 'delta'}", f"output_dir={tmp_path / 'model'}", "max_shard_size=30KB"
    )
    assert (status, err) == (0, "") and "rounded by the run's thresholds" in out
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "checkpoint, output_dir: not given; write checkpoint=FOLDER output_dir=FOLDER"),
        (["delta=a"], "output_dir: not given; write output_dir=FOLDER"),
        (["checkpoint=a", "delta=b", "output_dir=c"], "checkpoint: given together with delta"),
        (["checkpoint=a"], "output_dir: not given"),
        (["checkpoint=a", "output_dir=c", "dtype=bf16"], "dtype: 'bf16' is not supported; choose one of auto"),
        (["checkpoint=a", "output_dir=c", "format=gguf"], "format: 'gguf' is not supported; choose one of merged"),
        (["checkpoint=a", "output_dir=c", "max_shard_size=5"], "max_shard_size: '5' is not usable; give a size such"),
        (["checkpoint=a", "output_dir=c", "max_shard_size=0GB"], "max_shard_size: '0GB' is not usable"),
        (["checkpoint=a", "output_dir=c", "max_shard_size=1GB", "format=adapter"], "max_shard_size: has no effect"),
        (["delta=a", "output_dir=c", "format=delta"], "format: a delta is exported from a checkpoint"),
        (["checkpoint=a", "output_dir=c", "fromat=delta"], "did you mean 'format'?"),
        (["delta={folder}", "output_dir={folder}/c"], "holds no delta.safetensors; give a folder that format=delta"),
        (["checkpoint={step}", "output_dir={step}"], "exists already; give a new folder"),
        (["checkpoint={step}", "output_dir={file}"], "exists already"),
        (["checkpoint={step}", "output_dir={file}/out"], "cannot be written (Not a directory)"),
        (["checkpoint={step}", "output_dir=/sys/out"], "cannot be written ("),
        (["checkpoint={step}", "output_dir={folder}/c", "base={folder}/no"], "base: there is no folder"),
        (["checkpoint={step}", "output_dir={folder}/c", "base={folder}"], "has no config.json; give the folder"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(runs, tmp_path, capsys, arguments, said):
    _, checkpoint = runs("qwen2")
    (tmp_path / "file").write_text("mine")
    places = {"folder": tmp_path, "step": checkpoint, "file": tmp_path / "file"}
    status, out, err = run_command(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 2 and out == "" and said in err
    assert err.count("\n") == 1 and err.startswith("hybrid-lora-export: ")
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("format", ["merged", "adapter", "delta"])
def test_a_disk_that_is_full_gets_one_line_and_leaves_nothing(runs, tmp_path, capsys, format):
    """The kernel ends every file at 8 KB, as a full disk would somewhere."""
    _, checkpoint = runs("qwen2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        status = command.main([f"checkpoint={checkpoint}", f"output_dir={tmp_path / 'out'}", f"format={format}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and "output_dir: " in err and "cannot be written (" in err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_found_before_anything_is_merged(runs, tmp_path, monkeypatch):
    _, checkpoint = runs("qwen2")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    progress = []
    with pytest.raises(ConfigurationError, match=r"cannot be written \(0.0 MB is free there, and it takes 0.1 MB"):
        export_checkpoint(checkpoint, tmp_path / "out", progress=lambda *seen: progress.append(seen))
    assert progress == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_an_export_and_leaves_nothing(runs, tmp_path, capsys, monkeypatch, number, status):
    _, checkpoint = runs("qwen2")
    # What making it printed, where no test before has made it.
    capsys.readouterr()

    class Interrupting(LineProgress):
        def __call__(self, done, total):
            if done > total / 2:
                signal.raise_signal(number)

    monkeypatch.setattr("hybrid_lora_plugin.cli.export_progress.progress_for", Interrupting)
    arguments = [f"checkpoint={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    assert command.main(arguments) == status
    assert capsys.readouterr().err == "hybrid-lora-export: interrupted, nothing was written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["merged", "adapter", "delta"])
def test_a_killed_export_leaves_nothing_that_looks_whole_and_can_be_made_again(runs, tmp_path, format):
    _, checkpoint = runs("qwen2")
    for moment in (0.05, 0.5, 0.99):

        def die(done, total, moment=moment):
            if done >= moment * total:
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if not child:
            try:
                export_checkpoint(checkpoint, tmp_path / "out", format=format, progress=die)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        # What is left is hidden, and no file in it has the name of a file that could be loaded before it is complete.
        (left,) = tmp_path.iterdir()
        assert left.name == ".out.writing"
        assert not {CARD, "adapter_config.json", "delta.json"} & {file.name for file in left.iterdir()}
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(left)
    again = export_checkpoint(checkpoint, tmp_path / "out", format=format).folder
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    assert_same_files(again, export_checkpoint(checkpoint, tmp_path / "other" / "out", format=format).folder)
