"""What people bring that cannot be used: one table of cases, each with words that the one line about it must hold.

``tests/test_bad_input.py`` gives every case to the real command. A case changes good input at a place of its own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
Options = Mapping[str, Any]


@dataclass
class Place:
    """A folder of its own, with good input that a case may spoil.

    Attributes:
        root: where everything lies.
        source: a good model, artifact (``allocation``) and checkpoint (``actor``), not to be changed.
    """

    root: Path
    source: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def copy(self, name: str) -> Path:
        """A copy of one of the sources, made once."""
        if not (self.root / name).exists():
            shutil.copytree(self.source / name, self.root / name)
        return self.root / name

    @property
    def model(self) -> Path:
        return self.copy("model")

    @property
    def artifact(self) -> Path:
        return self.copy("allocation")

    @property
    def checkpoint(self) -> Path:
        return self.copy("actor") / "hybrid_lora"

    def write(self, name: str, content: str | bytes) -> Path:
        file = self.root / name
        file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        return file

    def rows(self, count: int = 12) -> Path:
        rows = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(count)]
        return self.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Case:
    """One thing that somebody brings.

    Attributes:
        start: name of the good options that it starts from, a key of ``GOOD``.
        spoil: place -> options to change, None to leave one out; or nothing, after it has changed a file.
        says: words of the line: the field, the value, the way out.
        options: the same without a function.
        limit: bytes at which files end, as on a full disk.
        begun: whether it is found in the middle of a probe, whose state is then kept.
    """

    start: str
    says: tuple[str, ...]
    spoil: Callable[[Place], Options | Any] = lambda place: None
    options: Options = field(default_factory=dict)
    limit: int | None = None
    begun: bool = False

    @property
    def command(self) -> str:
        return {"choose": "probe"}.get(self.start, self.start)

    def arguments(self, place: Place) -> list[str]:
        changed = self.spoil(place)
        options = GOOD[self.start](place) | (changed if isinstance(changed, dict) else {}) | self.options
        return [f"{name}={value}" for name, value in options.items() if value is not None]


GOOD: dict[str, Callable[[Place], dict[str, Any]]] = {
    "probe": lambda place: {
        "model.path": place.model,
        "probe.files": place.rows() if not (place.root / "rows.jsonl").exists() else place.root / "rows.jsonl",
        "output_dir": place.out,
        "probe.warmup_steps": 2,
        "probe.partitions": 2,
        "probe.batch_size": 2,
        "probe.max_length": 64,
        "lora.rank": 2,
        "budget.ratio": 0.3,
    },
    # Of a criterion that needs no probe.
    "choose": lambda place: {
        "model.path": place.model,
        "output_dir": place.out,
        "criterion": "spread",
        "lora.rank": 2,
        "budget.ratio": 0.5,
    },
    "allocate": lambda place: {"artifact": place.artifact, "output_dir": place.out},
    "compare": lambda place: {"allocations": f"[{place.artifact},{place.artifact}]", "output_dir": place.out},
    "export": lambda place: {"checkpoint": place.checkpoint, "output_dir": place.out, "base": place.model},
    "doctor": lambda place: {"check": "source"},
}


# -- how input is spoilt ----------------------------------------------------------------------------------------------


def edit(file: Path, **fields: Any) -> None:
    """Change or, with ``...``, remove fields of a JSON object."""
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def config_of(**fields: Any) -> Callable[[Place], None]:
    return lambda place: edit(place.model / "config.json", **fields)


def weights_of(change: Callable[[dict], dict]) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        weights = {name: tensor.contiguous() for name, tensor in change(load_file(place.model / WEIGHTS)).items()}
        save_file(weights, place.model / WEIGHTS, metadata={"format": "pt"})

    return spoil


def prefixed(prefix: str) -> Callable[[Place], None]:
    return weights_of(lambda weights: {prefix + name: tensor for name, tensor in weights.items()})


def cut(name: str, keep: int, folder: str = "model") -> Callable[[Place], None]:
    """End a file after ``keep`` bytes, or that many before its end."""

    def spoil(place: Place) -> None:
        file = place.copy(folder) / name
        file.write_bytes(file.read_bytes()[:keep])

    return spoil


def put(name: str, content: str | bytes, folder: str = "model") -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        file = place.copy(folder) / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def remove(*names: str, folder: str = "model") -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        for name in names:
            (place.copy(folder) / name).unlink()

    return spoil


def rename(name: str, new: str) -> Callable[[Place], None]:
    return lambda place: (place.model / name).rename(place.model / new) and None


def link(place: Place) -> None:
    (place.model / WEIGHTS).unlink()
    (place.model / WEIGHTS).symlink_to("../blobs/0123")


def shards(lost: bool = False, single: bool = False, **more: str) -> Callable[[Place], None]:
    """Two files and an index in the place of one; without the second, beside the one, or with more names."""

    def spoil(place: Place) -> None:
        weights = load_file(place.model / WEIGHTS)
        files = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
        weight_map = {name: files[number % 2] for number, name in enumerate(sorted(weights))}
        for file in files:
            save_file({n: t for n, t in weights.items() if weight_map[n] == file}, place.model / file)
        (place.model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | more}))
        if not single:
            (place.model / WEIGHTS).unlink()
        if lost:
            (place.model / files[1]).unlink()

    return spoil


def rows_are(content: str | bytes, name: str = "rows.jsonl") -> Callable[[Place], Options]:
    return lambda place: {"probe.files": place.write(name, content)}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def allocation(**fields: Any) -> Callable[[Place], None]:
    return lambda place: edit(place.artifact / "allocation.json", **fields)


def text_of_allocation(change: Callable[[str], str]) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        file = place.artifact / "allocation.json"
        file.write_text(change(file.read_text()))

    return spoil


def inside(change: Callable[[dict], Any]) -> Callable[[Place], None]:
    """Change the parsed allocation in place."""

    def spoil(place: Place) -> None:
        file = place.artifact / "allocation.json"
        payload = json.loads(file.read_text())
        change(payload)
        file.write_text(json.dumps(payload))

    return spoil


def description(**fields: Any) -> Callable[[Place], None]:
    return lambda place: edit(place.checkpoint / "trainables.json", **fields)


def trained(change: Callable[[dict], dict]) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        file = place.checkpoint / "trainables.safetensors"
        save_file(change(load_file(file)), file)

    return spoil


def without(name: str) -> Callable[[dict], dict]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


GOOD_ROW = {"prompt": "1+1=", "response": "2"}
CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
FULL = "model.layers.0.self_attn.k_proj"


def given(*says: str, start: str = "probe", **options: Any) -> Case:
    """A case of options alone; ``__`` stands for a dot."""
    return Case(start, says, options={name.replace("__", "."): value for name, value in options.items()})


# -- the table --------------------------------------------------------------------------------------------------------

COMMANDS = {
    "nothing at all": Case(
        "probe",
        ("model.path, output_dir, probe.files: not given", "write model.path="),
        lambda place: dict.fromkeys(GOOD["probe"](place)),
    ),
    "no model": given("model.path: not given; write model.path=", model__path=None),
    "an empty output folder": given("output_dir: not given; write output_dir=", output_dir=""),
    "no rows": given("probe.files: not given; write probe.files=[", probe__files=None),
    "a typo": given("unknown option 'probe.warmup_step'", "did you mean 'probe.warmup_steps'", probe__warmup_step=3),
    "an option as a run has it": given(
        "unknown option 'hybrid_lora.lora.rank'; a command takes it as 'lora.rank'", **{"hybrid_lora.lora.rank": 3}
    ),
    "an option of a run": given(
        "unknown option 'sync_check'; a run reads it, as 'hybrid_lora.sync_check'", sync_check=3
    ),
    "dashes": given("unknown option '--output_dir'", "did you mean 'output_dir'", **{"--output_dir": "x"}),
    "a word for a number": given("probe.lr: 'fast'", "give a number", probe__lr="fast"),
    "a fraction for a count": given("probe.seed: '1.5'", "give a whole number", probe__seed=1.5),
    "a word for yes or no": given(
        "model.trust_remote_code: 'maybe'", "true or false", model__trust_remote_code="maybe"
    ),
    "a list without an end": given("probe.files: '[a'", "give a list", probe__files="[a"),
    "a rate that is no number": given("probe.lr: nan", "give a learning rate above 0", probe__lr="nan"),
    "an infinite rate": given("probe.lr: inf", "give a learning rate above 0", probe__lr="inf"),
    "a rate below 0": given("probe.lr: -1.0", "give a learning rate above 0", probe__lr=-1),
    "steps below 0": given("probe.warmup_steps: -1", "0 or more", probe__warmup_steps=-1),
    "one partition": given("probe.partitions: 1", "at least 2", probe__partitions=1),
    "more partitions than batches": given("probe.partitions_per_batch: 2", "half", probe__partitions_per_batch=2),
    "no rows in a batch": given("probe.batch_size: 0", "at least 1", probe__batch_size=0),
    "no rows in a pass": given("probe.micro_batch_size: 0", "at least 1", probe__micro_batch_size=0),
    "rows of one token": given("probe.max_length: 1 ", "at least 2", probe__max_length=1),
    "an unknown objective": given("probe.objective: 'dpo'", "choose one of sft, policy", probe__objective="dpo"),
    "an objective of runs": given(
        "probe.objective: 'policy'", "hybrid_lora.probe.objective=policy there", probe__objective="policy"
    ),
    "an unknown initialisation": given("probe.init: 'svd'", "choose one of default, adalora", probe__init="svd"),
    "an unknown type": given("model.dtype: 'float16'", "choose one of auto, float32, bfloat16", model__dtype="float16"),
    "an unknown criterion": given("criterion: 'hybird'", "choose one of hybrid", criterion="hybird"),
    "a trial without rates": given("trial.full_lr: nothing given", "give trial.full_lr", criterion="trial"),
    "steps of a trial without one": given("trial.steps: 5 has no effect", "with criterion=trial", trial__steps=5),
    "an unknown direction": given("direction: 'up'", "choose one of auto, lowest, highest", direction="up"),
    "an unknown normalisation": given("normalise: 'l2'", "choose one of none", normalise="l2"),
    "a normalisation without meaning": given(
        "normalise: 'sqrt_dims' has no meaning", "normalise=none", start="choose", normalise="sqrt_dims"
    ),
    "no budget": given("budget.ratio: 0.0", "a fraction in (0, 1]", budget__ratio=0),
    "a budget of more than all": given("budget.ratio: 1.5", "a fraction in (0, 1]", budget__ratio=1.5),
    "a budget that is no number": given("budget.ratio: nan", "a fraction in (0, 1]", budget__ratio="nan"),
    "an unknown budget": given("budget.mode: 'layers'", "choose one of parameters", budget__mode="layers"),
    "a total that is not said": given(
        "budget.total: None", "give the largest number", budget__mode="total_trainable", budget__ratio=None
    ),
    "a budget for nothing": given("budget.ratio: 0.0001", "give at least", budget__ratio=0.0001),
    "a total below the adapters": given(
        "budget.total: 9",
        "LoRA of rank 2",
        start="choose",
        budget__mode="total_trainable",
        budget__total=9,
        budget__ratio=None,
    ),
    "rank 0": given("lora.rank: 0 ", "at least 1", lora__rank=0),
    "a rank in words": given("lora.rank: 'two'", "give a whole number", lora__rank="two"),
    "a rank as large as a weight": given("lora.rank: 1000", "give 10 or less", start="choose", lora__rank=1000),
    "dropout in the probe": given(
        "unknown option 'lora.dropout'; a run reads it, as 'hybrid_lora.lora.dropout'", lora__dropout=0.1
    ),
    "alpha in the probe": given("lora.alpha: 8 has no effect", "hybrid_lora.lora.alpha", lora__alpha=8),
    "a seed of draws without draws": given("control.seed: 1 has no effect", "criterion=random", control__seed=1),
    "a type without spread": given("control.type: 'k_proj' has no effect", "criterion=spread", control__type="k_proj"),
    "a total in another mode": given("budget.total: 5 has no effect", "budget.mode=total_trainable", budget__total=5),
    "AdaLoRA's decay without AdaLoRA": given(
        "probe.adalora.beta: 0.5 has no effect", "criterion=adalora", probe__adalora__beta=0.5
    ),
    "AutoLoRA's rate without AutoLoRA": given(
        "probe.autolora.alpha_lr: 0.1 has no", "criterion=autolora", probe__autolora__alpha_lr=0.1
    ),
    "a full rate without full deltas": given(
        "probe.full_lr: 0.1 has no effect", "criterion=full_pruning", probe__full_lr=0.1
    ),
    "steps ahead without lookahead": given(
        "probe.lookahead.steps: 9 has no effect", "criterion=lookahead", probe__lookahead__steps=9
    ),
    "no steps ahead": given(
        "probe.lookahead.steps: 0 is not usable", "at least 1", criterion="lookahead", probe__lookahead__steps=0
    ),
    "rows for a draw": given(
        "probe.files: ", "has no effect", "a criterion that needs a probe", start="choose", probe__files="a.jsonl"
    ),
    "a budget of named modules": given("budget.ratio: 0.5 has no effect", start="choose", criterion="lora_ffn"),
    "more pruned than there is": given(
        "probe.adalora.initial_rank: 4",
        "at least probe.adalora.target_rank",
        criterion="adalora",
        probe__adalora__initial_rank=4,
    ),
    "no module named": given(
        "control.modules: []", "the modules to tune fully", start="choose", criterion="explicit", budget__ratio=None
    ),
    "an unknown module": given(
        "control.modules: 'model.layers.0.mlp.up'",
        "the closest name is",
        start="choose",
        criterion="explicit",
        budget__ratio=None,
        control__modules="[model.layers.0.mlp.up]",
    ),
    "a module twice": given(
        "is given twice",
        "name each module once",
        start="choose",
        criterion="explicit",
        budget__ratio=None,
        control__modules=f"[{FULL},{FULL}]",
    ),
    "an unknown module type": given(
        "control.type: no candidate is of type 'qkv'", "choose one of q_proj", start="choose", control__type="qkv"
    ),
    "a window of depth in words": given(
        "control.depth: 'upper' is not usable", "all, middle, or two layers", start="choose", control__depth="upper"
    ),
    "a window beyond the model": given(
        "control.depth: '7-9' has no o_proj", "the layers 0-1", start="choose", control__depth="7-9"
    ),
    "no artifact": given("artifact: not given; write artifact=FOLDER", start="allocate", artifact=None),
    "no checkpoint": given("checkpoint: not given; write checkpoint=FOLDER", start="export", checkpoint=None),
    "nothing to compare": given("allocations: not given; write allocations=[", start="compare", allocations=None),
    "an unknown type of export": given("dtype: 'int8'", "choose one of auto, float32", start="export", dtype="int8"),
    "a typo in an export": given(
        "unknown option 'checkpont'", "did you mean 'checkpoint'", start="export", checkpont="x"
    ),
    "an unknown look": given("check: 'deep'", "choose one of source, import, run", start="doctor", check="deep"),
    "libraries that are nowhere": given(
        "sources: '/nowhere'", "give folders that hold a library", start="doctor", sources="/nowhere"
    ),
    "other libraries to import": given(
        "check: 'import'", "give check=source", start="doctor", check="import", sources="/tmp"
    ),
}

OUTPUTS = {
    "an artifact in the place": Case(
        "probe",
        ("output_dir: ", "holds an allocation already", "give another folder"),
        lambda place: {"output_dir": place.artifact},
    ),
    "a folder with files": Case(
        "probe",
        ("output_dir: ", "is not an empty folder", "give a new folder"),
        lambda place: {"output_dir": place.model},
    ),
    "a file in the place": Case(
        "probe",
        ("output_dir: ", "is not an empty folder", "give a new folder"),
        lambda place: {"output_dir": place.write("file", "x")},
    ),
    "a file on the way": Case(
        "choose",
        ("output_dir: ", "cannot be written", "give another folder"),
        lambda place: {"output_dir": place.write("file", "x") / "out"},
    ),
    "a folder of the kernel": given(
        "output_dir: /proc/out", "cannot be written", "give another folder", start="choose", output_dir="/proc/out"
    ),
    "a name that is too long": given(
        "output_dir: ", "File name too long", start="choose", output_dir="/tmp/" + 300 * "x"
    ),
    "an artifact in the place of a new one": Case(
        "allocate",
        ("output_dir: ", "holds an allocation already", "give another folder"),
        lambda place: {"output_dir": place.artifact},
    ),
    "a comparison in a folder with files": Case(
        "compare",
        ("output_dir: ", "is not an empty folder", "give a new folder"),
        lambda place: {"output_dir": place.model},
    ),
    "a model in the place of an export": Case(
        "export", ("output_dir: ", "exists already", "give a new folder"), lambda place: {"output_dir": place.model}
    ),
    "a report in no folder": given(
        "json: /nowhere/x.json cannot be written", "give another file", start="doctor", json="/nowhere/x.json"
    ),
    "a disk that is full, allocating": Case(
        "allocate", ("output_dir: ", "cannot be written", "give another folder"), limit=3000
    ),
    "a disk that is full, comparing": Case(
        "compare", ("output_dir: ", "cannot be written", "give another folder"), limit=300
    ),
    "a disk that is full, choosing": Case(
        "choose", ("output_dir: ", "cannot be written", "give another folder"), limit=3000
    ),
    "a disk that is full, exporting": Case("export", ("annot be ", "File too large"), limit=3000),
}

MODELS = {
    "no such folder": given(
        "model.path: there is no folder '/nowhere/model'", "give a Hugging Face folder", model__path="/nowhere/model"
    ),
    "a file for a folder": Case(
        "probe",
        ("model.path: ", "is no folder", "give the folder with config.json"),
        lambda place: {"model.path": place.model / WEIGHTS},
    ),
    "an empty folder": Case(
        "probe",
        ("has no config.json", "give the folder that"),
        lambda place: (place.root / "empty").mkdir() or {"model.path": place.root / "empty"},
    ),
    "no config": Case("probe", ("has no config.json", "give the folder that"), remove("config.json")),
    "no config for a choice": Case("choose", ("has no config.json", "give the folder that"), remove("config.json")),
    "a config cut off": Case("probe", ("config.json", "give a "), cut("config.json", 100)),
    "a config that is a list": Case("probe", ("cannot be loaded", "give a "), put("config.json", "[]")),
    "a config of nothing": Case("probe", ("cannot be loaded", "give a "), put("config.json", "{}")),
    "a config of an unknown kind": Case("probe", ("`warp`", "give a "), config_of(model_type="warp")),
    "heads that do not divide": Case(
        "probe", ("model", "give "), config_of(num_attention_heads=5, num_key_value_heads=5)
    ),
    "a head of no width": Case("probe", ("model", "give "), config_of(num_attention_heads=0)),
    "layers below 0": Case("probe", ("model", "give "), config_of(num_hidden_layers=-1)),
    "a width in words": Case("probe", ("model", "give "), config_of(hidden_size="wide")),
    "a mixture of experts": Case(
        "probe", ("mixture of experts (num_experts=4)", "docs/models.md"), config_of(num_experts=4)
    ),
    "awq": Case(
        "probe",
        ("is quantised", "config.json: awq", "give the checkpoint it was made from"),
        config_of(quantization_config={"quant_method": "awq"}),
    ),
    "bitsandbytes": Case(
        "choose",
        ("is quantised", "bitsandbytes", "give the checkpoint"),
        config_of(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ),
    "ModelOpt": Case(
        "probe",
        ("is quantised", "hf_quant_config.json: FP8", "give the checkpoint"),
        put("hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}'),
    ),
    "an adapter beside it": Case(
        "probe", ("holds an adapter (adapter_config.json)", "merge_and_unload"), put("adapter_config.json", "{}")
    ),
    "an adapter alone": Case(
        "probe",
        ("holds an adapter (adapter_config.json)", "merge_and_unload"),
        lambda place: (remove("config.json", WEIGHTS)(place), put("adapter_config.json", "{}")(place)),
    ),
    "no weights": Case("probe", ("has no weights", "give a folder with model.safetensors"), remove(WEIGHTS)),
    "weights under another name": Case(
        "probe",
        ("(consolidated.safetensors)", "give a folder with model.safetensors"),
        rename(WEIGHTS, "consolidated.safetensors"),
    ),
    "a pointer": Case("probe", (WEIGHTS + " is a Git LFS pointer", "git lfs pull"), put(WEIGHTS, POINTER)),
    "a pointer for the index": Case("probe", (INDEX + " is a Git LFS pointer", "git lfs pull"), put(INDEX, POINTER)),
    "a pointer for the tokenizer": Case(
        "probe", ("tokenizer.json is a Git LFS pointer", "git lfs pull"), put("tokenizer.json", POINTER)
    ),
    "a pointer for the config": Case(
        "choose", ("config.json is a Git LFS pointer", "git lfs pull"), put("config.json", POINTER)
    ),
    "a dangling link": Case("probe", ("is a link to ../blobs/0123", "copy the checkpoint"), link),
    "weights cut off": Case(
        "probe", ("bytes where its header describes", "copy the checkpoint again"), cut(WEIGHTS, -4)
    ),
    "weights with more behind": Case(
        "probe",
        ("bytes where its header describes", "copy the checkpoint again"),
        lambda place: (place.model / WEIGHTS).open("ab").write(b"more") and None,
    ),
    "a header cut off": Case(
        "probe", ("is no safetensors file (200 bytes", "copy the checkpoint again"), cut(WEIGHTS, 200)
    ),
    "weights of no bytes": Case(
        "probe", ("is no safetensors file (0 bytes", "copy the checkpoint again"), cut(WEIGHTS, 0)
    ),
    "a web page for weights": Case(
        "probe", ("is no safetensors file", "copy the checkpoint again"), put(WEIGHTS, "<!DOCTYPE html><html>")
    ),
    "an index that is a list": Case(
        "probe",
        ("is no index of weights", "copy the checkpoint again"),
        lambda place: (remove(WEIGHTS)(place), put(INDEX, "[]")(place)),
    ),
    "an index of files elsewhere": Case(
        "probe",
        ("is no index of weights", "copy the checkpoint again"),
        shards(**{"lost.weight": "../model-00001-of-00002.safetensors"}),
    ),
    "an index of several lines": Case(
        "probe", ("is no index of weights", "copy the checkpoint again"), shards(**{"a\nb": "a\nb.safetensors"})
    ),
    "a header with an endless size": Case(
        "probe",
        ("is no safetensors file", "copy the checkpoint again"),
        put(WEIGHTS, b"\x3a" + bytes(7) + b'{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}'.ljust(58)),
    ),
    "an absent shard": Case(
        "probe",
        ("names model-00002-of-00002.safetensors, which is not there", "with all its shards"),
        shards(lost=True),
    ),
    "a shard without its tensor": Case(
        "probe",
        ("puts lost.weight into model-00001-of-00002", "copy the checkpoint again"),
        shards(**{"lost.weight": "model-00001-of-00002.safetensors"}),
    ),
    "two sets of weights": Case("probe", ("an index of other files", "remove the older"), shards(single=True)),
    "a pickle that is none": Case(
        "probe",
        ("cannot be loaded", "give a "),
        lambda place: (remove(WEIGHTS)(place), put("pytorch_model.bin", b"none")(place)),
    ),
    "a pointer for a pickle": Case(
        "probe",
        ("pytorch_model.bin is a Git LFS pointer", "git lfs pull"),
        lambda place: (remove(WEIGHTS)(place), put("pytorch_model.bin", POINTER)(place)),
    ),
    "a wrapper of torch.compile": Case(
        "probe", ("26 tensors in its files belong to no part", "without '_orig_mod.'"), prefixed("_orig_mod.")
    ),
    "a wrapper of data parallel": Case(
        "probe", ("27 weights of the model are in none of its files", "without 'module.'"), prefixed("module.")
    ),
    "a wrapper of PEFT": Case(
        "probe", ("belong to no part of the model", "without 'base_model.model.'"), prefixed("base_model.model.")
    ),
    "a lost norm": Case(
        "probe",
        (f"1 weights of the model are in none of its files ({NORM})", "give the checkpoint"),
        weights_of(without(NORM)),
    ),
    "a lost embedding": Case("probe", (EMBEDDING, "give the checkpoint"), weights_of(without(EMBEDDING))),
    "a value head": Case(
        "probe", ("(v_head.weight)", "no others"), weights_of(lambda w: w | {"v_head.weight": torch.ones(1, 32)})
    ),
    "a norm of another size": Case(
        "probe",
        (f"{NORM} [31] in the files and [32] in the model", "give the checkpoint"),
        weights_of(lambda w: w | {NORM: torch.ones(31)}),
    ),
    "a config of another width": Case(
        "probe",
        ("in the files and", "give the checkpoint and the config.json that belong together"),
        config_of(intermediate_size=96),
    ),
    "a config of more layers": Case(
        "probe",
        ("weights of the model are in none of its files (model.layers.2.", "belong together"),
        config_of(num_hidden_layers=3, layer_types=3 * ["full_attention"]),
    ),
    "a config of fewer layers": Case(
        "probe",
        ("belong to no part of the model (model.layers.1.", "belong together"),
        config_of(num_hidden_layers=1, layer_types=["full_attention"]),
    ),
    "a config of another architecture": Case(
        "probe",
        ("is not the model of its config.json", "belong together"),
        config_of(model_type="llama", architectures=["LlamaForCausalLM"]),
    ),
    "a head of its own": Case(
        "probe",
        (f"other values in {HEAD} than in {EMBEDDING}", "tie_word_embeddings: false"),
        weights_of(lambda w: w | {HEAD: w[EMBEDDING] + 1}),
    ),
    "no tokenizer": Case(
        "probe",
        ("model.path: ", "has no tokenizer", "such as tokenizer.json"),
        remove("tokenizer.json", "tokenizer_config.json"),
    ),
    "a tokenizer cut off": Case(
        "probe", ("model.path: the tokenizer of", "give a Hugging Face folder"), cut("tokenizer.json", 300)
    ),
    "a tokenizer of another model": Case(
        "probe",
        ("has id ", "embedding has 10 rows", "give the tokenizer that belongs to the model"),
        lambda place: (
            config_of(vocab_size=10)(place),
            weights_of(lambda w: w | {EMBEDDING: w[EMBEDDING][:10].clone()})(place),
        ),
    ),
    "no GGUF file": given("model.gguf_file: 'q4.gguf'", "give the name of a file there", model__gguf_file="q4.gguf"),
    "a GGUF file that is none": Case(
        "probe",
        ("cannot be loaded", "give a "),
        lambda place: put("q4.gguf", "none")(place) or {"model.gguf_file": "q4.gguf"},
    ),
    "weights that are no numbers": Case(
        "probe",
        ("the loss is nan", "check that the checkpoint is sound"),
        weights_of(lambda w: w | {NORM: w[NORM] * float("nan")}),
        begun=True,
    ),
}

ROWS = {
    "no such file": given("probe.files: ", "/nowhere/rows.jsonl", "give ", probe__files="/nowhere/rows.jsonl"),
    "an empty file": Case("probe", ("probe.files: ", "is empty", "give a file with rows"), rows_are("")),
    "a folder without rows": Case(
        "probe",
        ("probe.files: ", "give "),
        lambda place: (place.root / "empty").mkdir() or {"probe.files": place.root / "empty"},
    ),
    "no JSON": Case("probe", ("probe.files: row 2 of", "JSON"), rows_are(lines(GOOD_ROW) + "{\n")),
    "a row that is a list": Case("probe", ("probe.files: row 2 of", "give "), rows_are(lines(GOOD_ROW, [1]))),
    "a row without a response": Case(
        "probe", ("probe.files: row 2 of", "probe.response_key"), rows_are(lines(GOOD_ROW, {"prompt": "a"}))
    ),
    "an empty response": Case(
        "probe", ("probe.files: row 2 of", "no response"), rows_are(lines(GOOD_ROW, {"prompt": "a", "response": " "}))
    ),
    "an empty prompt": Case(
        "probe", ("probe.files: row 2 of", "no prompt"), rows_are(lines(GOOD_ROW, {"prompt": "", "response": "b"}))
    ),
    "a response that is a number": Case(
        "probe", ("probe.files: row 2 of", "response"), rows_are(lines(GOOD_ROW, {"prompt": "a", "response": 3}))
    ),
    "no turns": Case("probe", ("probe.files: row 1 of", "messages"), rows_are(lines({"messages": []}))),
    "turns that are a text": Case(
        "probe", ("probe.files: row 1 of", "messages", "give "), rows_are(lines({"messages": "hello"}))
    ),
    "no assistant": Case(
        "probe", ("probe.files: row 1 of", "assistant", "give "), rows_are(lines({"messages": CHAT[:1]}))
    ),
    "a turn without a role": Case(
        "probe", ("probe.files: row 1 of", "role"), rows_are(lines({"messages": [{"content": "a"}, CHAT[1]]}))
    ),
    "no text at all": Case("probe", ("probe.files: ", "rows.jsonl"), rows_are(bytes(range(128, 256)))),
    "a pointer for rows": Case("probe", ("probe.files: ", "rows.jsonl"), rows_are(POINTER)),
    "half a surrogate": Case(
        "probe", ("probe.files: ", "rows.jsonl"), rows_are('{"prompt": "\\ud800", "response": "b"}\n' * 12)
    ),
    "an unknown ending": Case("probe", ("probe.files: ", "rows.xlsx", "give "), rows_are("a", "rows.xlsx")),
    "no Parquet": Case("probe", ("probe.files: ", "rows.parquet"), rows_are("a", "rows.parquet")),
    "a Parquet file cut off": Case(
        "probe", ("probe.files: ", "rows.parquet"), rows_are(b"PAR1" + bytes(40), "rows.parquet")
    ),
    "too few rows": Case("probe", ("probe.files: 1 usable rows", "give more rows"), rows_are(lines(GOOD_ROW))),
    "responses behind the cut": given("probe.max_length: 5", "raise it", probe__max_length=5),
    "a chat without a template": Case(
        "probe",
        ("probe.files: ", "chat template", "give "),
        lambda place: (remove("chat_template.jinja")(place), rows_are(lines(*[{"messages": CHAT}] * 12))(place))[1],
    ),
    "a template that is broken": Case(
        "probe",
        ("probe.files: ", "chat template", "give "),
        lambda place: (
            put("chat_template.jinja", "{{ nobody.has['this'] }}")(place),
            rows_are(lines(*[{"messages": CHAT}] * 12))(place),
        )[1],
    ),
}

MODULE_0 = "modules[0]"
ARTIFACTS = {
    "no such artifact": given(
        "'/nowhere/allocation.json' cannot be read",
        "give the folder that",
        start="allocate",
        artifact="/nowhere/allocation.json",
    ),
    "an empty folder as an artifact": Case(
        "allocate",
        ("artifact: ", "cannot be read", "give the folder that"),
        remove("allocation.json", folder="allocation"),
    ),
    "an artifact of no bytes": Case(
        "allocate",
        ("allocation.json: not valid JSON", "give an unchanged file"),
        cut("allocation.json", 0, "allocation"),
    ),
    "an artifact cut off": Case(
        "allocate",
        ("allocation.json: not valid JSON", "give an unchanged file"),
        cut("allocation.json", 500, "allocation"),
    ),
    "an artifact of other bytes": Case(
        "allocate",
        ("allocation.json: not valid JSON", "give an unchanged file"),
        put("allocation.json", b"\xff\xfe\x00", "allocation"),
    ),
    "a pointer for an artifact": Case(
        "allocate",
        ("allocation.json: not valid JSON", "give an unchanged file"),
        put("allocation.json", POINTER, "allocation"),
    ),
    "an artifact that is a list": Case(
        "allocate", ("schema_version: None", "probe again"), put("allocation.json", "[]", "allocation")
    ),
    "an artifact that is a number": Case(
        "allocate", ("schema_version: None", "probe again"), put("allocation.json", "7", "allocation")
    ),
    "nested without end": Case(
        "allocate",
        ("allocation.json: not valid JSON", "give an unchanged file"),
        put("allocation.json", 100_000 * "[", "allocation"),
    ),
    "a number of 5000 digits": Case(
        "allocate",
        ("allocation.json: not valid JSON", "give an unchanged file"),
        put("allocation.json", 5000 * "7", "allocation"),
    ),
    "another version": Case(
        "allocate", ("schema_version: 3, 2 or 1 is wanted", "probe again"), allocation(schema_version=3)
    ),
    "a version that is true": Case(
        "allocate", ("schema_version: True", "probe again"), allocation(schema_version=True)
    ),
    "no version": Case("allocate", ("schema_version: None", "probe again"), allocation(schema_version=...)),
    "a key twice": Case(
        "allocate",
        ("duplicate key 'schema_version'", "give an unchanged file"),
        text_of_allocation(lambda t: t.replace("{", '{"schema_version": 2,', 1)),
    ),
    "NaN": Case(
        "allocate",
        ("NaN is not a number", "give an unchanged file"),
        inside(lambda a: a["modules"][0].update(score=float("nan"))),
    ),
    "infinity": Case(
        "allocate",
        ("Infinity is not a number", "give an unchanged file"),
        inside(lambda a: a["modules"][0].update(mean=float("inf"))),
    ),
    "a number beyond floats": Case(
        "allocate",
        ("1e999 is not a number", "give an unchanged file"),
        text_of_allocation(lambda t: re.sub(r'"std": [^,]+', '"std": 1e999', t, count=1)),
    ),
    "an unknown key": Case("allocate", ("unknown key 'extra'", "give an unchanged file"), allocation(extra=1)),
    "an unknown key inside": Case(
        "allocate",
        (MODULE_0, "unknown key 'extra'", "give an unchanged file"),
        inside(lambda a: a["modules"][0].update(extra=1)),
    ),
    "a missing key": Case("allocate", ("missing key 'budget'", "give an unchanged file"), allocation(budget=...)),
    "a missing key inside": Case(
        "allocate",
        (MODULE_0, "missing key 'name'", "give an unchanged file"),
        inside(lambda a: a["modules"][0].pop("name")),
    ),
    "a text for a number": Case(
        "allocate",
        (MODULE_0 + ".score: '1'", "type float is wanted"),
        inside(lambda a: a["modules"][0].update(score="1")),
    ),
    "true for a number": Case(
        "allocate",
        (MODULE_0 + ".layer: True", "type int is wanted"),
        inside(lambda a: a["modules"][0].update(layer=True)),
    ),
    "a number for a text": Case(
        "allocate", (MODULE_0 + ".name: 3", "type str is wanted"), inside(lambda a: a["modules"][0].update(name=3))
    ),
    "null for an object": Case(
        "allocate", ("budget: None, an object is wanted", "give an unchanged file"), allocation(budget=None)
    ),
    "modules as an object": Case(
        "allocate", ("modules: {}, a list is wanted", "give an unchanged file"), allocation(modules={})
    ),
    "no modules": Case("allocate", ("modules: empty", "probe again"), allocation(modules=[])),
    "a module of the artifact twice": Case(
        "allocate", ("duplicate module", "probe again"), inside(lambda a: a["modules"].append(a["modules"][0]))
    ),
    "an unknown assignment": Case(
        "allocate",
        (MODULE_0 + ".assignment: 'half'", "'full' or 'lora' is wanted"),
        inside(lambda a: a["modules"][0].update(assignment="half")),
    ),
    "an unknown type of module": Case(
        "allocate",
        (MODULE_0 + ".type: 'x_proj' is unknown", "probe again"),
        inside(lambda a: a["modules"][0].update(type="x_proj")),
    ),
    "a layer that is not there": Case(
        "allocate", (MODULE_0 + ".layer: 99", "0 to 1 is wanted"), inside(lambda a: a["modules"][0].update(layer=99))
    ),
    "sums that do not add up": Case(
        "allocate",
        ("model.candidate_parameters: ", "the modules add up to"),
        inside(lambda a: a["model"].update(candidate_parameters=7)),
    ),
    "a budget that is exceeded": Case(
        "allocate",
        ("budget.used: ", "probe again"),
        inside(lambda a: [m.update(assignment="full") for m in a["modules"]]),
    ),
    "an unknown mode of budget": Case(
        "allocate", ("budget.mode: 'x' is unknown", "is wanted"), inside(lambda a: a["budget"].update(mode="x"))
    ),
    "measurements cut off": Case(
        "allocate",
        ("sensitivities.safetensors: cannot be read", "probe again"),
        cut("sensitivities.safetensors", -8, "allocation"),
    ),
    "measurements of other modules": Case(
        "allocate",
        ("sensitivities.safetensors: does not list the modules", "probe again"),
        lambda place: save_file(
            {"x": torch.ones(2)}, place.artifact / "sensitivities.safetensors", metadata={"modules": "[]"}
        ),
    ),
    "measurements with no names": Case(
        "allocate",
        ("sensitivities.safetensors", "probe again"),
        lambda place: save_file({"x": torch.ones(2)}, place.artifact / "sensitivities.safetensors"),
    ),
    "measurements that are not there": Case(
        "allocate",
        ("does not hold 'sensitivities'", "probe with"),
        remove("sensitivities.safetensors", folder="allocation"),
    ),
    "a criterion that was not measured": given(
        "does not hold 'full_sensitivities'", "criterion=full_pruning", start="allocate", criterion="full_pruning"
    ),
    "one artifact to compare": Case(
        "compare",
        ("allocations: 1 given, 2 or more are wanted", "write allocations="),
        lambda place: {"allocations": f"[{place.artifact}]"},
    ),
    "a damaged artifact to compare": Case(
        "compare",
        ("allocation.json: not valid JSON", "give an unchanged file"),
        cut("allocation.json", 500, "allocation"),
    ),
}

EXPORTS = {
    "no such checkpoint": given(
        "checkpoint: '/nowhere'", "give a global_step_N folder", start="export", checkpoint="/nowhere"
    ),
    "a folder without a checkpoint": Case(
        "export",
        ("checkpoint: ", "holds no hybrid_lora/trainables.safetensors", "give a global_step_N"),
        lambda place: {"checkpoint": place.model},
    ),
    "no description": Case(
        "export",
        ("checkpoint: ", "cannot be read", "use another checkpoint"),
        remove("hybrid_lora/trainables.json", folder="actor"),
    ),
    "a description cut off": Case(
        "export",
        ("checkpoint: ", "cannot be read", "use another checkpoint"),
        cut("hybrid_lora/trainables.json", 40, "actor"),
    ),
    "a description that is a list": Case(
        "export",
        ("checkpoint: ", "cannot be read", "use another checkpoint"),
        put("hybrid_lora/trainables.json", "[]", "actor"),
    ),
    "a description that is a number": Case(
        "export",
        ("checkpoint: ", "cannot be read", "use another checkpoint"),
        put("hybrid_lora/trainables.json", "7", "actor"),
    ),
    "a description of another version": Case(
        "export", ("schema_version is 99", "use another checkpoint"), description(schema_version=99)
    ),
    "a description without a rank": Case("export", ("'rank'", "use another checkpoint"), description(rank=...)),
    "a rank of text": Case("export", ("rank", "use another checkpoint"), description(rank="four")),
    "rank 0 in a checkpoint": Case("export", ("rank", "use another checkpoint"), description(rank=0)),
    "an unknown rounding": Case("export", ("rounding", "use another checkpoint"), description(rounding_mode="up")),
    "an unknown type in a checkpoint": Case(
        "export", ("rollout_dtype", "use another checkpoint"), description(rollout_dtype="int3")
    ),
    "trained tensors cut off": Case(
        "export",
        ("checkpoint: ", "cannot be read", "use another checkpoint"),
        cut("hybrid_lora/trainables.safetensors", -8, "actor"),
    ),
    "trained tensors of no bytes": Case(
        "export",
        ("checkpoint: ", "cannot be read", "use another checkpoint"),
        cut("hybrid_lora/trainables.safetensors", 0, "actor"),
    ),
    "a trained tensor that is missing": Case(
        "export", ("checkpoint: tensor ", "is missing", "use another"), trained(lambda t: without(min(t))(t))
    ),
    "a trained tensor too many": Case(
        "export",
        ("checkpoint: tensor 'extra' belongs to no module", "give the base"),
        trained(lambda t: t | {"extra": torch.ones(1)}),
    ),
    "an adapter of another rank": Case(
        "export",
        ("checkpoint: tensor ", "rank 4", "use another"),
        trained(lambda t: {n: x[:, :2].contiguous() if "lora_B" in n else x for n, x in t.items()}),
    ),
    "a checkpoint without an allocation": Case(
        "export",
        ("allocation.json", "cannot be read", "give the folder"),
        remove("hybrid_lora/allocation.json", folder="actor"),
    ),
    "an allocation of a checkpoint cut off": Case(
        "export",
        ("allocation.json: not valid JSON", "give an unchanged file"),
        cut("hybrid_lora/allocation.json", 100, "actor"),
    ),
    "a record of the base that is damaged": Case(
        "export",
        ("base_weights.json' cannot be read", "use another checkpoint"),
        put("hybrid_lora/base_weights.json", "{}", "actor"),
    ),
    "a base that is gone": Case(
        "export",
        ("base: ", "give base=PATH"),
        lambda place: (description(base_model="/nowhere/model")(place), {"base": None})[1],
    ),
    "a base with other weights": Case(
        "export",
        ("base: ", "is not the model that the run started from", "give base=PATH"),
        weights_of(lambda w: {n: t * 1.01 for n, t in w.items()}),
    ),
    "a base of another size": Case(
        "export", ("base: ", "is not the model of its config.json", "belong together"), config_of(intermediate_size=96)
    ),
    "a base with an adapter": Case(
        "export", ("base: ", "holds an adapter", "merge_and_unload"), put("adapter_config.json", "{}")
    ),
    "a base that is cut off": Case(
        "export", ("base: ", "bytes where its header describes", "copy the checkpoint again"), cut(WEIGHTS, -4)
    ),
}

CASES: dict[str, Case] = {}
for _table in (COMMANDS, OUTPUTS, MODELS, ROWS, ARTIFACTS, EXPORTS):
    assert not CASES.keys() & _table.keys(), CASES.keys() & _table.keys()
    CASES |= _table


# -- runs of verl -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunCase:
    """A command of verl's that cannot work; ``spoil`` returns arguments that come last."""

    says: tuple[str, ...]
    spoil: Callable[[Place], list[str] | Any]

    def arguments(self, place: Place) -> list[str]:
        changed = self.spoil(place)
        return [
            "+hybrid_lora=enabled",
            f"actor_rollout_ref.model.path={place.model}",
            f"trainer.default_local_dir={place.root / 'checkpoints'}",
            "actor_rollout_ref.rollout.name=vllm",
            f"hybrid_lora.probe.files=[{place.rows()}]",
            "hybrid_lora.lora.rank=4",
            "hybrid_lora.budget.ratio=0.3",
            *(changed if isinstance(changed, list) else []),
        ]


