"""Artifacts that version 0.1 wrote are still read: eight real ones, and a checkpoint that holds one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from hybrid_lora_plugin.allocation import AllocationError, load_allocation
from hybrid_lora_plugin.cli.allocate import main as allocate_command
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.training.checkpoint import (
    CheckpointDescription,
    load_trained,
    require_same_setting,
    save_trained,
)

FOLDER = Path(__file__).parent / "data" / "allocation_v1"
FILES = sorted(FOLDER.glob("*.json"))
#: what each was made by, as the commands that wrote them were given it
METHODS = {
    "adalora": "adalora",
    "autolora": "autolora",
    "full_pruning": "full_delta",
    "hybrid": "svd_lora",
    "hybrid_to_random": "unknown",
    "lora_ffn": None,
    "partitions": "svd_lora",
    "random": None,
}
PROBE_FIELDS = (
    "objective", "rank", "init", "warmup_steps", "lr", "partitions", "batch_size", "max_length", "dtype", "seed",
    "data",
)  # fmt: skip


def test_there_is_one_of_every_kind():
    assert {file.stem for file in FILES} == METHODS.keys()
    assert all(json.loads(file.read_text())["schema_version"] == 1 for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_artifact_of_version_1_means_what_it_meant(file):
    old, new = json.loads(file.read_text()), load_allocation(file)
    record = old["criterion"]
    assert new.schema_version == 2 and new.environment == old["environment"]
    # Which linear modules stay frozen was not recorded.
    assert vars(new.model) == old["model"] | {"frozen_linear": []}
    assert (new.selection.criterion, new.selection.direction) == (record["name"], record["direction"])
    assert new.selection.normalise == record["normalise"] and new.budget.lora_rank == record["rank"]
    assert {name: value for name, value in vars(new.budget).items() if name != "lora_rank"} == old["budget"]
    assert [vars(module) for module in new.modules] == old["modules"]
    options = dict(new.selection.options)
    if METHODS[file.stem] is None:
        assert new.probe is None
    else:
        assert new.probe.method == METHODS[file.stem]
        assert {name: getattr(new.probe, name) for name in PROBE_FIELDS} == {n: record[n] for n in PROBE_FIELDS}
        options |= new.probe.options | {"partitions_per_batch": new.probe.partitions_per_batch}
    assert options == record["options"], "every option went to one of the two records"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_written_again_it_is_version_2_and_reads_the_same(file, tmp_path):
    old = load_allocation(file)
    folder = save_allocation(tmp_path / "artifact", old, {})
    payload = json.loads((folder / "allocation.json").read_text())
    assert payload["schema_version"] == 2 and "criterion" not in payload
    assert ("probe" in payload) == (METHODS[file.stem] is not None)
    assert load_allocation(folder) == old


def test_the_command_reads_a_folder_of_version_1_with_its_measurements(tmp_path, capsys):
    source = tmp_path / "old"
    source.mkdir()
    shutil.copy(FOLDER / "hybrid.json", source / "allocation.json")
    shutil.copy(FOLDER / "hybrid.safetensors", source / "sensitivities.safetensors")
    assert allocate_command([f"artifact={source}", f"output_dir={tmp_path / 'new'}", "budget.ratio=0.3"]) == 0
    assert "0 of 14 modules changed their assignment" in capsys.readouterr().out
    new = load_allocation(tmp_path / "new")
    # What version 1 did not say: how sure the choice is.
    assert new.stability.batches == 4 and dataclasses.replace(new, stability=None) == load_allocation(source)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p["criterion"].pop("rank"), "criterion: missing key 'rank'"),
        (lambda p: p["criterion"].update(colour=1), "criterion: unknown key 'colour'"),
        (lambda p: p.update(criterion=[]), r"criterion: \[\], an object is wanted"),
        (lambda p: p["criterion"].update(options=3), "criterion.options: 3, an object is wanted"),
        (lambda p: p.update(budget=None), "budget: None, an object is wanted"),
        (lambda p: p["criterion"].update(rank="4"), "budget.lora_rank: '4', a value of type int is wanted"),
        (lambda p: p["criterion"].update(seed=0.5), "probe.seed: 0.5, a value of type int is wanted"),
    ],
)
def test_a_damaged_one_is_refused_with_the_field_named(change, message, tmp_path):
    payload = json.loads((FOLDER / "hybrid.json").read_text())
    change(payload)
    file = tmp_path / "allocation.json"
    file.write_text(json.dumps(payload))
    with pytest.raises(AllocationError, match=message) as caught:
        load_allocation(file)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_holds_one_is_resumed_and_read(tmp_path):
    text = (FOLDER / "hybrid.json").read_text()
    allocation = load_allocation(FOLDER / "hybrid.json")
    description = CheckpointDescription(base_model="models/tiny", rank=4, alpha=8, global_step=3)
    kept = save_trained(tmp_path / "actor", {"weight": torch.ones(2)}, description, text)
    require_same_setting(kept, allocation, 4, 8)
    with pytest.raises(ConfigurationError, match="assigns modules differently"):
        require_same_setting(kept, load_allocation(FOLDER / "random.json"), 4, 8)
    tensors, read, path = load_trained(tmp_path)
    assert read == description and torch.equal(tensors["weight"], torch.ones(2))
    assert load_allocation(path) == allocation and path.read_text() == text
