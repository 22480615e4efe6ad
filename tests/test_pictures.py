"""The pictures and the report of an artifact, for every kind of score and budget."""

import re

import numpy as np
import pytest
import torch

from hybrid_lora_plugin.config import AllocateCommandConfig, BudgetConfig
from hybrid_lora_plugin.report.artifact import save_allocation
from hybrid_lora_plugin.report.compare import compare
from hybrid_lora_plugin.report.compare_plot import draw_comparison
from hybrid_lora_plugin.report.heatmap import _colouring, draw_heatmap
from hybrid_lora_plugin.report.page import write_report
from hybrid_lora_plugin.report.score_plot import draw_scores
from tests.support.allocations import decide_for, draw_measurements
from tests.support.drawn_allocations import drawn_scores, make, module_names, png_size, unprobed
from tests.support.tiny_models import tiny_qwen2_config


def z_scores(layers):
    """Scores of both signs."""
    return torch.randn(7 * layers, generator=torch.Generator().manual_seed(2)).tolist()


def attention(layers=4):
    return [name for name in module_names(layers) if "self_attn" in name]


def pixels(file):
    """``[height, width, 3]``, 0 to 255."""
    from matplotlib.image import imread

    return (imread(file)[:, :, :3] * 255).round().astype(int)


def red_pixels(file):
    """Pixels in the colour that marks full fine-tuning in the heat map."""
    return int((np.abs(pixels(file) - [255, 43, 43]).sum(axis=2) < 6).sum())


