"""Comparing allocations: overlap and rank correlation against slow definitions, refusals, and the command."""

import dataclasses
import itertools
import re

import pytest
import torch

from hybrid_lora_plugin.allocation import AllocationError
from hybrid_lora_plugin.cli.compare import main
from hybrid_lora_plugin.config import AllocateCommandConfig, BudgetConfig
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.report.compare import Overlap, compare, make_labels, overlap, rank_agreement
from hybrid_lora_plugin.report.compare_tables import as_text, comparison_tables
from hybrid_lora_plugin.report.compare_verdict import tails, verdicts
from hybrid_lora_plugin.report.ranking import average_ranks, find_cut, spearman
from tests.support.allocations import decide_for, draw_measurements
from tests.support.drawn_allocations import (
    SIZES,
    drawn_scores,
    make,
    module_name,
    module_names,
    png_size,
    unprobed,
    write,
)
from tests.support.tiny_models import tiny_qwen2_config

NAMES = module_names(4)


def slow_ranks(values):
    """One plus the number below, plus half the number of others that are equal."""
    return [1 + sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]


def slow_spearman(first, second):
    a, b = slow_ranks(first), slow_ranks(second)
    mean = (len(a) + 1) / 2
    products = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    squares = [sum((x - mean) ** 2 for x in ranks) for ranks in (a, b)]
    return products / (squares[0] * squares[1]) ** 0.5


@pytest.mark.parametrize("levels", [2, 5, 1000], ids=["many ties", "some ties", "few ties"])
def test_spearman_is_pearson_of_average_ranks_with_ties(levels):
    generator = torch.Generator().manual_seed(levels)
    for _ in range(20):
        first, second = torch.randint(-levels, levels, (2, 17), generator=generator).tolist()
        assert average_ranks(first).tolist() == slow_ranks(first)
        assert spearman(first, second) == pytest.approx(slow_spearman(first, second), abs=1e-12)


def test_spearman_of_known_orders_and_where_it_is_not_defined():
    assert spearman([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 1e300]) == pytest.approx(1)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    # The classical formula 1 - 6 Σd² / (n (n² - 1)), for there are no ties.
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1.0, 2.0], [1.0, 2.0]) is None
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_overlap_counts_modules_and_parameters_as_sets_do():
    a = make(4, drawn_scores(4), full=[NAMES[0], NAMES[4], NAMES[8]])  # q, gate, k
    b = make(4, drawn_scores(4, 1), full=[NAMES[4], NAMES[8], NAMES[9], NAMES[20]])  # gate, k, v, down
    both, either = SIZES["gate_proj"] + SIZES["k_proj"], 400 + 1200 + 60 + 60 + 1200
    over = overlap(a, b)
    assert (over.shared, over.first, over.second, over.modules) == (2, 3, 4, 28)
    assert over.jaccard == 2 / 5 and over.of_smaller == 2 / 3
    assert over.shared_parameters == both
    assert over.jaccard_parameters == both / either and over.of_smaller_parameters == both / min(1660, 2520)
    assert overlap(a, b, frozenset([NAMES[1]])).jaccard is None


def test_the_chance_overlap_is_the_mean_over_all_random_choices():
    sizes = (2, 3)
    choices = [set(choice) for choice in itertools.combinations(range(7), sizes[1])]
    mean = sum(len(set(fixed) & choice) for fixed in [(0, 1)] for choice in choices) / len(choices)
    names = module_names(1)
    over = overlap(make(1, full=names[:2]), make(1, full=names[2:5]))
    assert over.chance == pytest.approx(mean) and over.shared == 0


def test_the_chance_within_types_keeps_each_number_per_type():
    one, two = ([module_name(layer, "o_proj") for layer in layers] for layers in ((0, 1), (0, 1, 2)))
    pair = compare([make(4, full=one), make(4, full=two + [module_name(0, "q_proj")])], ["a", "b"]).pairs[0, 1]
    # Two of four and three of four o_proj; no q_proj in the first.
    assert pair.chance_within_types == pytest.approx(2 * 3 / 4)
    assert pair.overlap.chance == pytest.approx(2 * 4 / 28)


