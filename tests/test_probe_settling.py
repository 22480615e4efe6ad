"""A probe that finds its own length: it stops for a reason, where it always would, and changes nothing by looking."""

from __future__ import annotations

import json
import re

import pytest
from safetensors.torch import load_file

from hybrid_lora_plugin.allocation import AllocationError, load_allocation
from hybrid_lora_plugin.allocation.consensus import overlap
from hybrid_lora_plugin.allocation.schema import AutoStop
from hybrid_lora_plugin.allocation.stability import EDGE, by_standing
from hybrid_lora_plugin.allocation.stopping import stopping_in_words
from hybrid_lora_plugin.allocation.storage import allocation_text, parse_allocation
from hybrid_lora_plugin.cli.probe import main as probe_command
from hybrid_lora_plugin.config import HybridLoraConfig, ProbeCommandConfig, ProbeConfig
from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted
from hybrid_lora_plugin.probing.runner import run_probe
from hybrid_lora_plugin.probing.settling import WarmupChecks
from tests.test_probe_run import InterruptAt, contents, probe_config

#: 14 rows are left for the warm-up, which uses all of them in its fourth step: their order is that of any longer one.
ROWS = 30
WARMUP = dict(warmup_steps="auto", max_warmup_steps=16, warmup_check_steps=2, warmup_agreement=0.2, rows=ROWS)
PARTITIONS = dict(partitions="auto", max_partitions=24, settled_share=0.6, batch_size=1)