KINDS = {
    "positive": lambda layers: make(layers, drawn_scores(layers), count=layers // 2),
    "both signs": lambda layers: make(layers, z_scores(layers), count=layers // 2, direction="highest"),
    "by rule": lambda layers: unprobed("lora_ffn", attention(layers), layers),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [28, 80])
def test_the_heat_map_has_cells_of_one_size_and_the_same_bytes_again(tmp_path, kind, layers):
    allocation = KINDS[kind](layers)
    for name in ("one.png", "two.png"):
        draw_heatmap(allocation, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert b"Software" not in (tmp_path / "one.png").read_bytes()
    width, height = png_size(tmp_path / "one.png")
    assert layers * 30 <= width <= layers * 30 + 300 and 300 < height < 600


def test_every_full_module_is_marked_in_the_heat_map(tmp_path):
    counts = []
    for count in (1, 2, 4):
        draw_heatmap(make(28, drawn_scores(28), count=count), tmp_path / "one.png")
        counts.append(red_pixels(tmp_path / "one.png"))
    legend = counts[0] - (counts[1] - counts[0])
    mark = counts[1] - counts[0]
    assert mark > 100 and counts[2] == pytest.approx(legend + 4 * mark, rel=0.1)


def test_the_colour_scale_follows_the_signs_of_the_scores():
    values, label, colours = _colouring([0.01, 1.0, 100.0])
    assert values == pytest.approx([-2, 0, 2]) and label == "log10 score" and "vmin" not in colours
    values, label, colours = _colouring([-1.0, 0.0, 3.0])
    assert values == [-1, 0, 3] and label == "score"
    # White is the middle of the scale, so 0 must be.
    assert colours["vmin"] == -colours["vmax"] == -3
    assert _colouring([0.0, 1.0])[1] == "score"


def test_a_choice_by_rule_has_no_colour_bar_and_no_score_plot(tmp_path):
    allocation = unprobed("lora_ffn", attention(28), 28)
    draw_heatmap(allocation, tmp_path / "rule.png")
    draw_heatmap(make(28, drawn_scores(28), full=attention(28)), tmp_path / "scored.png")
    # The bar lies right of the cells; without it only white, the cells' grey, lines and marks are left.
    colourful = [(np.ptp(pixels(tmp_path / name)[:, 1040:], axis=2) > 40) for name in ("rule.png", "scored.png")]
    reds = [
        np.abs(pixels(tmp_path / name)[:, 1040:] - [255, 43, 43]).sum(axis=2) < 250
        for name in ("rule.png", "scored.png")
    ]
    assert (colourful[0] & ~reds[0]).sum() == 0 < (colourful[1] & ~reds[1]).sum()
    draw_scores(allocation, tmp_path / "scores.png")
    assert not (tmp_path / "scores.png").exists()


SCORES = {
    "positive": lambda layers: make(layers, drawn_scores(layers, spread=2.0), count=5, silent=(3,)),
    "both signs": lambda layers: make(layers, z_scores(layers), count=5),
    "a few dwarf the rest": lambda layers: make(layers, [z**5 for z in z_scores(layers)], count=5),
    "zero with signal": lambda layers: make(layers, [0.0, *drawn_scores(layers)[1:]], count=5, stds=[0.1] * 7 * layers),
    "all full": lambda layers: make(layers, drawn_scores(layers), count=7 * layers),
}


@pytest.mark.parametrize("kind, layers", [*((kind, 28) for kind in SCORES), ("positive", 80)])
def test_the_score_plot_is_drawn_for_any_sign_with_the_same_bytes_again(tmp_path, kind, layers):
    for name in ("one.png", "two.png"):
        draw_scores(SCORES[kind](layers), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert b"Software" not in (tmp_path / "one.png").read_bytes()
    assert png_size(tmp_path / "one.png") == (1320, 552)


def test_the_score_plot_leaves_out_the_moments_where_nothing_was_repeated(tmp_path):
    draw_scores(make(28, drawn_scores(28), stds=[0.0] * 196), tmp_path / "one.png")
    assert png_size(tmp_path / "one.png") == (840, 552)


@pytest.mark.parametrize("layers, count", [(28, 2), (28, 6), (80, 3)])
def test_the_comparison_grows_with_depth_and_number_with_the_same_bytes_again(tmp_path, layers, count):
    several = [make(layers, drawn_scores(layers, seed), count=layers) for seed in range(count - 1)]
    several.append(unprobed("lora_ffn", attention(layers), layers))
    comparison = compare(several, [f"allocation {k}" for k in range(count)])
    for name in ("one.png", "two.png"):
        draw_comparison(comparison, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert b"Software" not in (tmp_path / "one.png").read_bytes()
    width, height = png_size(tmp_path / "one.png")
    cell = 0.155 * 120
    assert width > layers * cell + 200 and height > count * 7 * cell


def test_what_is_full_in_all_has_its_own_colour_in_the_comparison(tmp_path):
    names = module_names(28)
    shown = {}
    for shared in (5, 10):
        first, second = make(28, full=names[:30]), make(28, full=names[30 - shared : 60])
        draw_comparison(compare([first, second], ["a", "b"]), tmp_path / "one.png")
        shown[shared] = (np.abs(pixels(tmp_path / "one.png") - [0xE0, 0x56, 0x0B]).sum(axis=2) < 6).sum()
    # Five more cells in each of two strips, each of 18.6 pixels square less the white lines between cells.
    assert 14**2 < (shown[10] - shown[5]) / 10 < 18.6**2


def report_of(tmp_path, allocation):
    write_report(allocation, tmp_path / "report.md")
    return (tmp_path / "report.md").read_text()


def test_the_report_of_mode_parameters_counts_parameters(tmp_path):
    allocation = make(4, drawn_scores(4), full=module_names(4)[:2])
    text = report_of(tmp_path, allocation)
    total = allocation.model.candidate_parameters
    assert f"| limit | {total // 2:,} | 50.000 % |" in text
    assert f"| used | 460 | {100 * 460 / total:.3f} % |" in text


def test_the_report_of_mode_modules_counts_modules_and_adds_their_parameters(tmp_path):
    text = report_of(tmp_path, make(4, drawn_scores(4), full=module_names(4)[:2], mode="modules"))
    assert "| | modules | of the candidates |" in text
    assert "| limit | 14 | 50.000 % |" in text and "| used | 2 | 7.143 % |" in text
    assert "The fully fine-tuned modules hold 460 parameters" in text


def test_the_report_of_mode_total_trainable_counts_lora_too(tmp_path):
    allocation = make(4, drawn_scores(4), full=module_names(4)[:2], mode="total_trainable")
    text = report_of(tmp_path, allocation)
    # 26 adapters of rank 16 on modules of one input and one output.
    used, limit = 460 + 26 * 32, allocation.budget.limit
    assert "| | trainable parameters | of the limit |" in text
    assert f"| used | {used:,} | {100 * used / limit:.3f} % |" in text and "hold 460 parameters" in text


def test_the_report_of_a_choice_by_rule_states_neither_probe_nor_score_nor_limit(tmp_path):
    allocation = unprobed("lora_ffn", attention())
    text = report_of(tmp_path, allocation)
    for absent in ("What was probed", "warm-up", "validation", "seed", "limit |", "scores.png", "unproven", "std"):
        assert absent not in text, absent
    for wanted in ("How it was chosen", "lora_ffn, by rule, without scores", "no budget limits them", "heatmap.png"):
        assert wanted in text, wanted
    assert "There is no score" in text and "What this choice is" in text
    assert all(f"`{name}`" in text for name in attention()) and "No signal" not in text


def test_the_report_of_random_claims_nothing_about_its_numbers(tmp_path):
    allocation = make(4, drawn_scores(4), name="random", selection={"options": {"seed": 7}}, probed=False)
    text = report_of(tmp_path, allocation)
    assert "| option seed | 7 |" in text and "The scores are random numbers" in text and "A control" in text
    assert "How far to trust it" not in text and "What was probed" not in text


def test_the_report_says_how_the_score_separates(tmp_path):
    scores = [float(k) for k in range(1, 29)]
    text = report_of(tmp_path, make(4, scores, count=4))
    # numpy.quantile of 1 … 28 at 0, 0.1, 0.5, 0.9 and 1.
    quantiles = np.quantile(scores, [0, 0.1, 0.5, 0.9, 1])
    assert f"| 28 modules | {' | '.join(f'{value:.4g}' for value in quantiles)} |" in text
    names = module_names(4)
    assert f"between 4 (`{names[3]}`, the last that is full) and 5 (`{names[4]}`)" in text
    assert "The gap is 25 % of the smaller; of the 27 pairs of neighbours in the order, 3 have a larger ratio" in text
    # The mean of a drawn allocation is the root of the score, so the order is the same.
    assert "over 28 modules: 1.000; the spread over the batches hardly changes the order" in text
    assert "Spearman" not in report_of(tmp_path, make(4, scores, stds=[0.0] * 28))


def test_the_report_says_when_the_score_did_not_decide(tmp_path):
    tied = [1.0, 1.0, *range(2, 28)]
    assert "The two have the same score" in report_of(tmp_path, make(4, tied, count=1))
    assert "The two have the same score" not in report_of(tmp_path, make(4, tied, count=2))


def test_the_report_names_what_overflow_skip_passed_over(tmp_path):
    names = module_names(4)
    scores = [float(k) for k in range(1, 29)]
    allocation = make(4, scores, full=[names[0], names[2]], budget={"overflow": "skip"})
    assert "1 module before the cut is not fully fine-tuned, because more would not have fitted" in report_of(
        tmp_path, allocation
    )


def test_the_report_of_signed_scores_uses_differences(tmp_path):
    text = report_of(tmp_path, make(4, z_scores(4), selection={"normalise": "type_zscore"}))
    assert "of the range of all scores" in text and "have a larger difference" in text
    assert "normalise type_zscore" in text


@pytest.mark.parametrize(
    "name, direction, normalise, wanted, absent",
    [
        ("hybrid", "lowest", "none", "worse than choosing modules at random", "control"),
        ("hybrid", "highest", "none", "changed with the learning rate", "choosing the lowest scores"),
        ("hybrid", "lowest", "type_zscore", "did better than the raw score", "control"),
        ("hybrid_cv", "lowest", "none", "says nothing about the variant", "control"),
        ("gradient_norm", "highest", "none", "choosing by gradient norm failed", "Hybrid-Score"),
        ("full_pruning", "highest", "none", "our reading", "control"),
        ("adalora", "lowest", "none", "ranks of adapters", "Hybrid-Score"),
    ],
)
def test_the_report_says_of_each_criterion_only_what_holds_for_it(tmp_path, name, direction, normalise, wanted, absent):
    allocation = make(4, drawn_scores(4), name=name, direction=direction, selection={"normalise": normalise})
    trust = report_of(tmp_path, allocation).split("## How far to trust it")[1]
    assert wanted in trust and absent not in trust


def test_nested_options_are_listed_and_long_lists_counted(tmp_path):
    probe = {"options": {"adalora": {"beta": 0.85, "target_rank": 16}}, "partitions_per_batch": 4}
    allocation = make(4, drawn_scores(4), probe=probe, selection={"options": {"modules": list("abcd")}})
    text = report_of(tmp_path, allocation)
    assert "| option adalora.beta | 0.85 |" in text and "| option modules | 4 entries, see allocation.json |" in text
    assert "4 random partitions" in text and "one random partition each" not in text


@pytest.mark.parametrize("criterion", ["hybrid", "alpha", "lora_drop", "snip", "random", "spread", "lora_ffn"])
def test_every_artifact_links_the_pictures_it_has(tmp_path, criterion):
    settings = AllocateCommandConfig(criterion=criterion, budget=BudgetConfig(ratio=0.3))
    measurements = draw_measurements(14)
    allocation = decide_for(tiny_qwen2_config(50), measurements, settings)
    folder = save_allocation(tmp_path / "artifact", allocation, measurements)
    linked = set(re.findall(r"\]\((\w+\.png)\)", (folder / "report.md").read_text()))
    assert linked == {file.name for file in folder.glob("*.png")} and "heatmap.png" in linked
    assert ("scores.png" in linked) == (criterion not in ("spread", "lora_ffn"))