def test_tails_are_counts_over_all_random_choices():
    parts = [Overlap(1, 2, 3, 0, 0, 0, modules=5), Overlap(2, 2, 2, 0, 0, 0, modules=4)]
    shared = [
        len({0, 1} & set(one)) + len({0, 1} & set(two))
        for one in itertools.combinations(range(5), 3)
        for two in itertools.combinations(range(4), 2)
    ]
    above, below = tails(parts)
    assert above == pytest.approx(sum(count >= 3 for count in shared) / len(shared))
    assert below == pytest.approx(sum(count <= 3 for count in shared) / len(shared))
    # Widths of a model of 80 layers: no number is too large.
    assert tails([Overlap(0, 56, 56, 0, 0, 0, modules=560)])[0] == pytest.approx(1)


LAYERS = 12
QUERIES, OUTPUTS = ([module_name(layer, type_) for layer in range(LAYERS)] for type_ in ("q_proj", "o_proj"))


@pytest.mark.parametrize(
    "first, second, said",
    [
        (QUERIES[:6], QUERIES[:6], "choose the same modules"),
        (QUERIES[:6] + OUTPUTS[:6], QUERIES[:6] + OUTPUTS[1:7], "agree"),
        (QUERIES[:4] + OUTPUTS[:4], QUERIES[:4] + OUTPUTS[2:6], "agree in part"),
        (QUERIES[:6], QUERIES[3:9], "prefer the same types of modules, and within them agree no more than chance"),
        (QUERIES[:3], OUTPUTS[:3], "agree no more than chance"),
        (module_names(LAYERS)[:40], module_names(LAYERS)[40:70], "avoid each other's modules"),
    ],
)
def test_a_pair_is_judged_against_chance_and_against_chance_within_types(first, second, said):
    comparison = compare([make(LAYERS, full=first), make(LAYERS, full=second)], ["one", "other"])
    (sentence,) = verdicts(comparison)
    assert f"({len(second)}) {said}: {len(set(first) & set(second))} in common, " in sentence
    turned = verdicts(compare([make(LAYERS, full=second), make(LAYERS, full=first)], ["one", "other"]))
    assert said in turned[0]


def test_rank_agreement_is_that_of_the_preference_whatever_the_direction():
    scores, labels = drawn_scores(4), ("a", "b")
    lowest, highest = make(4, scores), make(4, [-score for score in scores], direction="highest")
    assert rank_agreement(lowest, highest, labels).value == pytest.approx(1)
    assert rank_agreement(lowest, make(4, scores, direction="highest"), labels).value == pytest.approx(-1)


def test_rank_agreement_is_taken_over_modules_with_a_signal_in_both():
    one, two = drawn_scores(4), drawn_scores(4, 1)
    a, b = make(4, one, silent=(0, 5)), make(4, two, silent=(5, 7, 9))
    common = [i for i in range(28) if i not in (0, 5, 7, 9)]
    ranks = rank_agreement(a, b, ("a", "b"))
    assert ranks.modules == 24 and ranks.reason is None
    assert ranks.value == pytest.approx(slow_spearman([one[i] for i in common], [two[i] for i in common]))


def test_no_rank_agreement_comes_with_the_reason():
    scored, by_rule = make(4, drawn_scores(4)), unprobed("lora_ffn", NAMES[:4])
    ranks = rank_agreement(scored, by_rule, ("hybrid", "lora_ffn"))
    assert ranks.value is None and ranks.reason == "lora_ffn chooses without scores"
    flat = make(4, [2.0] * 28)
    assert rank_agreement(flat, scored, ("flat", "b")).reason == "flat gives all modules one score"
    apart = make(4, drawn_scores(4), silent=tuple(range(2, 28)))
    assert rank_agreement(apart, scored, ("a", "b")).reason == "a and b have a signal in 2 modules in common"
    level = make(4, [1.0] * 20 + [2.0] * 8, silent=tuple(range(21, 28)))
    half = make(4, drawn_scores(4), silent=tuple(range(20, 28)))
    assert "one score to all modules in common" in rank_agreement(level, half, ("a", "b")).reason