def arguments(*says: str, last: tuple[str, ...]) -> RunCase:
    return RunCase(says, lambda place: list(last))


def tracker(text: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        (place.root / "checkpoints").mkdir()
        (place.root / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(text)

    return spoil


def trains_under(spoil: Callable[[Place], Any]) -> Callable[[Place], list[str]]:
    """A run under an allocation that is spoilt first."""
    return lambda place: (spoil(place), [f"hybrid_lora.allocation={place.artifact}"])[1]


RUNS = {
    "an unknown option": arguments("hybrid_lora.warp", "docs/configuration.md", last=("+hybrid_lora.warp=9",)),
    "a rate of 0": arguments("hybrid_lora.full_lr: 0", "give ", last=("hybrid_lora.full_lr=0",)),
    "a rate of no number": arguments("hybrid_lora.full_lr: nan", "give ", last=("hybrid_lora.full_lr=nan",)),
    "an unknown sync": arguments("hybrid_lora.sync: 'push'", "choose one of merge", last=("hybrid_lora.sync=push",)),
    "an unknown rounding of a sync": arguments(
        "hybrid_lora.sync_rounding: 'up'", "choose one of", last=("hybrid_lora.sync_rounding=up",)
    ),
    "no time to wait": arguments("hybrid_lora.sync_timeout: -1", "above 0", last=("hybrid_lora.sync_timeout=-1",)),
    "a truth value for a folder": arguments(
        "hybrid_lora.output_dir: True", 'hybrid_lora.output_dir="true"', last=("hybrid_lora.output_dir=true",)
    ),
    "a number for a folder": arguments(
        "hybrid_lora.output_dir: 1000.0", "quote it", last=("hybrid_lora.output_dir=1e3",)
    ),
    "truth values for files": arguments(
        "hybrid_lora.probe.files: True", "quote it", last=("hybrid_lora.probe.files=[true]",)
    ),
    "a seed without draws": arguments(
        "hybrid_lora.control.seed: 3 has no effect", "criterion=random", last=("hybrid_lora.control.seed=3",)
    ),
    "an initialisation of another criterion": arguments(
        "hybrid_lora.probe.adalora.beta: 0.5", "criterion=adalora", last=("hybrid_lora.probe.adalora.beta=0.5",)
    ),
    "a rank that is too large": arguments("hybrid_lora.lora.rank: 30", "or less", last=("hybrid_lora.lora.rank=30",)),
    "too small a budget": arguments("hybrid_lora.budget.ratio: ", "at least", last=("hybrid_lora.budget.ratio=1e-5",)),
    "no rows for a run": arguments(
        "hybrid_lora.probe.files names no rows", "give hybrid_lora.allocation", last=("hybrid_lora.probe.files=[]",)
    ),
    "rows that are nowhere": arguments(
        "hybrid_lora.probe.files: '/nowhere'", "give existing files", last=("hybrid_lora.probe.files=[/nowhere]",)
    ),
    "an allocation that is nowhere": arguments(
        "'/nowhere'", "give the folder", last=("hybrid_lora.allocation=/nowhere",)
    ),
    "a damaged allocation": RunCase(
        ("allocation.json: not valid JSON", "give an unchanged file"),
        trains_under(cut("allocation.json", 500, "allocation")),
    ),
    "an allocation of another model": RunCase(
        ("artifact of another model", "probe again"),
        trains_under(lambda place: inside(lambda a: a["model"].update(config_sha256="0" * 64))(place)),
    ),
    "a quantised rollout": arguments(
        "actor_rollout_ref.rollout.quantization: ", "fp8", last=("actor_rollout_ref.rollout.quantization=fp8",)
    ),
    "an unknown resume": arguments(
        "trainer.resume_mode: 'perhaps'", "give auto", last=("trainer.resume_mode=perhaps",)
    ),
    "a resume from nowhere": arguments(
        "trainer.resume_from_path: ", "give a folder global_step_N", last=("trainer.resume_mode=resume_path",)
    ),
    "a tracker of words": RunCase(
        ("latest_checkpointed_iteration.txt", "trainer.resume_mode=disable"), tracker("the last one")
    ),
    "a run on a wrapper": RunCase(("model: ", "without '_orig_mod.'"), prefixed("_orig_mod.")),
    "a run without a norm": RunCase(("model: ", f"({NORM})", "give the checkpoint"), weights_of(without(NORM))),
    "a run with a value head": RunCase(
        ("model: ", "(v_head.weight)", "no others"),
        weights_of(lambda w: w | {"v_head.weight": torch.ones(1, 32)}),
    ),
    "a run on a pointer": RunCase(("model: ", "git lfs pull"), put(WEIGHTS, POINTER)),
    "a run on a file cut off": RunCase(("model: ", "copy the checkpoint again"), cut(WEIGHTS, -4)),
    "a run on a dangling link": RunCase(("model: ", "which is not there", "copy the checkpoint"), link),
    "a run on an absent shard": RunCase(("model: ", "with all its shards"), shards(lost=True)),
    "a run beside an adapter": RunCase(("model: ", "merge_and_unload"), put("adapter_config.json", "{}")),
    "a run on awq": RunCase(("model: ", "awq", "give"), config_of(quantization_config={"quant_method": "awq"})),
    "a run on experts": RunCase(("model: ", "mixture of experts"), config_of(num_experts=4)),
    "a run without a config": RunCase(("model: ", "has no config.json"), remove("config.json")),
    "a run on a config of another size": RunCase(("model: ", "belong together"), config_of(intermediate_size=96)),
    "a run on a pickle": RunCase(
        ("model: ", "pytorch_model.bin", "load_format=auto"),
        lambda place: (remove(WEIGHTS)(place), put("pytorch_model.bin", b"none")(place)),
    ),
}
