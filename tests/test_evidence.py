"""``hybrid-lora-evidence``: what a plan may hold, which runs follow, that results are kept, and what a report says."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from hybrid_lora_plugin.candidates import find_candidates_from_config
from hybrid_lora_plugin.cli.evidence import main
from hybrid_lora_plugin.cli.evidence_progress import LineWatch
from hybrid_lora_plugin.config_evidence import EvidenceCommandConfig, EvidenceRatesConfig
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.evidence.arms import matched_to, planned_arms
from hybrid_lora_plugin.evidence.draws import stratified_draw
from hybrid_lora_plugin.evidence.intervals import difference, student_quantile
from hybrid_lora_plugin.evidence.matching import matched_rank, matched_steps, trainable_parameters
from hybrid_lora_plugin.evidence.plan_file import plan_of, read_plan
from hybrid_lora_plugin.evidence.protocol import Outcome, Start
from hybrid_lora_plugin.evidence.protocols import open_protocol
from hybrid_lora_plugin.evidence.replicas.base import base_config
from hybrid_lora_plugin.evidence.replicas.settings import BaseSettings
from hybrid_lora_plugin.evidence.selection_options import selection_config
from hybrid_lora_plugin.evidence.stages import Watch, run_stages
from hybrid_lora_plugin.evidence.tuning import Rates, choose_rates, grid
from tests.support.analytic_protocol import CHOOSE_SECONDS, STOP_AFTER, AnalyticProtocol
from tests.support.verl_processes import ROOT, environment_of

PLAN = {
    "name": "analytic",
    "protocol": "tests.support.analytic_protocol:AnalyticProtocol",
    "settings": {"lora_reaches": 0.3},
    "bases": ["narrow", "wide"],
    "tasks": ["digits", "sum"],
    "steps": 20,
    "rank": 2,
    "budgets": [0.2],
    "arms": ["gradient_norm", "gradient_norm:reversed", "hybrid", "only:o", "lora_ffn", "random", "random_stratified",
             "lora", "lora_matched", "lora_flops", "dora", "full"],
    "draws": 5,
    "seeds": {"tune": [100, 101], "compare": [0, 1, 2, 3]},
    "rates": {"full": [1e-4, 1e-3, 3e-2], "lora": [1e-4, 1e-3, 1e-2]},
    "primary": [{"arm": "gradient_norm", "against": ["random", "lora_matched"]}],
    "resamples": 1000,
}  # fmt: skip


def write_plan(file, **changes):
    file.write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
    return file


def run(folder, capsys, *options):
    """Status and texts of the command."""
    status = main([f"output_dir={folder}", *options])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a finished comparison; tests must not change it."""
    root = tmp_path_factory.mktemp("evidence")
    assert main([f"plan={write_plan(root / 'plan.yaml')}", f"output_dir={root / 'out'}"]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    return AnalyticProtocol({}, tmp_path_factory.mktemp("protocol"), "cpu", ["narrow"], ["sum"])


# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"stpes": 3}, "stpes: is no field of a plan; did you mean steps?"),
        ({"seeds": {"tune": [1], "comapre": [2]}}, "seeds.comapre: is no field of a plan; did you mean"),
        ({"seeds": [1, 2]}, "seeds: [1, 2] is not usable; give a block with tune:, compare:"),
        ({"steps": "20"}, "steps: '20' is not usable; give a whole number"),
        ({"steps": 0}, "steps: 0 is not usable; give a number of optimizer steps, e.g. 200"),
        ({"steps": True}, "steps: True is not usable; give a whole number"),
        ({"name": None}, "name: None is not usable; give a text"),
        ({"name": ""}, "name: not given; write name: TEXT"),
        ({"bases": "narrow"}, "bases: 'narrow' is not usable; give a list"),
        ({"bases": ["a", "a"]}, "bases: ['a', 'a'] is not usable; give different names, e.g. [small]"),
        ({"budgets": [0.1, 1.5]}, "budgets: [0.1, 1.5] is not usable; give different fractions in (0, 1], e.g. [0.1]"),
        ({"seeds": {"tune": [1, 2], "compare": [2, 3]}}, "seeds.compare: [2] are in seeds.tune too"),
        ({"rates": {"full": [1e-2, 1e-3], "lora": [1e-3]}}, "rates.full: [0.01, 0.001] are in no order; give"),
        ({"rates": {"full": [1e-3]}}, "rates.lora: [] is not usable; give different numbers above 0"),
        ({"arms": ["hybird"]}, "arms: 'hybird' is unknown; did you mean 'hybrid'?"),
        ({"arms": ["lora_ffn:reversed"]}, "arms: 'lora_ffn:reversed' is unknown"),
        ({"arms": ["only:k"]}, "arms: 'only:k' is unknown"),
        ({"arms": ["random", "random"]}, "arms: random is there twice; name each arm once"),
        ({"arms": [{"name": "x/1", "selection": {"criterion": "hybrid"}}]}, "arms[0].name: 'x/1' is not usable"),
        ({"arms": [{"name": "x", "selection": {"critreion": "hybrid"}}]}, "arms[0].selection: {'critreion': 'hybrid'}"),
        ({"arms": [{"name": "x", "kind": "lroa"}]}, "arms[0].kind: 'lroa' is not supported; choose one"),
        ({"arms": [{"name": "x", "kind": "full", "rank": 2}]}, "arms[0].rank: 2 has no effect with kind: full"),
        ({"arms": [{"name": "x", "selection": {"criterion": "hybrid", "budget.ratio": 1}}]}, "is not an arm's to say"),
        ({"selection": {"criterion": "hybrid"}}, "selection.criterion: is each arm's to say; leave it out"),
        ({"selection": {"probe.warmup_step": 3}}, "did you mean probe.warmup_steps?"),
        ({"primary": []}, "primary: [] is not usable; give at least one, e.g. [{arm: lookahead"),
        ({"primary": [{"arm": "hybrid"}]}, "primary[0]: {'arm': 'hybrid'} is not usable; give {arm: lookahead"),
        ({"primary": [{"arm": "hybrd", "against": ["random"]}]}, "primary[0].arm: 'hybrd' is none of the arms"),
        ({"match": "lora"}, "match: lora selects no modules; name an arm that does"),
        ({"without": ["lora"]}, "arms: lora_flops needs lora, whose FLOPs a step it starts from; name it too"),
        ({"rates": {"full": [1e-3], "lora": [1e-3], "zeroth": [2e-3, 1e-3]}}, "rates.zeroth: [0.002, 0.001] are in no"),
        ({"arms": [*PLAN["arms"], "lora_passes"]}, "arms: lora_passes is matched to the one arm of kind zeroth_order"),
        ({"arms": ["random", "zeroth_order"], "rates": PLAN["rates"] | {"zeroth": [1e-3]}},
         "arms: protocol tests.support.analytic_protocol:AnalyticProtocol does not train zeroth_order; leave"),
        ({"tuning": {"per": "seed"}}, "tuning.per: 'seed' is not supported; choose one of task, base, arm"),
        ({"protocol": "sftt"}, "protocol: 'sftt' is unknown; did you mean 'sft'?"),
        ({"protocol": "nowhere:Here"}, "protocol: 'nowhere:Here' cannot be imported (No module named 'nowhere')"),
        ({"settings": {"reaches": 1}}, "settings.reaches: unknown; give some of lora_reaches, version"),
        ({"level": 1}, "level: 1.0 is not usable; give a level in [0.5, 1), e.g. 0.95"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(tmp_path, capsys, changes, said):
    status, _, error = run(tmp_path / "out", capsys, f"plan={write_plan(tmp_path / 'plan.yaml', **changes)}")
    assert status == 2 and error.startswith("hybrid-lora-evidence: ") and said in error, error
    assert error.count("\n") == 1 and ("; " in error)


def test_a_key_given_twice_and_a_file_that_is_no_yaml_are_refused(tmp_path, capsys):
    for text, said in (("name: a\nname: b\n", "is no YAML"), ("[1, 2]", "holds [1, 2]"), ("a: [", "is no YAML")):
        (tmp_path / "plan.yaml").write_text(text)
        status, _, error = run(tmp_path / "out", capsys, f"plan={tmp_path / 'plan.yaml'}")
        assert status == 2 and said in error
    assert run(tmp_path / "out", capsys, "plan=nowhere.yaml")[0] == 2
    assert "write plan=FILE.yaml" in run(tmp_path / "out", capsys)[2]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes/evidence").glob("*.yaml")))
def test_the_plans_of_this_repository_can_be_run(name, tmp_path):
    plan = read_plan(ROOT / "recipes/evidence" / name)
    protocol = open_protocol(plan.protocol, plan.settings, tmp_path, "cpu", plan.bases, plan.tasks)
    # Of another protocol neither a model nor rows are there: any candidates will do.
    shapes = getattr(protocol, "bases", None) or [BaseSettings(name=name) for name in plan.bases]
    candidates = {base.name: find_candidates_from_config(base_config(base)) for base in shapes}
    arms, start = planned_arms(plan, candidates.values()), Start(plan.bases[0], plan.tasks[0], 0)
    for arm in arms:
        if arm.selects:
            asked = arm.at(start, 0, candidates[start.base])
            selection_config(asked, protocol.settings.probe, plan.rank, 0)


def test_all_arms_are_every_criterion_in_both_directions_with_the_controls(tmp_path, capsys):
    from hybrid_lora_plugin.config_selection import CRITERIA, NAMING

    plan = write_plan(tmp_path / "plan.yaml", arms=["all"], without=["snip", "only:q"])
    for stage in ("prepare", "cost"):
        status, said, _ = run(tmp_path / "out", capsys, f"plan={plan}", f"stage={stage}")
        assert status == 0
    arms = said.splitlines()[0].partition(": ")[2].split(", ")
    scored = set(CRITERIA) - {*NAMING, "spread", "random", "random_stratified", "trial", "snip"}
    assert {"hybrid", "gradient_norm"} <= scored <= set(arms)
    assert {f"{name}:reversed" for name in scored | {"snip"}} <= set(arms) and "snip" not in arms
    assert {"only:o", "only:up", "only:down", "lora_ffn", "random", "random_stratified"} <= set(arms)
    assert {"lora", "lora_matched", "lora_flops", "dora", "full"} <= set(arms) and "only:q" not in arms


def test_zeroth_order_has_rates_of_its_own_and_lora_with_as_many_passes_follows_from_it(protocol):
    candidates = [protocol.candidates("narrow")]
    changes = {
        "arms": ["zeroth_order", "lora", "lora_passes"],
        "primary": [{"arm": "zeroth_order", "against": ["lora"]}],
    }
    with pytest.raises(ConfigurationError, match="rates.zeroth: not given; give learning rates"):
        planned_arms(plan_of(PLAN | changes), candidates)
    plan = plan_of(PLAN | changes | {"rates": {"lora": [1e-3, 1e-2], "zeroth": [1e-6, 1e-4, 1e-2], "full": [1e-3]}})
    arms = planned_arms(plan, candidates)
    zeroth, lora, passes = arms
    assert (zeroth.kind, zeroth.rank, zeroth.selects, zeroth.budget) == ("zeroth_order", 2, False, None)
    assert grid(zeroth.kind, plan.rates) == [Rates(0.0, a, b) for a in plan.rates.lora for b in plan.rates.zeroth]
    assert grid(lora.kind, plan.rates) == [Rates(0.0, a) for a in plan.rates.lora]
    assert matched_to(plan, arms, passes) == zeroth and passes.kind == "lora"
    ended = [Outcome(((0, 5.0), (4, value)), {}, 1, 1.0) for value in (2.0, 1.0)]
    chosen = choose_rates([(Rates(0.0, 1e-3, 1e-6), ended[:1]), (Rates(0.0, 1e-2, 1e-4), ended[1:])], True, plan.rates)
    assert chosen.rates.zeroth == 1e-4 and chosen.edges == ("lora",)
    for missing, said in (("lora", "lora_passes needs lora"), ("zeroth_order", "there are 0; name one")):
        with pytest.raises(ConfigurationError, match=said):
            planned_arms(
                plan_of(
                    PLAN
                    | changes
                    | {
                        "arms": [n for n in changes["arms"] if n != missing] + ["random"],
                        "primary": [{"arm": "random", "against": ["lora_passes"]}],
                    }
                ),
                candidates,
            )


# -- draws and matching -----------------------------------------------------------------------------------------------


def test_a_stratified_draw_takes_types_and_depths_in_turn(protocol):
    candidates = protocol.candidates("narrow")
    budget = sum(one.parameters for one in candidates)
    drawn = [stratified_draw(candidates, 0.25, seed) for seed in range(40)]
    assert len({tuple(names) for names in drawn}) > 30 and drawn[3] == stratified_draw(candidates, 0.25, 3)
    by_name = {one.name: one for one in candidates}
    for names in drawn:
        chosen = [by_name[name] for name in names]
        assert 0.2 * budget < sum(one.parameters for one in chosen) <= 0.25 * budget
        # Six or seven modules of four types: each type once or twice, unless what is left fits the small ones only.
        assert {one.type for one in chosen} == {"q_proj", "o_proj", "up_proj", "down_proj"}
        for type_ in ("up_proj", "down_proj"):
            thirds = [one.layer // 2 for one in chosen if one.type == type_]
            assert len(set(thirds)) == len(thirds)


def test_matched_lora_is_the_largest_that_does_not_pass(protocol):
    candidates = protocol.candidates("narrow")
    full = [one.name for one in candidates][:5]
    wanted = trainable_parameters(candidates, full, 2)
    found = matched_rank(candidates, [wanted])
    assert found.wanted == wanted
    assert trainable_parameters(candidates, [], found.rank) == found.parameters <= wanted
    assert trainable_parameters(candidates, [], found.rank + 1) > wanted
    assert matched_rank(candidates, [1, 1]).rank == 1
    assert matched_steps(200, 4.0, 4.2) == 210 and matched_steps(3, 4.0, 0.1) == 1


def test_rates_are_the_best_by_the_mean_and_a_run_that_diverged_comes_last():
    def ended(value, diverged=False):
        return Outcome(((0, 5.0), (4, value)), {}, 1, 1.0, diverged)

    rates = EvidenceRatesConfig(full=[0.1, 0.2, 0.3], lora=[1.0, 2.0, 3.0])
    tried = [
        (Rates(0.3, 2.0), [ended(0.0), ended(0.0, True)]),
        (Rates(0.2, 2.0), [ended(2.0), ended(2.0)]),
        (Rates(0.1, 2.0), [ended(1.0), ended(3.0)]),
        (Rates(0.1, 3.0), [ended(4.0), ended(4.0)]),
    ]
    lowest, highest = choose_rates(tried, True, rates), choose_rates(tried, False, rates)
    assert (lowest.rates, lowest.value, lowest.edges) == (Rates(0.1, 2.0), 2.0, ("full",))
    assert (highest.rates, highest.edges) == (Rates(0.1, 3.0), ("full", "lora"))
    (only,) = (choose_rates(tried[:1], True, rates),)
    assert (only.diverged, only.runs, only.value) == (1, 2, 2.5)
    assert len(grid("hybrid", rates)) == 9
    assert grid("lora", rates) == grid("dora", rates) == [Rates(0.0, rate) for rate in rates.lora]
    assert grid("full", rates) == [Rates(rate, 0.0) for rate in rates.full]


# -- intervals --------------------------------------------------------------------------------------------------------


def test_student_quantiles_are_those_of_the_tables():
    for freedom, quantile in ((1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (7, 2.3646243), (30, 2.0422725)):
        assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-6)
    assert student_quantile(0.995, 4) == pytest.approx(4.6040949, abs=1e-6)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 6, 8])
def test_an_interval_covers_as_often_as_it_says(seeds):
    stream, hits = np.random.default_rng(7), 0
    for _ in range(2000):
        found = difference(stream.normal(1.0, 2.0, size=(seeds, 1)).tolist(), True, 0.95, 2000)
        hits += found.low <= 1.0 <= found.high
    assert 0.93 < hits / 2000 < 0.97


def test_verdicts_name_the_side_and_need_the_whole_interval():
    better = [[-1.0, -1.2], [-0.9, -1.1], [-1.1, -1.0], [-1.0, -0.8]]
    found = difference(better, True, 0.95, 1000)
    assert (found.verdict, found.better, found.starts, found.seeds) == ("supported", 8, 8, 4)
    assert difference(better, False, 0.95, 1000).verdict == "contradicted"
    assert difference([[-1.0], [1.2]], True, 0.95, 1000).verdict == "not distinguished"
    alone = difference([[-1.0, -1.0]], True, 0.95, 1000)
    assert (alone.low, alone.verdict) == (None, "not distinguished")
    # Three seeds of two equal arms agree on a sign once in four times.
    three = difference([[-1.0], [-2.0], [-3.0]], True, 0.95, 10_000)
    assert (three.low, three.high) == pytest.approx((-2 - 4.3026527 / 3**0.5, -2 + 4.3026527 / 3**0.5), abs=1e-6)
    assert three.verdict == "not distinguished"


# -- stages -----------------------------------------------------------------------------------------------------------


def lines_of(folder, name="runs.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_stages_are_in_order_and_say_what_is_missing(tmp_path, capsys):
    plan, folder = write_plan(tmp_path / "plan.yaml"), tmp_path / "out"
    assert run(folder, capsys, f"plan={plan}", "stage=tune")[2].endswith("run stage=prepare first\n")
    assert run(folder, capsys, "stage=choose")[0] == 0
    for stage, said in (
        ("tune", "run stage=choose first"),
        ("freeze", "run stage=choose first"),
        ("compare", "run stage=choose first"),
    ):
        fresh = tmp_path / f"fresh-{stage}"
        assert run(fresh, capsys, f"plan={plan}", "stage=prepare")[0] == 0
        status, _, error = run(fresh, capsys, f"stage={stage}")
        assert status == 2 and said in error
    assert run(folder, capsys, "stage=freeze")[2].endswith("run stage=tune first\n")
    assert run(folder, capsys, "stage=tune")[0] == 0
    assert run(folder, capsys, "stage=compare")[2].endswith("run stage=freeze first\n")
    assert run(folder, capsys, "stage=report")[2].endswith("run stage=freeze first\n")
    assert run(folder, capsys, "stage=freeze")[0] == 0
    assert run(folder, capsys, "stage=report")[2].endswith("run stage=compare\n")


def test_the_report_is_made_again_bit_for_bit_and_so_is_the_study(finished, tmp_path, capsys):
    names = ["report.md", "report.json", "forest.png", "curves.png", "picks-narrow.png", "picks-wide.png"]
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    for name in names:
        (again / name).unlink()
    # Raw results in another order are the same results.
    lines = (again / "runs.jsonl").read_text().splitlines(keepends=True)
    (again / "runs.jsonl").write_text("".join(reversed(lines)))
    assert run(again, capsys, "stage=report")[0] == 0
    # Whatever machine it is on: nothing is left that its threads could change.
    status, said, _ = run(again, capsys, "stage=all")
    assert status == 0 and [line.partition(":")[0] for line in said.splitlines() if "nothing is left" in line] == [
        "choose",
        "tune",
        "compare",
    ]
    anew = tmp_path / "anew"
    assert run(anew, capsys, f"plan={finished / 'plan.yaml'}", "workers=2")[0] == 0
    for folder in (again, anew):
        assert [name for name in names if (folder / name).read_bytes() != (finished / name).read_bytes()] == []


def test_what_was_interrupted_goes_on_and_what_was_half_written_is_done_again(finished, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setenv(STOP_AFTER, "100")
    status, _, error = run(folder, capsys, f"plan={finished / 'plan.yaml'}")
    assert status == 130 and "what is done is kept in" in error and "to continue, run: hybrid-lora-evidence" in error
    assert len(lines_of(folder)) == 100
    with (folder / "runs.jsonl").open("a") as stream:
        stream.write('{"base":"narrow","ta')
    monkeypatch.setenv(STOP_AFTER, "-1")
    assert run(folder, capsys)[0] == 0
    assert (folder / "report.md").read_bytes() == (finished / "report.md").read_bytes()
    assert len(lines_of(folder)) == len(lines_of(finished))


def test_workers_that_are_in_the_middle_of_a_choice_end_with_the_command(finished, tmp_path):
    command = [f"plan={finished / 'plan.yaml'}", f"output_dir={tmp_path / 'out'}", "workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrid_lora_plugin.cli.evidence", *command],
        cwd=ROOT,
        env=environment_of(**{CHOOSE_SECONDS: "600"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        # The command, multiprocessing's tracker, and both workers.
        while len(processes_of(process.pid)) < 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(processes_of(process.pid)) == 4
        process.terminate()
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 143 and "to continue, run: hybrid-lora-evidence" in said, said
        while processes_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert processes_of(process.pid) == []
    finally:
        for number in processes_of(process.pid):
            os.kill(number, signal.SIGKILL)


def processes_of(session):
    """Those of a session that still run."""
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and status_of(entry)[0] == session and status_of(entry)[1] != "Z"
    ]


def status_of(entry):
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None, "Z"
    return int(fields[3]), fields[0]


def test_nothing_is_run_twice_and_arms_that_choose_alike_share_a_run(finished):
    lines = lines_of(finished)
    keys = [json.dumps({k: v for k, v in line.items() if k not in ("arm", "outcome")}) for line in lines]
    assert len(set(keys)) == len(keys)
    # Steps and weights of the run, not the arm's name, are what it is known by: full fine-tuning at three rates.
    full = [line for line in lines if line["arm"] == "full" and line["seed"] == 100]
    assert len(full) == 2 * 2 * 3 and {line["lora_lr"] for line in full} == {0.0}


def test_a_changed_plan_is_refused_by_what_changed(finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    for changes, said in (
        ({"seeds": {"tune": [100, 101], "compare": [0, 1, 2, 3, 4]}}, "seeds.compare: is [0, 1, 2, 3, 4] and was"),
        ({"rank": 3}, "rank: is 3 and was 2 when the comparison was frozen; put it back, or give another output_dir"),
        ({"settings": {}}, "settings.lora_reaches: is null and was 0.3 when"),
        ({"primary": [{"arm": "hybrid", "against": ["random"]}]}, "primary: is [{"),
    ):  # fmt: skip
        status, _, error = run(folder, capsys, f"plan={write_plan(tmp_path / 'plan.yaml', **changes)}")
        assert status == 2 and said in error, error
    assert (folder / "plan.yaml").read_bytes() == (finished / "plan.yaml").read_bytes()


def test_another_machine_edited_results_and_a_late_plan_are_refused(finished, tmp_path, capsys):
    folder = tmp_path / "device"
    shutil.copytree(finished, folder)
    lines = (folder / "runs.jsonl").read_text().splitlines(keepends=True)
    (folder / "runs.jsonl").write_text("".join(lines[:-3]))
    status, _, error = run(folder, capsys, "stage=compare", "device=cuda")
    assert status == 2 and "identity: device: is 'cuda' and was 'cpu' when results were made" in error
    frozen = folder / "frozen.json"
    frozen.write_text(frozen.read_text().replace('"resamples": 1000', '"resamples": 2000'))
    assert "is not what its digest" in run(folder, capsys, "stage=report")[2]
    frozen.unlink()
    assert "has runs of seeds [0, 1, 2, 3] already" in run(folder, capsys, "stage=freeze")[2]
    # A value that was changed by hand moves the rates, which are frozen.
    edited = tmp_path / "edited"
    shutil.copytree(finished, edited)
    changed = [json.loads(line) for line in lines]
    for line in changed:
        if line["arm"] == "full" and line["full_lr"] == 1e-4:
            line["outcome"]["curve"][-1][1] = 0.0
    (edited / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    status, _, error = run(edited, capsys, "stage=report")
    assert status == 2 and "rates.full." in error and "when the comparison was frozen" in error


def test_two_processes_do_not_write_to_one_folder(finished, tmp_path, capsys):
    import fcntl

    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is at work" in run(folder, capsys, "stage=report")[2]


def test_seeds_that_are_complete_are_reported_and_the_others_named(finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    lines = [line for line in lines_of(folder) if not (line["seed"] == 3 and line["arm"] == "dora")]
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(folder, capsys, "stage=report")[0] == 0
    assert (
        "**INCOMPLETE**: of seeds [3] runs are missing; this is what seeds [0, 1, 2] say."
        in (folder / "report.md").read_text()
    )


# -- what the report says ---------------------------------------------------------------------------------------------


def test_the_table_is_what_the_runs_say(finished):
    report, runs = json.loads((finished / "report.json").read_text()), lines_of(finished)
    frozen = json.loads((finished / "frozen.json").read_text())
    # Full fine-tuning by hand: at its own rate, the last value of each curve.
    rows = {row["arm"]: row for row in report["pooled"]}
    values = {}
    for line in runs:
        chosen = frozen["rates"]["full"][f"{line['base']}/{line['task']}"]["full"]
        if line["arm"] == "full" and line["seed"] < 100 and line["full_lr"] == chosen:
            values[line["base"], line["task"], line["seed"]] = line["outcome"]["curve"][-1][1]
    assert len(values) == 2 * 2 * 4
    assert rows["full"]["mean"] == pytest.approx(np.mean(list(values.values())))
    assert rows["full"]["median"] == pytest.approx(np.median(list(values.values())))
    within = [np.var([values[b, t, s] for s in range(4)], ddof=1) for b in PLAN["bases"] for t in PLAN["tasks"]]
    assert rows["full"]["sd"] == pytest.approx(np.mean(within) ** 0.5)
    # A random arm is the mean over its draws, and its difference to itself is not in the table.
    draws = [
        line["outcome"]["curve"][-1][1]
        for line in runs
        if line["arm"].startswith("random/") and line["seed"] == 0 and (line["base"], line["task"]) == ("wide", "sum")
    ]
    assert len(draws) == 5
    assert report["values"]["random"]["wide / sum / 0"] == pytest.approx(np.mean(draws))
    assert rows["random"]["against_random"] is None and rows["random"]["runs"] == 5 * 16
    by_hand = [report["values"]["full"][start] - value for start, value in report["values"]["random"].items()]
    assert rows["full"]["against_random"]["mean"] == pytest.approx(np.mean(by_hand))
    assert rows["full"]["against_random"]["better"] == sum(value < 0 for value in by_hand)


def test_the_best_selection_is_supported_and_the_reversed_one_contradicted(finished):
    report = json.loads((finished / "report.json").read_text())
    assert [one["pooled"]["verdict"] for one in report["primary"]] == ["supported", "supported"]
    assert report["primary"][0]["pooled"]["level"] == pytest.approx(0.975)
    rows = {row["arm"]: row["against_random"] for row in report["pooled"]}
    assert rows["gradient_norm:reversed"]["verdict"] == "contradicted"
    text = (finished / "report.md").read_text()
    assert text.startswith("# analytic\n\n**There is a gap**")
    assert "- `gradient_norm` is better than `random`: **supported**, −" in text
    digest = json.loads((finished / "frozen.json").read_text())["sha256"]
    assert text.count(digest) == 2 and (finished / "plan.yaml").read_text().strip() in text
    # The highest rate of full weights is past 2 / c, so it diverges and is not chosen.
    assert "| full | 0.001 / – |" in text and "0.03 /" not in text


PUBLISHED = sorted(path.parent for path in (ROOT / "docs" / "evidence").glob("*/plan.yaml"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_published_report_follows_from_its_raw_results_bit_for_bit(folder, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for name in ("report.md", "report.json"):
        (again / name).unlink()
    assert run(again, capsys, "stage=report")[0] == 0
    for name in ("report.md", "report.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_rates_at_the_edge_of_the_grid_are_said_at_the_top(tmp_path, capsys):
    def top(name, rates):
        few = ["gradient_norm", "random", "lora", "lora_matched", "full"]
        plan = write_plan(tmp_path / f"{name}.yaml", arms=few, rates={"full": rates, "lora": rates})
        assert run(tmp_path / name, capsys, f"plan={plan}")[0] == 0
        return (tmp_path / name / "report.md").read_text().partition("\n## ")[0]

    # Five arms on two bases with two tasks each.
    edge = "**Rates at the edge**: 20 of 20 choices of learning rates are the lowest or the highest"
    assert edge in top("narrow", [1e-4, 1e-3])
    assert "Rates at the edge" not in top("given", [1e-3]), "nobody asked for a choice"


def test_an_arm_has_the_rates_that_the_plan_gives_it_alone(tmp_path, capsys):
    few = {"arms": ["gradient_norm", "random", "lora", "lora_matched", "full"], "tasks": ["sum"], "bases": ["narrow"]}
    rates = {"full": [1e-3], "lora": [1e-2], "of": {"lora_matched": {"lora": [1e-3]}, "random": {"full": [1e-4, 1e-3]}}}
    plan = write_plan(tmp_path / "plan.yaml", **few, rates=rates)
    assert run(tmp_path / "out", capsys, f"plan={plan}")[0] == 0
    frozen = json.loads((tmp_path / "out/frozen.json").read_text())["rates"]
    found = {name: (one["narrow/sum"]["lora"], one["narrow/sum"]["runs"]) for name, one in frozen.items()}
    assert found["gradient_norm"] == found["lora"] == (1e-2, 0) and found["lora_matched"] == (1e-3, 0)
    assert found["random"][0] == 1e-2 and found["random"][1] > 0, "of both the full rates that random has"

    for given, said in (
        ({"loar": {"lora": [1e-3]}}, "rates.of: 'loar' is none of the arms; did you mean 'lora'?"),
        ({"lora": {"lora": []}}, "rates.of.lora.lora: [] is not usable; give different rates above 0"),
        ({"lora": {"lora": [1e-2, 1e-3]}}, "rates.of.lora.lora: [0.01, 0.001] are in no order; give them from the"),
        (
            {"lora": [1e-3]},
            "rates.of.lora: [0.001] is not usable; give some of full, lora, zeroth, e.g. {lora: [2e-3]}",
        ),
        ({"lora": {"rate": [1e-3]}}, "rates.of.lora: {'rate': [0.001]} is not usable; give some of full, lora, zeroth"),
    ):
        plan = write_plan(tmp_path / "bad.yaml", **few, rates=rates | {"of": given})
        status, _, err = run(tmp_path / "bad", capsys, f"plan={plan}")
        assert status == 2 and said in err, err


def test_an_arm_with_one_pair_of_rates_takes_it_without_a_run(tmp_path, capsys):
    def study(name, **changes):
        few = ["gradient_norm", "random", "lora", "lora_matched", "full"]
        plan = write_plan(tmp_path / f"{name}.yaml", **{"arms": few, "tasks": ["sum"], "bases": ["narrow"]} | changes)
        status, out, err = run(tmp_path / name, capsys, f"plan={plan}")
        assert status == 0, err
        tuned = {(line["arm"], line["seed"]) for line in lines_of(tmp_path / name) if line["seed"] >= 100}
        chosen = {line["seed"] for line in lines_of(tmp_path / name, "choices.jsonl")}
        frozen = json.loads((tmp_path / name / "frozen.json").read_text())["rates"]
        return tuned, chosen, frozen, (tmp_path / name / "report.md").read_text(), out

    tuned, chosen, frozen, text, out = study("one", rates={"full": [1e-3], "lora": [1e-2]})
    assert not tuned and chosen == {0, 1, 2, 3}
    assert frozen["full"]["narrow/sum"] == {
        "full": 1e-3, "lora": 0.0, "value": None, "diverged": 0, "runs": 0, "edges": [],
    }  # fmt: skip
    assert "Not tuned, since the plan gives one pair of rates: `gradient_norm`, `random`," in text
    assert "tune: not gradient_norm, random, lora, lora_matched, full: the plan gives one pair of rates" in out

    tuned, chosen, frozen, text, _ = study("some", rates={"full": [1e-3], "lora": [1e-3, 1e-2]})
    assert {"gradient_norm", "random/0", "lora"} < {arm for arm, _ in tuned} and 100 in chosen
    assert "full" not in {arm for arm, _ in tuned}
    assert frozen["lora"]["narrow/sum"]["runs"] == 2 and "one pair of rates: `full`." in text

    # Steps that follow from the FLOPs of two arms need a run of each.
    arms = ["gradient_norm", "random", "lora", "lora_flops", "full"]
    primary = [{"arm": "gradient_norm", "against": ["random"]}]
    tuned, *_ = study("flops", rates={"full": [1e-3], "lora": [1e-2]}, arms=arms, primary=primary)
    assert {arm for arm, _ in tuned} == {"gradient_norm", "lora"}


def test_without_a_gap_the_report_opens_with_it_and_marks_the_verdicts(tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.yaml", settings={"lora_reaches": 1.0}, tasks=["sum"], bases=["narrow"])
    assert run(tmp_path / "out", capsys, f"plan={plan}")[0] == 0
    text = (tmp_path / "out/report.md").read_text()
    opening, verdict = text.splitlines()[2], next(line for line in text.splitlines() if line.startswith("- `"))
    assert opening.startswith("**There is no gap**") and "no selection of modules can be expected to help" in opening
    assert "°" in verdict and "### narrow / sum °" not in text


def test_runs_that_diverge_count_with_their_base_and_are_told(tmp_path, capsys):
    plan = write_plan(
        tmp_path / "plan.yaml", rates={"full": [3e-2, 6e-2], "lora": [1e-3]}, tasks=["sum"], bases=["narrow"],
        arms=["gradient_norm", "random", "lora", "full"], primary=[{"arm": "gradient_norm", "against": ["random"]}],
    )  # fmt: skip
    assert run(tmp_path / "out", capsys, f"plan={plan}")[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    (full,) = (row for row in report["pooled"] if row["arm"] == "full")
    assert full["diverged"] == full["runs"] == 4
    (start,) = (line for line in lines_of(tmp_path / "out") if line["arm"] == "full" and line["seed"] == 0)
    assert report["values"]["full"]["narrow / sum / 0"] == start["outcome"]["curve"][0][1]
    text = (tmp_path / "out/report.md").read_text()
    assert "Diverged: " in text and "full 4" in text and "(2 of 2 diverged)" in text


def test_several_budgets_are_compared_each_with_its_own_random(tmp_path, capsys):
    plan = write_plan(
        tmp_path / "plan.yaml", budgets=[0.1, 0.4], tasks=["sum"], bases=["narrow"],
        arms=["gradient_norm", "random", "lora", "lora_matched", "full"],
    )  # fmt: skip
    assert run(tmp_path / "out", capsys, f"plan={plan}")[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [(one["arm"], one["against"]) for one in report["primary"]] == [
        (f"gradient_norm@{budget}", f"{other}@{budget}")
        for budget in (0.1, 0.4)
        for other in ("random", "lora_matched")
    ]
    frozen = json.loads((tmp_path / "out/frozen.json").read_text())
    ranks = {name: by_base["narrow"]["rank"] for name, by_base in frozen["matched_ranks"].items()}
    assert 1 <= ranks["lora_matched@0.1"] < ranks["lora_matched@0.4"]


def test_an_arm_of_your_own_takes_its_options_and_the_place_of_another(tmp_path, capsys, protocol):
    hybrid = {"name": "hybrid", "rank": 4, "selection": {"criterion": "hybrid"}}
    plan = plan_of(PLAN | {"arms": [hybrid, "all"]})
    (arm,) = (one for one in planned_arms(plan, [protocol.candidates("narrow")]) if one.name == "hybrid")
    assert arm.rank == 4
    own = {"name": "short", "rank": 3, "selection": {"criterion": "hybrid", "probe.warmup_steps": 5}}
    plan = write_plan(
        tmp_path / "plan.yaml", arms=[own, {"name": "lora8", "kind": "lora", "rank": 8}, "random"], tasks=["sum"],
        bases=["narrow"], primary=[{"arm": "short", "against": ["lora8"]}],
    )  # fmt: skip
    assert run(tmp_path / "out", capsys, f"plan={plan}")[0] == 0
    lines = lines_of(tmp_path / "out")
    assert {line["rank"] for line in lines if line["arm"] == "short"} == {3}
    assert {line["rank"] for line in lines if line["arm"] == "lora8"} == {8}
    assert "Nobody looked for a gap" in (tmp_path / "out/report.md").read_text()


def test_a_value_that_is_no_number_ends_the_curve(tmp_path):
    from hybrid_lora_plugin.evidence.protocol import Choice, Run
    from hybrid_lora_plugin.evidence.results import RunResults

    run_, results = Run("lora", Start("b", "t", 0), Choice((), 2), 0.0, 1e-3, 4), RunResults(tmp_path)
    results.keep(run_, Outcome(((0, 1.0), (2, float("nan")), (4, 0.5)), {"x": float("inf")}, 10, 1.0))
    results.close()
    kept = RunResults(tmp_path).get(run_)
    assert (kept.curve, kept.diverged, kept.measures) == (((0, 1.0),), True, {"x": None})


def test_how_far_a_stage_is_how_fast_and_how_long_still_is_said(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("hybrid_lora_plugin.cli.evidence_progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    watch = LineWatch(stream)
    watch.stage("tuning rates, steps", 40_000)
    for seconds, parts in ((9, 900), (1, 100), (3990, 19_000), (10, 20_000)):
        now[0] += seconds
        watch.advance(parts)
    watch.stage("choosing at 2 starts", 2)
    now[0] += 90
    watch.advance(1)
    assert stream.getvalue().splitlines() == [
        "tuning rates, steps: 1,000 of 40,000, 100.0 a second, ETA 6:30",
        "tuning rates, steps: 20,000 of 40,000, 5.0 a second, ETA 1:06:40",
        "tuning rates, steps: 40,000 of 40,000, 10.0 a second, ETA 0:00",
        "choosing at 2 starts: 1 of 2, 90.0 s each, ETA 1:30",
    ]

    class Counts(Watch):
        stages, parts = {}, 0

        def stage(self, text, total):
            self.text, self.stages[text] = text, [total, 0]

        def advance(self, parts):
            self.stages[self.text][1] += parts

    # Of a protocol that does not say when it takes a step, and of one that does and keeps a run before that.
    for name, says in (("silent", False), ("says", True)):
        train = AnalyticProtocol.train

        def trains(self, runs, keep, train=train):
            def kept(run, outcome):
                self.stepped(run.steps // 2)
                keep(run, outcome)

            train(self, runs, kept)

        monkeypatch.setattr(AnalyticProtocol, "train", trains if says else train)
        counts = Counts()
        plan = write_plan(tmp_path / "plan.yaml", tasks=["sum"], bases=["narrow"])
        run_stages(EvidenceCommandConfig(plan=str(plan), output_dir=str(tmp_path / name)), counts)
        assert {text.split()[0] for text in counts.stages} == {"choosing", "tuning", "comparing"}
        assert all(total == done > 0 for total, done in counts.stages.values())
        counts.stages.clear()
        monkeypatch.undo()


def test_a_report_on_thousands_of_runs_takes_seconds(tmp_path):
    plan = write_plan(tmp_path / "plan.yaml", arms=["all"], seeds={"tune": [100, 101], "compare": list(range(8))})
    run_stages(EvidenceCommandConfig(plan=str(plan), output_dir=str(tmp_path / "out")))
    assert len(lines_of(tmp_path / "out")) > 3000
    begun = time.process_time()
    run_stages(EvidenceCommandConfig(output_dir=str(tmp_path / "out"), stage="report"))
    assert time.process_time() - begun < 20