def test_spread_has_places_and_no_scores_to_correlate():
    config = tiny_qwen2_config(50)
    settings = AllocateCommandConfig(criterion="spread", budget=BudgetConfig(ratio=0.3))
    spread = decide_for(config, draw_measurements(14), settings)
    hybrid = decide_for(config, draw_measurements(14))
    assert spread.budget.mode == "parameters"
    assert rank_agreement(hybrid, spread, ("hybrid", "spread")).reason == "spread chooses without scores"


def test_groups_are_components_types_and_depth_thirds_and_count_once():
    a, b = make(4, full=NAMES[:7]), make(4, full=NAMES[7:21])
    comparison = compare([a, b, a], ["a", "b", "c"])
    assert list(comparison.groups) == [
        "attention", "mlp", "q", "k", "v", "o", "gate", "up", "down", "L0-0", "L1-1", "L2-3",
    ]  # fmt: skip
    assert set(comparison.pairs) == {(0, 1), (0, 2), (1, 2)}
    groups = comparison.pairs[0, 2].groups
    assert (groups["attention"].shared, groups["mlp"].shared, groups["q"].shared) == (4, 3, 1)
    assert groups["L0-0"].shared == 7 and groups["L2-3"].shared == 0
    assert comparison.full_in_all == frozenset()


def test_labels_tell_allocations_apart_by_normalisation_and_then_by_folder():
    plain, zscore = make(4, drawn_scores(4)), make(4, drawn_scores(4), selection={"normalise": "type_zscore"})
    paths = ["runs/one", "runs/two/allocation.json", "runs/three"]
    assert make_labels([plain, plain, zscore], paths) == ["hybrid (one)", "hybrid (two)", "hybrid, type_zscore"]


@pytest.mark.parametrize(
    "other, message",
    [
        (make(4, drawn_scores(4), config_sha256="b" * 64), "config_sha256 aaaaaaaaaaaa against bbbbbbbbbbbb"),
        (make(5, drawn_scores(5)), "28 modules against 35, model.layers.4.mlp.down_proj is in only one of them"),
        (
            dataclasses.replace(
                make(4, drawn_scores(4)),
                modules=[dataclasses.replace(m, parameters=7) for m in make(4, drawn_scores(4)).modules],
            ),
            "q_proj has 400 parameters against 7",
        ),
    ],
    ids=["fingerprint", "names", "sizes"],
)
def test_allocations_of_different_models_are_refused(other, message):
    with pytest.raises(AllocationError, match=message) as caught:
        compare([make(4, drawn_scores(4)), make(4, drawn_scores(4)), other], ["a", "b", "c"])
    assert "a is for 'models/drawn' and c for" in str(caught.value) and "give allocations of one model" in str(
        caught.value
    )


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_are_refused(count):
    with pytest.raises(AllocationError, match=f"^allocations: {count} given, 2 or more"):
        compare([make(4, drawn_scores(4))] * count, ["a"] * count)


@pytest.mark.parametrize("layers", [28, 80])
def test_six_allocations_fit_a_terminal_of_100_columns(layers):
    six = [make(layers, drawn_scores(layers, seed), count=layers) for seed in range(5)]
    six.append(unprobed("lora_ffn", [n for n in module_names(layers) if "self_attn" in n], layers))
    paths = [f"/a/long/path/to/the/runs/of/a/whole/team/with/many/people/run{k}" for k in range(6)]
    text = as_text(comparison_tables(compare(six, make_labels(six, paths)), paths))
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"/run{k}" in text for k in range(6))


@pytest.fixture
def three(tmp_path):
    """Folders of two scored allocations and one by rule."""
    full = [name for name in NAMES if "self_attn" in name]
    return [
        write(tmp_path / "one", make(4, drawn_scores(4), count=3)),
        write(tmp_path / "two", make(4, [-s for s in drawn_scores(4)], count=3, direction="highest")),
        write(tmp_path / "rule", unprobed("lora_ffn", full)),
    ]


