"""The parts of a trial that need no model: rounds, cost, portfolio, verdict, words and what is refused."""

import dataclasses
import json
import math

import pytest
import torch

from hybrid_lora_plugin.allocation.schema import LossDifference, TrialCandidate, TrialRecord
from hybrid_lora_plugin.allocation.trial_words import trial_in_words, trial_markdown, trial_table
from hybrid_lora_plugin.config import AdapterConfig, BudgetConfig, ProbeCommandConfig
from hybrid_lora_plugin.config_validation import validate
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.probing.trial.options import check_trial, settled
from hybrid_lora_plugin.probing.trial.portfolio import contenders_of, entries_of, matched_lora, probes_of
from hybrid_lora_plugin.probing.trial.schedule import cost_of, rounds_of
from hybrid_lora_plugin.probing.trial.verdict import alike, loss_difference, mean_loss, ranked
from tests.test_criteria import CANDIDATES, draw


def configured(**trial):
    config = ProbeCommandConfig(criterion="trial", budget=BudgetConfig(ratio=0.3, overflow="skip"))
    config.lora = AdapterConfig(rank=1, alpha=2)
    config.trial = dataclasses.replace(config.trial, full_lr=1e-3, lora_lr=5e-3, **trial)
    return config


# -- rounds and cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "candidates, rounds, keep, wanted",
    [
        (6, 3, 0.5, [(25, 6), (50, 3), (100, 2)]),
        (3, 3, 0.5, [(25, 3), (50, 2), (100, 2)]),
        (9, 2, 1 / 3, [(25, 9), (75, 3)]),
        (5, 2, 0.9, [(25, 5), (28, 4)]),
        (4, 1, 0.5, [(25, 4)]),
        (1, 3, 0.5, []),
    ],
)
def test_rounds_drop_candidates_as_the_steps_grow_and_the_last_one_compares_two(candidates, rounds, keep, wanted):
    found = rounds_of(candidates, 25, rounds, keep)
    assert [(one.steps, one.candidates) for one in found] == wanted


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("continues", [True, False])
def test_the_cost_is_what_a_walk_through_the_rounds_counts(control, continues):
    rounds, steps, looks = rounds_of(6, 25, 3, 0.5), 0, 1
    taken: dict[str, int] = {}
    left = [f"candidate {number}" for number in range(6)]
    for number, one in enumerate(rounds):
        left = left[: one.candidates]
        for name in [*left, *(["lora"] if control else [])]:
            steps += one.steps - (taken.get(name, 0) if continues else 0)
            taken[name] = one.steps
            looks += 1
        assert len(left) == rounds[number].candidates
    cost = cost_of(rounds, control, continues)
    assert (cost.steps, cost.evaluations, cost.loads) == (steps, looks, looks - 1)
    assert cost.kept == ((3 + 1 + control) if continues else 1)


# -- portfolio --------------------------------------------------------------------------------------------------------


def test_criteria_that_measure_alike_share_a_probe():
    portfolio = [
        "hybrid",
        "lookahead",
        "hybrid:reversed",
        "sign_consistency",
        "residual_gradient",
        "snip",
        "spread:q_proj",
    ]
    config = configured(portfolio=portfolio, draws=1)
    entries = entries_of(config)
    assert [entry.name for entry in entries] == [*portfolio, "random:0"]
    probes = {leader: {entry.name for entry in served} for leader, served in probes_of(entries)}
    assert probes == {
        "lookahead": {"hybrid", "lookahead", "hybrid:reversed", "snip"},
        "residual_gradient": {"sign_consistency", "residual_gradient"},
    }
    config = configured(portfolio=["hybrid", "lookahead", "perturbation"])
    probes = {leader: {entry.name for entry in served} for leader, served in probes_of(entries_of(config))}
    assert probes == {"perturbation": {"hybrid", "perturbation"}, "lookahead": {"lookahead"}}


