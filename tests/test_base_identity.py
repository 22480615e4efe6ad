"""A base model is known again by its weights, wherever they lie; another one of the same shape is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin.base_identity import first_difference, weight_digests
from hybrid_lora_plugin.cli.export import main
from tests.support.hybrid_checkpoint import make_hybrid_checkpoint
from tests.support.tiny_models import make_tiny_qwen2

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In bfloat16, as people's checkpoints are."""
    folder = make_tiny_qwen2(tmp_path_factory.mktemp("base") / "model")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    """A run's checkpoint, as the engine writes it."""
    return make_hybrid_checkpoint(base, tmp_path_factory.mktemp("run"), base_dtype="bfloat16")


def rewritten(base, folder, change=lambda weights: weights, shard=None):
    """A copy of ``base`` with changed tensors."""
    shutil.copytree(base, folder)
    weights = {name: tensor.contiguous() for name, tensor in change(load_file(folder / WEIGHTS)).items()}
    if shard is None:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        return folder
    (folder / WEIGHTS).unlink()
    names = list(weights)
    files = {f"model-0000{part + 1}-of-00003.safetensors": names[part::3] for part in range(3)}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


NORM = "model.norm.weight"
SAME = {
    "moved": dict(),
    "in other shards": dict(shard=3),
    "in a wider type": dict(change=lambda w: {name: tensor.float() for name, tensor in w.items()}),
    "a tied head twice": dict(change=lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}),
}
OTHER = {
    "one number of a norm": lambda w: w | {NORM: w[NORM] + torch.eye(32, dtype=torch.bfloat16)[3]},
    "one row of the embedding": lambda w: {
        n: t.index_add(0, torch.tensor([5]), torch.ones(1, 32, dtype=t.dtype)) if "embed" in n else t
        for n, t in w.items()
    },
    "trained on": lambda w: {n: (t.float() * 1.01).bfloat16() for n, t in w.items()},
    "in a narrower type": lambda w: {n: t.to(torch.float8_e4m3fn).bfloat16() for n, t in w.items()},
}


@pytest.mark.parametrize("copy", SAME)
def test_a_copy_of_the_right_base_is_the_same_and_exports_the_same_weights(base, checkpoint, tmp_path, capsys, copy):
    other = rewritten(base, tmp_path / "copy", **SAME[copy])
    assert first_difference(weight_digests(base), weight_digests(other)) is None
    for name, given in (("right", base), ("copy", other)):
        assert main([f"checkpoint={checkpoint}", f"base={given}", f"output_dir={tmp_path / ('out-' + name)}"]) == 0
    assert "was not compared" not in capsys.readouterr().out
    weights = [load_file(tmp_path / folder / WEIGHTS) for folder in ("out-right", "out-copy")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("change", OTHER)
def test_other_weights_under_the_same_config_are_another_base(base, tmp_path, change):
    other = rewritten(base, tmp_path / "other", OTHER[change])
    assert "has other values, as have " in first_difference(weight_digests(base), weight_digests(other))


def exported(checkpoint, tmp_path, capsys, *arguments):
    capsys.readouterr()
    status = main([f"checkpoint={checkpoint}", f"output_dir={tmp_path / 'out'}", *arguments])
    return status, capsys.readouterr()


def test_an_export_onto_another_seed_is_refused(checkpoint, tmp_path, capsys):
    """Before: exit status 0, and a model that nobody trained."""
    other = make_tiny_qwen2(tmp_path / "other", seed=1)
    status, said = exported(checkpoint, tmp_path, capsys, f"base={other}")
    assert status == 2 and said.err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"base: {str(other)!r} is not the model that the run started from: model." in said.err
    assert "of 26 tensors; give base=PATH" in said.err and "#checkpoint-of-another-base-model]" in said.err


def test_a_base_that_was_overwritten_since_is_refused(base, checkpoint, tmp_path, capsys):
    """Where the checkpoint itself says that its base lies."""
    moved = shutil.copytree(checkpoint, tmp_path / "actor")
    place = rewritten(base, tmp_path / "place")
    file = moved / "hybrid_lora" / "trainables.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model": str(place)}))
    assert exported(moved, tmp_path, capsys)[0] == 0
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(place)
    rewritten(base, place, OTHER["trained on"])
    status, said = exported(moved, tmp_path, capsys)
    assert status == 2 and f"{str(place)!r} is not the model that the run started from" in said.err


@pytest.mark.parametrize("damage", ["an adapter", "a lost norm"])
def test_an_export_asks_of_its_base_what_a_run_asks(base, checkpoint, tmp_path, capsys, damage):
    """Before: the adapter was merged in, and the norm was random."""
    if damage == "an adapter":
        other = rewritten(base, tmp_path / "other")
        (other / "adapter_config.json").write_text("{}")
        words = "holds an adapter"
    else:
        other = rewritten(base, tmp_path / "other", lambda w: {n: t for n, t in w.items() if n != NORM})
        words = f"1 weights of the model are in none of its files ({NORM})"
    status, said = exported(checkpoint, tmp_path, capsys, f"base={other}")
    assert status == 2 and said.err.startswith("hybrid-lora-export: base: ") and words in said.err
    assert said.err.count("\n") == 1


def test_a_checkpoint_from_before_says_that_nothing_was_compared(checkpoint, tmp_path, capsys):
    old = shutil.copytree(checkpoint, tmp_path / "actor")
    (old / "hybrid_lora" / "base_weights.json").unlink()
    status, said = exported(old, tmp_path, capsys)
    assert status == 0 and "was not compared with the model that the run started from" in said.out


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": 1}'])
def test_a_damaged_record_is_refused(checkpoint, tmp_path, capsys, text):
    old = shutil.copytree(checkpoint, tmp_path / "actor")
    (old / "hybrid_lora" / "base_weights.json").write_text(text)
    status, said = exported(old, tmp_path, capsys)
    assert status == 2 and "base_weights.json' cannot be read" in said.err


def test_large_tensors_are_sampled_over_their_whole_length(tmp_path):
    """And a change of a part as long as the gap between two samples is always seen."""
    values = torch.arange(3 << 20, dtype=torch.float32)
    save_file({"w": values}, tmp_path / WEIGHTS)
    before = weight_digests(tmp_path)
    gap = len(values) // 255
    for start in (0, 1_000_000, len(values) - gap):
        changed = values.clone()
        changed[start : start + gap] += 1
        save_file({"w": changed}, tmp_path / WEIGHTS)
        assert weight_digests(tmp_path) != before


def test_what_is_not_in_safetensors_or_not_here_has_no_digests(tmp_path):
    assert weight_digests(tmp_path) is None and weight_digests("some/model-that-is-not-here") is None