def test_the_command_prints_overlap_beside_chance_and_the_rank_correlation(three, capsys):
    assert main([f"allocations=[{three[0]},{three[1]}/allocation.json,{three[2]}]"]) == 0
    out = capsys.readouterr().out
    # The same three modules in A and B: |A| |B| / M = 9 / 28; 16 attention modules in C.
    assert re.search(r"^A +3 +3 \(0\.3\) +\d \(1\.7\)$", out, re.M)
    assert re.search(r"^A +1\.00 +–$", out, re.M)
    assert re.search(r"^of +16 +12 +4 ", out, re.M) and re.search(r"^C +16 +0 +4 ", out, re.M)
    assert "lora_ffn chooses without scores" in out and "hybrid (one)" in out and "highest first" in out


def test_the_command_writes_the_same_tables_and_a_picture_and_nothing_else(three, tmp_path, capsys):
    allocations = f"allocations=[{','.join(map(str, three))}]"
    new = tmp_path / "deep" / "new"
    assert main([allocations, f"output_dir={new}"]) == 0
    assert sorted(file.name for file in new.iterdir()) == ["compare.md", "compare.png"]
    assert [file.name for file in new.parent.iterdir()] == ["new"]
    text = (new / "compare.md").read_text()
    assert "| A | 3 | 3 (0.3) |" in text and "| A |  | 1.00 | – |" in text and "(compare.png)" in text
    width, height = png_size(new / "compare.png")
    assert width > 500 and height > 300
    assert main([allocations, f"output_dir={tmp_path / 'again'}"]) == 0
    for file in new.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_folder_in_use_is_refused_before_anything_is_read(three, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("precious")
    assert main([f"allocations=[{three[0]},nowhere]", f"output_dir={tmp_path / 'used'}"]) == 2
    captured = capsys.readouterr()
    assert "not an empty folder" in captured.err and captured.out == ""
    assert [file.name for file in (tmp_path / "used").iterdir()] == ["thesis.txt"]


def test_a_failure_while_drawing_leaves_nothing_behind(three, tmp_path, monkeypatch):
    from hybrid_lora_plugin.report import compare_plot

    monkeypatch.setattr(compare_plot, "draw_comparison", lambda *arguments: 1 / 0)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        main([f"allocations=[{three[0]},{three[1]}]", f"output_dir={tmp_path / 'new'}"])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "allocations: not given"),
        (["allocations=[one]"], "allocations: 1 given"),
        (["allocations=[one,other]"], "config_sha256"),
        (["allocations=[one,nowhere]"], "'nowhere' cannot be read"),
        (["allocation=[one,two]"], "did you mean 'allocations'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(three, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "other", make(4, drawn_scores(4), config_sha256="b" * 64))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_artifacts_of_a_probe_are_compared(tmp_path, capsys):
    config = tiny_qwen2_config(50)
    folders = []
    for criterion in ("hybrid", "hybrid_additive", "random", "spread"):
        settings = AllocateCommandConfig(criterion=criterion, budget=BudgetConfig(ratio=0.3))
        measurements = draw_measurements(14)
        allocation = decide_for(config, measurements, settings)
        folders.append(save_allocation(tmp_path / criterion, allocation, measurements))
    assert main([f"allocations=[{','.join(map(str, folders))}]"]) == 0
    assert "spread chooses without scores" in capsys.readouterr().out


def test_the_cut_lies_after_the_last_full_module_and_counts_what_was_passed_over():
    scores = [float(k) for k in range(1, 29)]
    cut = find_cut(make(4, scores, full=[NAMES[0], NAMES[1], NAMES[3]]))
    assert (cut.last.name, cut.next.name, cut.place, cut.passed_over) == (NAMES[3], NAMES[4], 4, 1)
    # From 4 to 5; larger ratios are 1:2, 2:3 and 3:4.
    assert cut.relative and cut.gap == pytest.approx(0.25) and (cut.larger_gaps, cut.neighbours) == (3, 27)
    signed = find_cut(make(4, [score - 5 for score in scores], direction="highest", count=2))
    assert (signed.last.name, signed.next.name) == (NAMES[26], NAMES[25])
    assert not signed.relative and signed.gap == pytest.approx(1 / 27)
    assert find_cut(make(4, scores, count=28)) is None and find_cut(unprobed("explicit", NAMES[:2])) is None
