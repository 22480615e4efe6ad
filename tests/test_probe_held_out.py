"""Did the warm-up learn? The loss on rows that it never sees, before and after: measured, kept, recorded and said."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_lora_plugin.allocation import AllocationError, load_allocation
from hybrid_lora_plugin.allocation.learning import learned_in_words
from hybrid_lora_plugin.allocation.schema import HeldOutLoss
from hybrid_lora_plugin.allocation.storage import allocation_text, parse_allocation
from hybrid_lora_plugin.cli.allocate import main as allocate_command
from hybrid_lora_plugin.errors import ProbeError, split_reference
from hybrid_lora_plugin.probing import held_out
from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted
from hybrid_lora_plugin.probing.prepare import prepare_data
from hybrid_lora_plugin.probing.progress import Progress
from hybrid_lora_plugin.probing.runner import run_probe
from tests.test_probe_run import InterruptAt, probe_config


@pytest.fixture(scope="module")
def probed(tiny_qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    config = probe_config(tiny_qwen2, folder, partitions=20, batch_size=2)
    return config, run_probe(config)


def test_before_is_the_loss_of_the_base_model_on_the_first_eight_batches(probed):
    config, folder = probed
    seen = load_allocation(folder).probe.held_out
    model, data = AutoModelForCausalLM.from_pretrained(config.model.path), prepare_data(config, Progress())
    losses, tokens = 0.0, 0
    for index in range(8):
        batch = data.validation_batch(index)
        targets = batch.labels[:, 1:]
        with torch.no_grad():
            logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        logs = logits.double().log_softmax(-1)
        for row, column in (targets != -100).nonzero().tolist():
            losses -= float(logs[row, column, targets[row, column]])
            tokens += 1
    assert (seen.batches, seen.tokens) == (8, tokens)
    assert seen.before == pytest.approx(losses / tokens, rel=1e-6)
    assert seen.after < seen.before


def test_it_is_said_in_the_first_lines_of_the_output_and_of_the_report(probed, tmp_path, capsys):
    _, folder = probed
    said = learned_in_words(load_allocation(folder).probe)
    assert said.startswith("the warm-up lowered the loss on 8 held-out batches (")
    assert f"T{said[1:]}." in (folder / "report.md").read_text().splitlines()[:6]
    assert allocate_command([f"artifact={folder}", f"output_dir={tmp_path / 'other'}", "criterion=snip"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == said


@pytest.mark.parametrize("stop", [1, 9], ids=["warm-up", "scoring"])
def test_each_loss_is_measured_once_also_by_a_probe_that_is_cut(tiny_qwen2, tmp_path, monkeypatch, stop):
    config, measured = probe_config(tiny_qwen2, tmp_path), []
    loss_of = held_out.Passes.loss
    monkeypatch.setattr(held_out.Passes, "loss", lambda *given: measured.append(given) or loss_of(*given))
    with pytest.raises(ProbeInterrupted):
        run_probe(config, InterruptAt(stop))
    kept = json.loads((tmp_path / "out.partial" / "held_out.json").read_text())
    assert list(kept) == (["before"] if stop == 1 else ["before", "after"])
    (tmp_path / "out.partial" / "held_out.json").write_text(json.dumps(kept | {"before": 99.0}))
    assert load_allocation(run_probe(config)).probe.held_out.before == 99.0
    assert len(measured) == 2 * 4


def test_a_loss_that_rose_is_warned_of_with_the_way_out(tiny_qwen2, tmp_path, capsys):
    config = probe_config(tiny_qwen2, tmp_path)
    with pytest.raises(ProbeInterrupted):
        run_probe(config, InterruptAt(8))
    # As if the base model had been better than what the warm-up made of it.
    (tmp_path / "out.partial" / "held_out.json").write_text(json.dumps({"before": 1.0}))
    folder = run_probe(config)
    assert allocate_command([f"artifact={folder}", f"output_dir={tmp_path / 'other'}", "budget.ratio=0.3"]) == 0
    warning, anchor = split_reference(capsys.readouterr().out.splitlines()[1])
    assert re.match(
        r"warning: the warm-up did not lower the loss on 4 held-out .*: 1.0000 before, 4.\d+ after", warning
    )
    assert "a lower probe.lr, fewer probe.warmup_steps" in warning and anchor == "warm-up-did-not-learn"
    assert warning.replace("warning: ", "**Warning:** ") in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    "method, init, option",
    [
        ("svd_lora", "default", "probe.lr"),
        ("svd_lora", "adalora", "probe.adalora.lr"),
        ("adalora", "adalora", "probe.adalora.lr"),
        ("autolora", "default", "probe.lr"),
        ("full_delta", "default", "probe.full_lr"),
    ],
)
def test_the_way_out_names_the_rate_of_the_method(probed, method, init, option):
    probe = dataclasses.replace(
        load_allocation(probed[1]).probe, method=method, init=init, held_out=HeldOutLoss(2.5, 2.5, 4, 99)
    )
    assert f"more probe.warmup_steps or a higher {option} [" in learned_in_words(probe)


def test_an_artifact_without_it_reads_and_writes_as_before(probed):
    allocation = load_allocation(probed[1])
    payload = json.loads(allocation_text(allocation))
    del payload["probe"]["held_out"]
    earlier = parse_allocation("allocation.json", payload)
    assert earlier.probe.held_out is None and learned_in_words(earlier.probe) == ""
    assert json.loads(allocation_text(earlier)) == payload


@pytest.mark.parametrize(
    "change, named",
    [
        ({"batches": 0}, "probe.held_out.batches: 0"),
        ({"after": -1.0}, "probe.held_out.after: -1.0"),
        ({"more": 1}, "probe.held_out: unknown key 'more'"),
    ],
)
def test_a_damaged_record_is_refused_by_its_field(probed, change, named):
    payload = json.loads(allocation_text(load_allocation(probed[1])))
    payload["probe"]["held_out"] |= change
    with pytest.raises(AllocationError, match=named):
        parse_allocation("allocation.json", payload)


def test_a_damaged_state_is_refused(tiny_qwen2, tmp_path):
    config = probe_config(tiny_qwen2, tmp_path)
    with pytest.raises(ProbeInterrupted):
        run_probe(config, InterruptAt(1))
    (tmp_path / "out.partial" / "held_out.json").write_text("[1]")
    with pytest.raises(ProbeError, match="held_out.json is damaged .*delete"):
        run_probe(config)
