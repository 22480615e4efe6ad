"""Models and checkpoints that cannot be trained or synced: refused by how they are built, each in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from hybrid_lora_plugin.base_checkpoint import check_model_folder
from hybrid_lora_plugin.candidates import (
    FUSED_TYPES,
    find_candidates,
    find_candidates_from_config,
    meta_model,
)
from hybrid_lora_plugin.config import ModelConfig
from hybrid_lora_plugin.errors import ConfigurationError, split_reference
from hybrid_lora_plugin.linear_account import account_markdown, account_text, frozen_linear
from hybrid_lora_plugin.model_families import FAMILIES, refuse_config, untried
from hybrid_lora_plugin.probing.loading import check_model, load_model
from hybrid_lora_plugin.weight_loading import check_weights
from tests.support.tiny_families import SIZES, make_family
from tests.support.verl_processes import ROOT

SMALL = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"vocab_size": 50}
EXPERTS, MULTIMODAL, RECURRENT = (
    "mixture-of-experts-not-supported",
    "multimodal-model-not-supported",
    "recurrent-model-not-supported",
)
#: class of a config, what makes it small, and why it is refused
REFUSED = {
    "Qwen3MoeConfig": (SMALL | {"num_experts": 4, "moe_intermediate_size": 16}, EXPERTS),
    "MixtralConfig": (SMALL | {"num_local_experts": 4}, EXPERTS),
    "OlmoeConfig": (SMALL | {"num_experts": 4}, EXPERTS),
    "GptOssConfig": (SMALL | {"num_local_experts": 4}, EXPERTS),
    "Qwen2VLConfig": ({}, MULTIMODAL),
    "Qwen2_5_VLConfig": ({}, MULTIMODAL),
    "Qwen3VLConfig": ({}, MULTIMODAL),
    "Gemma3Config": ({}, MULTIMODAL),
    "Qwen3_5Config": ({}, MULTIMODAL),
    "T5Config": ({}, MULTIMODAL),
    "Qwen3NextConfig": (SMALL | {"num_experts": 0}, RECURRENT),
    "FalconH1Config": (SMALL | {"mamba_rms_norm": True}, RECURRENT),
    "MambaConfig": ({"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}, RECURRENT),
    "Lfm2Config": (SMALL | {"layer_types": ["conv", "full_attention"]}, RECURRENT),
}


def refusal(call, *arguments, **options) -> tuple[str, str]:
    """The line that a call is refused with, and its anchor."""
    with pytest.raises(ConfigurationError) as caught:
        call(*arguments, **options)
    text, anchor = split_reference(str(caught.value))
    assert "\n" not in text and text.startswith("model: ") and "; " in text, text
    return text, anchor


# -- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_cannot_be_synced_is_refused_by_name(kind):
    changes, anchor = REFUSED[kind]
    config = getattr(transformers, kind)(**changes)
    text, found = refusal(find_candidates_from_config, config)
    assert found == anchor and kind.removesuffix("Config").removesuffix("Text") in text


class Decoder(nn.Module):
    """A decoder layer with one candidate and something else in it."""

    def __init__(self, **parts: nn.Module | nn.Parameter):
        super().__init__()
        layer = nn.Module()
        layer.self_attn, layer.other = nn.Module(), nn.Module()
        layer.self_attn.q_proj = nn.Linear(4, 4)
        for name, part in parts.items():
            setattr(layer.other, name, part)
        self.layers = nn.ModuleList([layer])


@pytest.mark.parametrize(
    ("parts", "anchor", "where"),
    [
        ({"gate_up_proj": nn.Parameter(torch.ones(2, 4, 4))}, EXPERTS, "layers.0.other.gate_up_proj"),
        ({"experts": nn.ModuleList([nn.Linear(4, 4)])}, EXPERTS, "layers.0.other.experts"),
        ({"conv1d": nn.Conv1d(4, 4, 2)}, RECURRENT, "layers.0.other.conv1d"),
        ({"A_log": nn.Parameter(torch.ones(4))}, RECURRENT, "layers.0.other.A_log"),
    ],
    ids=["stacked experts", "listed experts", "convolution", "decay"],
)
def test_a_model_with_no_config_that_says_so_is_refused_by_its_modules(parts, anchor, where):
    """Also the workers see it so: what is applied there is this very function."""
    text, found = refusal(find_candidates, Decoder(**parts))
    assert found == anchor and where in text
    assert [candidate.type for candidate in find_candidates(Decoder(other=nn.Linear(4, 4)))] == ["q_proj"]


def test_a_quantised_model_of_the_hub_is_refused_by_its_config():
    config = transformers.Qwen2Config(**SMALL, quantization_config={"quant_method": "awq", "bits": 4})
    text, anchor = refusal(refuse_config, config)
    assert anchor == "quantised-checkpoint" and "awq" in text


def test_a_family_that_no_test_takes_all_the_way_is_said():
    for kind in ("Qwen2Config", "Phi3Config", "Gemma3TextConfig", "FalconH1Config", "Qwen3_5TextConfig"):
        assert untried(getattr(transformers, kind)()) is None
    assert "starcoder2" in untried(transformers.Starcoder2Config())


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_qwen2, tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(tiny_qwen2, tmp_path / "checkpoint")


def set_field(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_folder_with_an_adapter_is_refused(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{}")
    text, anchor = refusal(check_model_folder, checkpoint, safetensors=True)
    assert anchor == "checkpoint-with-an-adapter" and "merge_and_unload" in text
    assert refusal(check_model, ModelConfig(path=str(checkpoint)))[1] == anchor


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_a_quantised_folder_is_refused(checkpoint, file):
    if file == "config.json":
        set_field(checkpoint / file, quantization_config={"quant_method": "gptq"})
    else:
        (checkpoint / file).write_text(json.dumps({"quantization": {"quant_algo": "gptq"}}))
    text, anchor = refusal(check_model_folder, checkpoint, safetensors=True)
    assert anchor == "quantised-checkpoint" and file in text and "gptq" in text


def _shards(folder, there: bool = True, **changes):
    """Two files with an index in the place of one; ``changes`` are more entries of its map."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held} | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    if not there:
        (folder / "model-00002-of-00002.safetensors").unlink()