def test_candidates_are_what_each_criterion_alone_would_choose_and_equal_ones_share_a_run():
    from hybrid_lora_plugin.allocation import allocate

    config = configured(portfolio=["gradient_norm", "gradient_norm:reversed", "spread:o_proj@all", "spread:o_proj"])
    tensors = draw()
    entries = entries_of(config)
    found = {one.name: one for one in contenders_of(entries, CANDIDATES, lambda entry: tensors)}
    means = tensors["gradient_norm"].mean(dim=0)
    for name, direction in (("gradient_norm", "highest"), ("gradient_norm:reversed", "lowest")):
        wanted = allocate(CANDIDATES, means, config.budget, direction).full_names
        assert list(found[name].modules) == wanted
    assert found["spread:o_proj@all"].also == ("spread:o_proj",) and "spread:o_proj" not in found
    assert len({found[f"random:{n}"].modules for n in range(2)}) == 2
    other = configured(portfolio=["gradient_norm"])
    other.probe.seed = 1
    drawn = contenders_of(entries_of(other), CANDIDATES, lambda entry: tensors)
    assert {one.modules for one in drawn}.isdisjoint({found[f"random:{n}"].modules for n in range(2)})
    lora = matched_lora(list(found.values()), CANDIDATES)
    mean = sum(one.trainable_parameters(CANDIDATES) for one in found.values()) / len(found)
    each = sum(one.in_features + one.out_features for one in CANDIDATES)
    assert lora.trainable_parameters(CANDIDATES) == lora.rank * each <= mean < (lora.rank + 1) * each


def test_an_entry_that_cannot_choose_is_named():
    config = configured(portfolio=["hybrid", "spread:z_proj"])
    with pytest.raises(ConfigurationError, match="trial.portfolio: spread:z_proj: control.type: no candidate"):
        contenders_of(entries_of(config), CANDIDATES, lambda entry: draw())


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "no rates": (dict(full_lr=None, lora_lr=None), "trial.full_lr: nothing given, .*give trial.full_lr"),
    "an unknown criterion": (dict(portfolio=["hybird"]), "trial.portfolio: 'hybird' is no candidate"),
    "one that names": (dict(portfolio=["lora_ffn"]), "trial.portfolio: 'lora_ffn' is no candidate"),
    "itself": (dict(portfolio=["trial"]), "trial.portfolio: 'trial' is no candidate"),
    "random": (dict(portfolio=["random"]), "give trial.draws=2"),
    "spread reversed": (dict(portfolio=["spread:o_proj:reversed"]), "is no candidate"),
    "nothing to compare": (dict(portfolio=["hybrid"], draws=0), "leaves nothing to compare"),
    "twice": (dict(portfolio=["hybrid", "hybrid"]), "trial.portfolio: .* not usable; give criteria such as"),
    "words": (dict(portfolio=["the best"]), "trial.portfolio: .* not usable"),
    "no rows": (dict(held_out_rows=0), "trial.held_out_rows: 0 is not usable; give at least 8 rows"),
    "no steps": (dict(steps=0), "trial.steps: 0 is not usable"),
    "keep all": (dict(keep=1.0), "trial.keep: 1.0 is not usable"),
    "one beta": (dict(betas=[0.9]), "trial.betas: .* not usable"),
    "no rate": (dict(full_lr=0.0), "trial.full_lr: 0.0 is not usable"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_name(case):
    options, said = REFUSED[case]
    config = configured()
    for name, value in options.items():
        setattr(config.trial, name, value)
    with pytest.raises(ConfigurationError, match=said) as caught:
        validate(config)
        check_trial(config)
    assert "\n" not in str(caught.value)


def test_what_a_probe_may_find_itself_and_what_scores_alone_have_is_refused():
    for part, name, value, said in (
        ("probe", "partitions", "auto", "probe.partitions: 'auto' is not possible"),
        ("probe", "warmup_steps", "auto", "probe.warmup_steps: 'auto' is not possible"),
        ("probe", "seeds", [0, 1], "probe.seeds: .* is not possible"),
        ("", "normalise", "sqrt_dims", "normalise: 'sqrt_dims' has no meaning"),
        ("", "direction", "lowest", "direction: 'lowest' has no effect .*:reversed"),
    ):
        config = configured()
        setattr(config.probe if part else config, name, value)
        with pytest.raises(ConfigurationError, match=said):
            check_trial(config)


def test_one_rate_gives_the_other_by_the_papers_ratio_and_nulls_are_verls():
    config = configured()
    config.trial.lora_lr = None
    found = settled(config)
    assert (found.full_lr, found.lora_lr) == (1e-3, 2.5e-2) and found.scale == 2
    assert (found.weight_decay, found.betas, found.clip_grad, found.batch_size) == (0.01, (0.9, 0.999), 1.0, 8)


# -- verdict ----------------------------------------------------------------------------------------------------------


def slow_interval(first, second, tokens, draws=4000):
    """Row by row, by another generator."""
    generator, found = torch.Generator().manual_seed(7), []
    for _ in range(draws):
        rows = torch.randint(len(tokens), (len(tokens),), generator=generator).tolist()
        found.append(sum(first[i] - second[i] for i in rows) / sum(tokens[i] for i in rows))
    found.sort()
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


def test_a_difference_is_of_tokens_and_its_interval_that_of_a_plain_bootstrap():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 9, (40,), generator=generator).tolist()
    second = (torch.rand(40, generator=generator).double() * 3 * torch.tensor(tokens)).tolist()
    noise = (0.4 * torch.randn(40, generator=generator).double() * torch.tensor(tokens)).tolist()
    first = [a + b for a, b in zip(second, noise, strict=True)]
    found = loss_difference(first, second, tokens)
    assert found.mean == pytest.approx(math.fsum(noise) / sum(tokens), abs=1e-12)
    assert found.mean == pytest.approx(mean_loss(first, tokens) - mean_loss(second, tokens), abs=1e-12)
    low, high = slow_interval(first, second, tokens)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert loss_difference(first, second, tokens) == found