@pytest.fixture(scope="module")
def warmed(tiny_qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("warmed")
    return folder, run_probe(probe_config(tiny_qwen2, folder, **WARMUP))


@pytest.fixture(scope="module")
def scored(tiny_qwen2, tmp_path_factory):
    """Stopped by the share, by the limit, and a probe of that many partitions from the start."""
    folder = tmp_path_factory.mktemp("scored")
    return [
        run_probe(probe_config(tiny_qwen2, folder, name, **(PARTITIONS | change)))
        for name, change in (("share", {}), ("limit", {"settled_share": 1.0}), ("fixed", {"partitions": 24}))
    ]


def test_overlap_is_jaccards_index():
    assert overlap([1, 2, 3], [3, 4, 2]) == 0.5 and overlap([1], [1]) == 1.0
    assert overlap([1], [2]) == overlap([], []) == overlap([], [1]) == 0.0


def test_a_warm_up_is_over_when_two_comparisons_in_a_row_agree():
    probe = ProbeConfig(warmup_steps="auto", warmup_check_steps=5, warmup_agreement=0.75)
    choices = iter([[], [1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7], [5, 6, 7]])
    kept, looked = [], []
    checks = WarmupChecks(ProbeCommandConfig(probe=probe), lambda: next(choices), [], kept.append)
    for step in range(31):
        assert not checks.settled
        if checks.look(step) is not None:
            looked.append(step)
        checks.look(step)
    assert checks.overlaps == [0.0, 1.0, 0.0, 0.75, 1.0] and checks.settled
    assert looked == [10, 15, 20, 25, 30] and kept[-1][0] == (5, [])
    assert checks.record() == AutoStop(500, 5, 0.75, [0.0, 1.0, 0.0, 0.75, 1.0], "settled", 4)


def test_the_checks_leave_the_warm_up_as_it_would_have_been_without_them(tiny_qwen2, warmed, tmp_path):
    found = load_allocation(warmed[1])
    assert found.probe.warmup_auto.reason == "settled" and 6 <= found.probe.warmup_steps < 16
    assert len(found.probe.warmup_auto.checks) == found.probe.warmup_steps // 2 - 1
    fixed = run_probe(probe_config(tiny_qwen2, tmp_path, rows=ROWS, warmup_steps=found.probe.warmup_steps))
    assert contents(fixed)["sensitivities.safetensors"] == contents(warmed[1])["sensitivities.safetensors"]
    plain = load_allocation(fixed)
    assert plain.modules == found.modules and plain.probe.held_out == found.probe.held_out
    assert plain.probe.warmup_auto is None and "warmup_auto" not in (fixed / "allocation.json").read_text()


def test_a_warm_up_that_is_cut_stops_where_it_would_have(tiny_qwen2, warmed, tmp_path):
    config, file = probe_config(tiny_qwen2, tmp_path, **WARMUP), tmp_path / "out.partial" / "warmup_checks.json"
    for stop in (3, 2):
        with pytest.raises(ProbeInterrupted):
            run_probe(config, InterruptAt(stop))
    # A check that was written when the warm-up was not: it is taken again.
    checks = json.loads(file.read_text())
    assert [step for step, _ in checks] == [2, 4]
    file.write_text(json.dumps([*checks, [6, [0]], [8, [0]], [10, [0]]]))
    assert contents(run_probe(config)) == contents(warmed[1])


def test_without_enough_checks_the_limit_ends_it_and_that_is_said(tiny_qwen2, tmp_path):
    few = WARMUP | dict(max_warmup_steps=5)
    allocation = load_allocation(run_probe(probe_config(tiny_qwen2, tmp_path, **few)))
    assert (allocation.probe.warmup_steps, allocation.probe.warmup_auto.reason) == (5, "limit")
    (said,) = stopping_in_words(allocation.probe)
    assert said.startswith("warm-up: 5 of at most 5 steps, the limit: the choice was not settled (overlap")
    assert f"W{said[1:]}." in (tmp_path / "out" / "report.md").read_text()


def test_partitions_are_scored_until_the_share_of_decided_modules_is_reached(scored):
    share, limit, fixed = map(load_allocation, scored)
    found = share.probe.partitions_auto
    assert (found.reason, found.limit, found.every) == ("settled", 24, 8)
    # Twice in a row: the first look alone is not believed.
    assert share.probe.partitions == 16 and len(found.checks) == 2 and min(found.checks) >= 0.6
    undecided = len(by_standing(share)[EDGE])
    assert found.checks[-1] == pytest.approx(1 - undecided / len(share.modules))
    assert (limit.probe.partitions, limit.probe.partitions_auto.reason) == (24, "limit")
    assert limit.probe.partitions_auto.checks[:2] == found.checks
    rows = [load_file(folder / "sensitivities.safetensors")["sensitivities"] for folder in scored]
    assert (rows[0] == rows[2][:16]).all() and (rows[1] == rows[2]).all()
    assert fixed.probe.partitions_auto is None and len(rows[2]) == 24
    assert "of the modules decided, 60 % wanted, twice in a row)." in (scored[0] / "report.md").read_text()


def test_a_scoring_that_is_cut_stops_where_it_would_have(tiny_qwen2, scored, tmp_path):
    config = probe_config(tiny_qwen2, tmp_path, "share", **(PARTITIONS | {"settled_share": 1.0}))
    for stop in (8 + 8, 5):
        with pytest.raises(ProbeInterrupted):
            run_probe(config, InterruptAt(stop))
    last = InterruptAt(0)
    assert contents(run_probe(config, last)) == contents(scored[1])
    assert any("16 partitions scored: " in note and "of the modules are decided" in note for note in last.notes)


def test_a_run_compares_how_the_length_was_found(warmed, scored):
    omegaconf = pytest.importorskip("omegaconf")
    from hybrid_lora_plugin.verl_backend.probe.resume import ConfigurationError, has_earlier_allocation

    def hybrid(own, *changes):
        probe = dict(warmup_steps=8, partitions=4, batch_size=4, max_length=64, lr=5e-3) | own
        given = [f"probe.{name}={value}" for name, value in probe.items() if name != "rows"]
        node = omegaconf.OmegaConf.from_dotlist([*given, "lora.rank=3", "budget.ratio=0.3", *changes])
        structured = omegaconf.OmegaConf.structured(HybridLoraConfig)
        return omegaconf.OmegaConf.to_object(omegaconf.OmegaConf.merge(structured, node))

    for folder, own, changes in (
        (warmed[1], WARMUP, ("warmup_steps=8", "max_warmup_steps=17", "warmup_check_steps=3", "warmup_agreement=0.3")),
        (scored[0], PARTITIONS, ("partitions=8", "max_partitions=32", "settled_share=0.7")),
    ):
        assert has_earlier_allocation(folder, hybrid(own))
        for change in changes:
            with pytest.raises(ConfigurationError, match=f"hybrid_lora.probe.{change.partition('=')[0]}: "):
                has_earlier_allocation(folder, hybrid(own, f"probe.{change}"))


@pytest.mark.parametrize(
    "given, message",
    [
        (["probe.partitions=some"], "probe.partitions: 'some' is not usable; give at least 2"),
        (["probe.warmup_steps=1.5"], "probe.warmup_steps: '1.5' is not usable; give 0 or more steps, or auto"),
        (["probe.partitions=1"], "probe.partitions: 1 is not usable"),
        (["probe.max_partitions=30"], "read with probe.partitions=auto"),
        (["probe.warmup_agreement=0.5"], "read with probe.warmup_steps=auto"),
        (["probe.partitions=auto", "criterion=alpha"], "probe.partitions: 'auto' .* 'alpha' is measured once"),
        (["probe.warmup_steps=auto", "criterion=adalora"], "probe.warmup_steps: 'auto' leaves AdaLoRA's pruning"),
        (
            ["probe.warmup_steps=auto", "probe.partitions_per_batch=3"],
            "probe.warmup_check_partitions: 4 is not usable; give at least those of two",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(tiny_qwen2, tmp_path, capsys, given, message):
    command = [f"model.path={tiny_qwen2}", "probe.files=rows.jsonl", f"output_dir={tmp_path / 'out'}", *given]
    assert probe_command(command) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "change, named",
    [({"reason": "tired"}, "probe.warmup_auto.reason: 'tired'"), ({"limit": 1}, "probe.warmup_steps: .*at most 1")],
)
def test_a_damaged_record_is_refused_by_its_field(warmed, change, named):
    payload = json.loads(allocation_text(load_allocation(warmed[1])))
    payload["probe"]["warmup_auto"] |= change
    with pytest.raises(AllocationError, match=named):
        parse_allocation("allocation.json", payload)