def _cut(file, bytes_):
    file.write_bytes(file.read_bytes()[:bytes_])


def _link(file):
    file.unlink()
    file.symlink_to("../blobs/0123")


POINTER = "version https://git-lfs.github.com/spec/v1\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DAMAGES = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "an absent shard": (lambda folder: _shards(folder, there=False), "names model-00002-of-00002.safetensors"),
    "a shard without its tensor": (
        lambda folder: _shards(folder, lost="model-00001-of-00002.safetensors"),
        "puts lost into model-00001-of-00002.safetensors, which does not hold it (1 such names)",
    ),
    "weights twice": (
        lambda folder: (
            shutil.copy(folder / WEIGHTS, folder / "kept"),
            _shards(folder),
            (folder / "kept").rename(folder / WEIGHTS),
        ),
        "the trainer would read the one",
    ),
    "a pointer": (lambda folder: (folder / WEIGHTS).write_text(POINTER), "git lfs pull"),
    "a pointer for the index": (lambda folder: (folder / INDEX).write_text(POINTER), "git lfs pull"),
    "a pointer for the tokenizer": (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "git lfs pull"),
    "a dangling link": (lambda folder: _link(folder / WEIGHTS), "is a link to ../blobs/0123, which is not there"),
    "cut in its weights": (lambda folder: _cut(folder / WEIGHTS, -4), "bytes where its header describes"),
    "cut in its header": (lambda folder: _cut(folder / WEIGHTS, 200), "is no safetensors file (200 bytes; its header"),
    "cut to nothing": (lambda folder: _cut(folder / WEIGHTS, 0), "is no safetensors file (0 bytes; "),
    "not safetensors": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"\x02" + bytes(7) + b"[]"),
        "is no safetensors file",
    ),
    "no index": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / INDEX).write_text("[]")),
        "is no index of weights",
    ),
    "an unknown name": (
        lambda folder: (folder / WEIGHTS).rename(folder / "consolidated.safetensors"),
        "has no weights under a name that is read (consolidated.safetensors)",
    ),
    "another format": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        "has its weights in pytorch_model.bin",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_without_weights_that_vllm_can_load_is_refused(checkpoint, damage):
    spoil, words = DAMAGES[damage]
    spoil(checkpoint)
    text, anchor = refusal(check_model_folder, checkpoint, safetensors=True)
    assert anchor == "checkpoint-without-weights" and words in text
    if damage == "another format":
        check_model_folder(checkpoint, safetensors=False)
    else:
        assert refusal(check_model_folder, checkpoint, safetensors=False)[0] == text