def test_candidates_that_rows_cannot_tell_from_the_best_are_alike_in_the_order_they_were_named():
    tokens = [1] * 50
    base = [1.0] * 50
    wobble = [1.0 + (0.3 if n % 2 else -0.301) for n in range(50)]
    worse = [2.0] * 50
    losses = {"first": base, "second": worse, "third": wobble, "fourth": []}
    assert ranked(losses, tokens) == ["third", "first", "second", "fourth"]
    assert alike(losses, tokens) == ["first", "third"]
    assert alike({"second": worse, "third": wobble}, tokens) == ["third"]


# -- words ------------------------------------------------------------------------------------------------------------


def record(alike_names, against):
    return TrialRecord(
        rounds=[25, 50],
        start=2.0,
        rows=64,
        tokens=500,
        batch_size=8,
        steps=300,
        candidates=[
            TrialCandidate("hybrid", ["alpha"], ["a"], 4, 100, [1.5, 1.2], difference=LossDifference(0.01, -0.1, 0.1)),
            TrialCandidate("lookahead", [], ["b"], 4, 120, [1.4, 1.19]),
            TrialCandidate("random:0", [], ["c"], 4, 110, [], dropped=1, diverged=7),
        ],
        chosen=alike_names[0],
        alike=alike_names,
        lora=TrialCandidate("lora", [], [], 7, 115, [1.6, 1.3]),
        against_lora=against,
    )


def test_the_verdict_is_no_stronger_than_the_interval():
    same = trial_in_words(record(["hybrid", "lookahead"], LossDifference(-0.1, -0.2, 0.01)))
    assert "not distinguished" in same[0] and "hybrid is used, the first of them" in same[0]
    assert "lookahead has the lowest loss" in same[0]
    assert "is not distinguished from LoRA of the same size (rank 7)" in same[1] and "no gain is seen" in same[1]
    clear = trial_in_words(record(["lookahead"], LossDifference(-0.1, -0.2, -0.01)))
    assert clear[0].startswith("trial: the lowest held-out loss after 50 steps is that of lookahead, 1.1900")
    assert "is better than LoRA" in clear[1] and "no gain" not in clear[1]
    worse = trial_in_words(record(["lookahead"], LossDifference(0.1, 0.05, 0.2)))
    assert "is worse than LoRA" in worse[1]
    assert all("held-out rows alone" in lines[2] for lines in (same, clear, worse))


def test_the_table_has_every_round_who_was_dropped_and_who_diverged():
    found = record(["lookahead"], LossDifference(-0.1, -0.2, -0.01))
    table = trial_table(found)
    assert len(table) == 5 and "hybrid = alpha" in table[1] and table[2].endswith("chosen")
    assert "diverged" in table[3] and table[3].endswith("round 1") and table[4].endswith("control")
    markdown = trial_markdown(found)
    assert len(markdown) == 6 and len({line.count("|") for line in markdown}) == 1
    assert json.dumps(dataclasses.asdict(found))
