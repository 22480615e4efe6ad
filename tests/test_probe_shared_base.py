"""The base of a probe on several ranks: read by the first alone, and the same bits in every shard as if all read it."""

import json
import shutil
from functools import partial

import pytest
import torch
from torch import distributed, multiprocessing

from hybrid_lora_plugin.candidates import find_candidates
from hybrid_lora_plugin.config import ModelConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.probing.distributed import Ranks, place
from hybrid_lora_plugin.probing.forward import IGNORED, Batch, Passes
from hybrid_lora_plugin.probing.layers import attach
from hybrid_lora_plugin.probing.loading import load_model
from hybrid_lora_plugin.probing.shared_base import load_base, sent_by_first
from tests.support.tiny_families import make_family

#: tied with a bias, untied in bfloat16, two kinds of rotary buffers and a buffer that scales, rope that changes with
#: the length, code of the checkpoint's own
CASES = {
    "qwen2": "float32",
    "glm4": "bfloat16",
    "gemma3_text": "float32",
    "llama": "bfloat16",
    "own code": "float32",
}
CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM


class OwnConfig(Qwen2Config):
    model_type = "qwen2"


class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = 1.5

    def forward(self, *arguments, **named):
        found = super().forward(*arguments, **named)
        found.logits = found.logits * self.scale
        return found
"""


def make(case, folder):
    if case != "own code":
        make_family(case, folder)
        if case == "llama":
            change(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
        return
    make_family("qwen2", folder)
    (folder / "modeling_own.py").write_text(CODE)
    change(
        folder,
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )


def change(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def shared(folder, dtype, ranks):
    config = ModelConfig(path=str(folder), dtype=dtype, trust_remote_code=True)
    model = load_base(config, ranks)
    assert ranks.first or all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return placed(model, ranks, send=True)


def placed(model, ranks, send=False):
    candidates = find_candidates(model)
    layers = attach(model, candidates, 2, seed=0)
    replicated = [parameter for layer in layers.values() for parameter in (layer.A, layer.B, layer.e, layer.alpha)]
    for parameter in replicated:
        parameter.data.fill_(0.05)
    around = {"around": partial(sent_by_first, replicated=replicated, ranks=ranks)} if send else {}
    place(model, candidates, replicated, ranks, **around)
    return model, replicated


def state(model):
    """All that a rank holds, by name, tied ones under each name."""
    found = {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    found |= dict(model.named_buffers(remove_duplicate=False))
    return {
        name: (tensor.dtype, tensor.requires_grad, tuple(tensor.shape), getattr(tensor, "_local_tensor", tensor))
        for name, tensor in found.items()
    }


def differing(model, other):
    got, want = state(model), state(other)
    assert got.keys() == want.keys()
    return [name for name in got if got[name][:3] != want[name][:3] or not torch.equal(got[name][3], want[name][3])]


def passed(model, replicated, ranks):
    ids = torch.arange(60).reshape(4, 15) % 40
    labels = ids.clone()
    labels[:, :5] = IGNORED
    loss = Passes(model, ranks).backward(Batch(ids, torch.ones_like(ids), labels), replicated)
    return loss, torch.cat([parameter.grad.flatten() for parameter in replicated])


def _one_of_many(rank, count, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store{count}", rank=rank, world_size=count)
    ranks = Ranks(torch.device("cpu"))
    found = {}
    for case, dtype in CASES.items():
        # The others have a config and no weights at all.
        mine = folder / case / ("whole" if rank == 0 else "config")
        model, replicated = shared(mine, dtype, ranks)
        config = ModelConfig(path=str(folder / case / "whole"), dtype=dtype, trust_remote_code=True)
        other, others = placed(load_model(config, ranks.device), ranks)
        loss, gradient = passed(model, replicated, ranks)
        loss_then, gradient_then = passed(other, others, ranks)
        found[case] = {
            "differing": differing(model, other),
            "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            "tied then": other.get_output_embeddings().weight is other.get_input_embeddings().weight,
            "same pass": loss == loss_then and torch.equal(gradient, gradient_then),
            "loss": loss,
            "dtype": str(model.dtype),
        }
    for name, path in (("no weights", folder / "qwen2" / "config"), ("another", folder / "qwen2" / "whole")):
        mine = folder / "glm4" / "config" if name == "another" and rank else path
        try:
            load_base(ModelConfig(path=str(mine), dtype="float32"), ranks)
        except ConfigurationError as error:
            found[name] = str(error)
    torch.save(found, f"{folder}/{count}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for case in CASES:
        make(case, folder / case / "whole")
        (folder / case / "config").mkdir()
        for file in (folder / case / "whole").iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder / case / "config")
    return folder


@pytest.mark.ranks
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_without_weights_hold_and_compute_what_ranks_that_load_them_do(folder, count):
    multiprocessing.start_processes(_one_of_many, (count, folder), nprocs=count, start_method="fork")
    for rank in range(count):
        found = torch.load(folder / f"{count}-{rank}.pt")
        for case, dtype in CASES.items():
            assert found[case]["differing"] == [], (case, rank)
            assert found[case]["same pass"], (case, rank)
            assert found[case]["tied"] == found[case]["tied then"] == (case in ("qwen2", "gemma3_text", "own code"))
            assert found[case]["dtype"] == f"torch.{dtype}"
            assert found[case]["loss"] > 0.5
        assert "cannot be loaded" in found["no weights"]
        assert "is another model here than on the first rank" in found["another"]