def test_a_whole_folder_passes(checkpoint):
    check_model_folder(checkpoint, safetensors=True)
    check_model(ModelConfig(path=str(checkpoint)))
    _shards(checkpoint)
    check_model_folder(checkpoint, safetensors=True)
    check_model(ModelConfig(path=str(checkpoint)))


# -- what transformers would load -------------------------------------------------------------------------------------

NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


def _prefixed(prefix):
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


#: what happens to the tensors of a checkpoint, and words of the refusal
CHANGED = {
    "torch.compile": (_prefixed("_orig_mod."), ["_orig_mod.model.embed_tokens.weight", "without '_orig_mod.'"]),
    "data parallel": (_prefixed("module."), ["27 weights of the model are in none", "26 tensors in its files"]),
    "PEFT": (_prefixed("base_model.model."), ["without 'base_model.model.'"]),
    "a lost norm": (
        lambda w: {n: t for n, t in w.items() if n != NORM},
        [f"1 weights of the model are in none of its files ({NORM})"],
    ),
    "a layer more": (
        lambda w: w | {"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)},
        ["1 tensors in its files belong to no part of the model (model.layers.2.mlp.up_proj.weight)"],
    ),
    "a value head": (lambda w: w | {"v_head.weight": torch.ones(1, 32)}, ["(v_head.weight)"]),
    "another shape": (lambda w: w | {NORM: torch.ones(31)}, [f"{NORM} [31] in the files and [32] in the model"]),
    "another vocabulary": (lambda w: w | {EMBEDDING: torch.ones(9, 32)}, [f"{EMBEDDING} [9, 32] in the files"]),
    "another head under a tied config": (
        lambda w: w | {HEAD: w[EMBEDDING] + 1},
        [f"other values in {HEAD} than in {EMBEDDING}", "tie_word_embeddings: false"],
    ),
}


def change_weights(folder, change):
    weights = change(load_file(folder / WEIGHTS))
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )


@pytest.mark.parametrize("changed", CHANGED)
def test_weights_that_are_not_the_models_are_refused_by_name_and_number(checkpoint, checked, capfd, changed):
    """transformers fills them with random numbers, or leaves them out, in a warning: before this, exit status 0."""
    change, words = CHANGED[changed]
    change_weights(checkpoint, change)
    for call, argument in ((check_model, ModelConfig(path=str(checkpoint))), (checked, run_of(checkpoint))):
        text, anchor = refusal(call, argument)
        assert anchor == "checkpoint-does-not-fit-its-config"
        assert str(checkpoint) in text and all(word in text for word in words), text
    assert "MISSING" not in "".join(capfd.readouterr()), "transformers' own report beside the line"


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w | {HEAD: w[EMBEDDING].clone()},
        lambda w: {n: t for n, t in w.items() if n != EMBEDDING} | {HEAD: w[EMBEDDING]},
        lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        lambda w: {n.removeprefix("model."): t for n, t in w.items()},
    ],
    ids=["a tied head twice", "a tied head alone", "a buffer that is computed", "without the outer name"],
)
def test_what_transformers_reads_as_the_same_model_passes(checkpoint, change):
    change_weights(checkpoint, change)
    check_weights(checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_and_misses_what_is_lost(family, tmp_path):
    folder = make_family(family, tmp_path / "model")
    check_weights(folder)
    norm = "model.final_layernorm.weight" if family == "falcon_h1" else NORM
    change_weights(folder, lambda w: {n: t for n, t in w.items() if n != norm})
    assert norm in refusal(check_weights, folder)[0]


def test_the_report_of_what_was_loaded_is_read_too(checkpoint):
    """Of a name on a hub and of a GGUF file nothing can be asked before."""
    change_weights(checkpoint, CHANGED["a lost norm"][0])
    text, _ = refusal(load_model, ModelConfig(path=str(checkpoint)), torch.device("cpu"))
    assert NORM in text


# -- the account ------------------------------------------------------------------------------------------------------


def test_every_linear_module_is_a_candidate_or_accounted_for_and_the_shares_add_up():
    for config in (
        transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
        transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
        transformers.Phi3Config(**SMALL, pad_token_id=0),
        # A gate beside the known projections, a head of two, and MLPs with names of their own.
        transformers.Starcoder2Config(**SMALL),
    ):
        model = meta_model(config)
        candidates, parameters = find_candidates(model), sum(p.numel() for p in model.parameters())
        frozen = frozen_linear(model, candidates)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        assert len(linear) == len(candidates) + sum(one.modules for one in frozen)
        rows = account_markdown(candidates, frozen, parameters)[2:]
        cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
        parts = [int(size.replace(",", "")) for what, _, size, *_ in cells if what != "all candidates"]
        assert sum(parts) == parameters and min(parts) >= 0
        text = account_text(candidates, frozen, parameters)
        assert len(text) == len(rows) and len({line.index("%") for line in text}) == 1


def test_reasons_name_what_a_frozen_module_is():
    tied = meta_model(transformers.Qwen2Config(**SMALL, tie_word_embeddings=True))
    untied = meta_model(transformers.Qwen2Config(**SMALL, tie_word_embeddings=False))
    (head,) = frozen_linear(tied, find_candidates(tied))
    assert (head.name, head.parameters, head.reason) == ("lm_head", 0, "its weight is the embedding's")
    (head,) = frozen_linear(untied, find_candidates(untied))
    assert head.parameters == 50 * SIZES["hidden_size"] and "outside the decoder layers" in head.reason
    other = meta_model(transformers.Starcoder2Config(**SMALL))
    found = {one.name: one for one in frozen_linear(other, find_candidates(other))}
    assert found["model.layers.*.mlp.c_fc"].modules == 2
    assert "type that is no candidate" in found["model.layers.*.mlp.c_fc"].reason


def test_fused_projections_are_candidates_of_their_own_types():
    config = transformers.Phi3Config(**SMALL, pad_token_id=0)
    candidates = [c for c in find_candidates_from_config(config) if c.layer == 0]
    assert [c.type for c in candidates] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert [c.component for c in candidates] == ["attention", "attention", "mlp", "mlp"]
    assert {c.type for c in candidates} > FUSED_TYPES.keys()


# -- on the driver ----------------------------------------------------------------------------------------------------


def run_of(path, **rollout):
    """As much of a run's configuration as the check reads."""
    rollout = {"load_format": "safetensors", "tensor_model_parallel_size": 1} | rollout
    node = {"model": {"path": str(path)}, "rollout": rollout}
    return OmegaConf.create({"algorithm": {}, "actor_rollout_ref": node})


@pytest.fixture
def checked():
    from hybrid_lora_plugin.verl_backend.model_check import checked_model

    return checked_model


def test_the_driver_says_what_trains_and_what_stays_frozen(checked, tiny_qwen2, capsys):
    config, candidates = checked(run_of(tiny_qwen2))
    assert config.model_type == "qwen2" and len(candidates) == 14
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith("hybrid_lora: ") for line in said) and len(said) == 1 + 7 + 1 + 1 + 1
    assert any("q_proj" in line and "candidate, attention" in line for line in said)
    assert any("lm_head" in line and "its weight is the embedding's" in line for line in said)


