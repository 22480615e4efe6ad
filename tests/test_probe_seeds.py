"""Several seeds in one command: each a whole probe, one choice of all, and how far they agree."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from hybrid_lora_plugin.allocation import AllocationError, load_allocation
from hybrid_lora_plugin.allocation.consensus import agreement_in_words, by_seed, consensus, named_by_seed, times_chosen
from hybrid_lora_plugin.allocation.storage import allocation_text, parse_allocation
from hybrid_lora_plugin.cli.allocate import main as allocate_command
from hybrid_lora_plugin.cli.arguments import parse
from hybrid_lora_plugin.cli.probe import main as probe_command
from hybrid_lora_plugin.config import HybridLoraConfig, ProbeCommandConfig
from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.interrupt import ProbeInterrupted
from hybrid_lora_plugin.probing.runner import run_probe
from hybrid_lora_plugin.scoring import ModuleScores
from tests.test_probe_run import InterruptAt, contents, probe_config

SEEDS = [0, 3, 1]


@pytest.fixture(scope="module")
def together(tiny_qwen2, tmp_path_factory):
    return run_probe(probe_config(tiny_qwen2, tmp_path_factory.mktemp("together"), seeds=list(SEEDS)))


@pytest.fixture(scope="module")
def apart(tiny_qwen2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    return [run_probe(probe_config(tiny_qwen2, folder, f"seed-{seed}", seed=seed)) for seed in SEEDS]


def test_each_seed_is_the_probe_it_would_be_alone(together, apart):
    measured = load_file(together / "sensitivities.safetensors")
    allocation = load_allocation(together)
    for number, (folder, seed) in enumerate(zip(apart, SEEDS, strict=True)):
        alone, one = load_allocation(folder), allocation.probe.seeds[number]
        for name, values in load_file(folder / "sensitivities.safetensors").items():
            assert torch.equal(measured.pop(f"seed_{number}/{name}"), values), name
        assert (one.seed, one.held_out, one.partitions) == (seed, alone.probe.held_out, 4)
        assert (allocation.probe.data | one.data) == alone.probe.data
        assert allocation.agreement.chosen[number] == alone.full_names
    assert not measured and allocation.agreement.seeds == SEEDS and "files" not in allocation.probe.seeds[0].data


def test_the_choice_is_by_the_mean_of_the_ranks(together, apart):
    allocation, alone = load_allocation(together), [load_allocation(folder).modules for folder in apart]
    for index, module in enumerate(allocation.modules):
        ranks = [1 + sum(other.score < modules[index].score for other in modules) for modules in alone]
        assert module.score == pytest.approx(sum(ranks) / 3)
        assert module.mean == pytest.approx(sum(modules[index].mean for modules in alone) / 3)
    full = max(module.score for module in allocation.modules if module.assignment == "full")
    assert full <= min(module.score for module in allocation.modules if module.assignment == "lora")
    assert allocation.stability.batches == 12


def test_equal_scores_share_a_rank_and_no_signal_in_one_seed_is_none(together):
    def scored(values, silent=()):
        scores = torch.tensor(values, dtype=torch.float64)
        signal = torch.tensor([index not in silent for index in range(len(values))])
        return ModuleScores(scores, signal, scores, torch.zeros_like(scores))

    found = consensus([scored([5.0, 1.0, 1.0, 9.0]), scored([1.0, 2.0, 3.0, 4.0], silent=(3,))])
    assert found.scores.tolist() == [2.0, 1.75, 2.25, 4.0]
    assert found.signal.tolist() == [True, True, True, False] and found.means.tolist() == [3.0, 1.5, 2.0, 6.5]


def test_the_agreement_is_in_the_output_and_in_the_report(together, capsys, tmp_path):
    allocation = load_allocation(together)
    chosen = [set(names) for names in allocation.agreement.chosen]
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert allocation.agreement.overlaps == [len(chosen[a] & chosen[b]) / len(chosen[a] | chosen[b]) for a, b in pairs]
    every, some = set.intersection(*chosen), set.union(*chosen) - set.intersection(*chosen)
    said, report = agreement_in_words(allocation), (together / "report.md").read_text()
    assert said.startswith(f"3 seeds (0, 3, 1): {len(every)} modules are chosen by all of them, {len(some)} by some; ")
    assert some and f"{said}.\n" in report and "## Do the seeds agree?" in report
    for name in some:
        assert f"| `{name}` | {times_chosen(allocation)[name]} of 3 |" in report
    arguments = [f"artifact={together}", "budget.ratio=0.3"]
    assert allocate_command([*arguments, f"output_dir={tmp_path / 'again'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("the warm-up of seed ") and ", which learned least, lowered the loss on 4" in lines[1]
    assert lines[2] == said
    # The same choice of the same measurements.
    assert contents(tmp_path / "again") == contents(together)


def test_other_choices_are_made_of_it_without_a_model(together, tmp_path):
    for criterion, agrees in (("snip", True), ("alpha", True), ("random", False), ("lora_ffn", False)):
        given = [f"artifact={together}", f"output_dir={tmp_path / criterion}", f"criterion={criterion}"]
        given += [] if criterion == "lora_ffn" else ["budget.ratio=0.3"]
        assert allocate_command(given) == 0
        allocation = load_allocation(tmp_path / criterion)
        assert (allocation.agreement is not None) == agrees
        assert [one.seed for one in allocation.probe.seeds] == SEEDS


@pytest.mark.parametrize("stops", [(5,), (14, 15)], ids=str)
def test_a_probe_that_is_cut_goes_on_with_the_seed_it_was_at(tiny_qwen2, together, tmp_path, stops):
    config = probe_config(tiny_qwen2, tmp_path, seeds=list(SEEDS))
    for stop in stops:
        with pytest.raises(ProbeInterrupted) as caught:
            run_probe(config, InterruptAt(stop))
        assert caught.value.folder == tmp_path / "out.partial"
    last = InterruptAt(0)
    assert contents(run_probe(config, last)) == contents(together)
    assert len(last.losses) == 3 * 12 - sum(stops) and not (tmp_path / "out.partial").exists()


def test_an_unfinished_probe_of_other_seeds_is_not_continued(tiny_qwen2, tmp_path):
    with pytest.raises(ProbeInterrupted):
        run_probe(probe_config(tiny_qwen2, tmp_path, seeds=[0, 3]), InterruptAt(2))
    for change in (dict(seeds=[0, 4]), {}):
        with pytest.raises(ProbeError, match="delete .*out.partial"):
            run_probe(probe_config(tiny_qwen2, tmp_path, **change))


@pytest.mark.parametrize(
    "given, message",
    [
        ("probe.seeds=[1]", "probe.seeds: [1] is not usable; give two different seeds or more"),
        ("probe.seeds=[1,1]", "probe.seeds: [1, 1] is not usable"),
        ("probe.seeds=[a,b]", "probe.seeds: '[a,b]' is not usable; give a list such as [0,1,2]"),
        ("probe.seed=2 probe.seeds=[0,1]", "probe.seed: 2 has no effect here; leave it out, it is read without"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(tiny_qwen2, tmp_path, capsys, given, message):
    command = [f"model.path={tiny_qwen2}", "probe.files=rows.jsonl", f"output_dir={tmp_path / 'out'}"]
    assert probe_command([*command, *given.split()]) == 2
    assert message in capsys.readouterr().err
    assert parse(["probe.seeds=[0, 2]"], ProbeCommandConfig).probe.seeds == [0, 2]


def test_a_run_compares_the_seeds(together, apart):
    omegaconf = pytest.importorskip("omegaconf")
    from hybrid_lora_plugin.verl_backend.probe.resume import ConfigurationError, has_earlier_allocation

    def hybrid(*changes):
        probe = dict(warmup_steps=8, partitions=4, batch_size=4, max_length=64, lr=5e-3)
        given = [
            *(f"probe.{name}={value}" for name, value in probe.items()),
            "lora.rank=3",
            "budget.ratio=0.3",
            *changes,
        ]
        node = omegaconf.OmegaConf.merge(
            omegaconf.OmegaConf.structured(HybridLoraConfig), omegaconf.OmegaConf.from_dotlist(given)
        )
        return omegaconf.OmegaConf.to_object(node)

    assert has_earlier_allocation(together, hybrid("probe.seeds=[0,3,1]")) and has_earlier_allocation(
        apart[0], hybrid()
    )
    for folder, change in (
        (together, "probe.seeds=[0,3]"),
        (together, "probe.seed=0"),
        (apart[0], "probe.seeds=[0,3]"),
    ):
        with pytest.raises(ConfigurationError, match="hybrid_lora.probe.seeds: "):
            has_earlier_allocation(folder, hybrid(change))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seeds": [0, 3]}, "agreement.chosen: 3 choices for 2 seeds"),
        ({"overlaps": [1.0, 1.0, 1.0]}, "agreement.overlaps: .* but the choices give"),
        ({"chosen": [["model.nothing"], [], []]}, r"agreement.chosen\[0\]: 'model.nothing' is no module"),
    ],
)
def test_a_damaged_record_is_refused_by_its_field(together, change, named):
    payload = json.loads(allocation_text(load_allocation(together)))
    payload["agreement"] |= change
    with pytest.raises(AllocationError, match=named):
        parse_allocation("allocation.json", payload)


def test_measurements_of_a_missing_seed_are_refused():
    one = {"alpha": torch.ones(2)}
    assert by_seed(one) == [one] and by_seed(named_by_seed([one, one])) == [one, one]
    for odd in ({"seed_1/alpha": torch.ones(2)}, {"seed_0/alpha": torch.ones(2), "alpha": torch.ones(2)}):
        with pytest.raises(AllocationError, match="are not those of seeds"):
            by_seed(odd)