@pytest.mark.parametrize("kind", ["Qwen3MoeConfig", "Gemma3Config", "FalconH1Config"])
def test_the_driver_refuses_a_folder_and_a_name_on_the_hub_by_its_config_alone(
    checked, kind, tmp_path, monkeypatch, capsys
):
    changes, anchor = REFUSED[kind]
    config = getattr(transformers, kind)(**changes)
    # A folder needs weights to get that far.
    folder = tmp_path / "folder"
    config.save_pretrained(folder)
    save_file({"weight": torch.ones(1)}, folder / WEIGHTS)
    assert refusal(checked, run_of(folder))[1] == anchor
    # The hub's own layout on this machine: a name of which nothing but the config has been fetched.
    snapshot = tmp_path / "hub/models--some--model/snapshots/0123456789abcdef0123456789abcdef01234567"
    config.save_pretrained(snapshot)
    (tmp_path / "hub/models--some--model/refs").mkdir()
    (tmp_path / "hub/models--some--model/refs/main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert refusal(checked, run_of("some/model"))[1] == anchor
    # One that cannot be fetched is left to the workers, in words.
    assert checked(run_of("some/other-model")) is None
    said = capsys.readouterr().out
    assert "actor_rollout_ref.model.path: 'some/other-model' cannot be checked on the driver" in said
    assert "the workers check it" in said


def test_the_driver_leaves_what_is_on_another_file_system_to_the_workers(checked, capsys):
    assert checked(run_of("hdfs://place/model")) is None
    assert "it is not on this machine" in capsys.readouterr().out


def test_the_driver_asks_for_what_the_rollout_engine_loads(checked, checkpoint):
    torch.save(load_file(checkpoint / WEIGHTS), checkpoint / "pytorch_model.bin")
    (checkpoint / WEIGHTS).unlink()
    assert refusal(checked, run_of(checkpoint))[1] == "checkpoint-without-weights"
    assert checked(run_of(checkpoint, load_format="auto")) is not None
    (checkpoint / "pytorch_model.bin").write_bytes(b"no archive")
    assert "cannot be loaded (" in refusal(checked, run_of(checkpoint, load_format="auto"))[0]


def test_packed_projections_take_one_rollout_worker_each(checked, tmp_path):
    model = make_family("phi3", tmp_path / "model")
    with pytest.raises(ConfigurationError) as caught:
        checked(run_of(model, tensor_model_parallel_size=2))
    text, anchor = split_reference(str(caught.value))
    assert anchor == "packed-weight-over-several-workers" and "tensor_model_parallel_size: 2" in text
    assert "gate_up_proj and qkv_proj" in text
    assert checked(run_of(model)) is not None


@pytest.mark.parametrize(("family", "packed"), [("falcon_h1", "in_proj"), ("qwen3_5_text", "in_proj_qkv")])
def test_a_recurrent_model_takes_one_worker_and_whole_rows_and_is_told_of_packing(
    checked, family, packed, tmp_path, capsys
):
    run = run_of(make_family(family, tmp_path / "model"))
    checked(run)
    said = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(said) == 1 and "actor_rollout_ref.model.use_remove_padding: True packs rows" in said[0]
    assert "give actor_rollout_ref.model.use_remove_padding=false" in said[0] and "#packed-rows-differ]" in said[0]
    run.actor_rollout_ref.model.use_remove_padding = False
    checked(run)
    assert "WARNING" not in capsys.readouterr().out
    for place in ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size"):
        split = run.copy()
        OmegaConf.update(split, f"actor_rollout_ref.actor.{place}", 2, force_add=True)
        with pytest.raises(ConfigurationError, match=rf"^actor_rollout_ref.actor.{place}: 2, but .*; give 1"):
            checked(split)
    run.actor_rollout_ref.rollout.tensor_model_parallel_size = 2
    with pytest.raises(ConfigurationError, match=f"tensor_model_parallel_size: 2, but the {packed} of this model"):
        checked(run)


def test_a_kernel_without_the_cap_of_a_model_is_said(checked, tmp_path, capsys):
    run = run_of(make_family("gemma2", tmp_path / "model"))
    for kernel, warned in (("flash_attention_2", False), ("sdpa", True)):
        run.actor_rollout_ref.model.override_config = {"attn_implementation": kernel}
        checked(run)
        assert ("WARNING" in capsys.readouterr().out) is warned


def test_the_workers_refuse_what_the_driver_could_not_see(cases):
    """The same function, from where every worker builds the model it trains."""
    from hybrid_lora_plugin.training.apply import apply_allocation

    changes, anchor = REFUSED["Qwen3MoeConfig"]
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**changes))
    assert refusal(apply_allocation, model, cases["tied"].allocation)[1] == anchor


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_lists_the_families_that_a_test_takes_all_the_way():
    page = (ROOT / "docs/models.md").read_text()
    supported = page.partition("## Supported")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in supported.splitlines() if row.startswith("| ")]
    assert {model_type.strip("`"): name for name, model_type, *_ in rows[1:] if model_type != "---"} == FAMILIES
