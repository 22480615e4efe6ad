"""The Hybrid-Score against a slow reference, its invariances and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lora_plugin.config import CRITERIA
from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.scoring import (
    ScoringError,
    get_criterion,
    has_signal,
    hybrid_score,
    moments,
    register_criterion,
)


def reference(columns):
    """Eq. 14 and 15, one number at a time."""
    scores = []
    for column in columns:
        mean = math.fsum(column) / len(column)
        variance = math.fsum((value - mean) ** 2 for value in column) / len(column)
        scores.append(mean * math.sqrt(variance))
    return scores


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 2**31))
def test_hybrid_score_is_mean_times_population_std(batches, modules, seed):
    sensitivities = torch.rand(batches, modules, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    score = hybrid_score(sensitivities)
    assert score.dtype == torch.float64 and score.shape == (modules,)
    assert score.tolist() == pytest.approx(reference(sensitivities.T.tolist()), rel=1e-12)


def test_score_of_float32_sensitivities_is_computed_in_float64():
    sensitivities = torch.tensor([[1e-30, 1.0], [3e-30, 1.0 + 2**-20]], dtype=torch.float32)
    # In float32 the first score underflows to 0.
    assert hybrid_score(sensitivities).tolist() == pytest.approx(reference(sensitivities.double().T.tolist()), rel=1e-9)
    assert hybrid_score(sensitivities)[0] > 0


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_scaling_the_sensitivities_scales_the_score_by_the_square_and_keeps_the_order(factor, seed):
    sensitivities = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scaled = hybrid_score(factor * sensitivities)
    torch.testing.assert_close(scaled, factor**2 * hybrid_score(sensitivities), rtol=1e-9, atol=0)
    assert scaled.argsort().tolist() == hybrid_score(sensitivities).argsort().tolist()


def test_score_does_not_depend_on_the_order_of_batches():
    sensitivities = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hybrid_score(sensitivities), hybrid_score(sensitivities.flip(0)), rtol=1e-12, atol=0)


def test_a_silent_or_constant_module_scores_exactly_zero_and_has_no_signal():
    sensitivities = torch.tensor([[0.0, 0.1, 1.0], [0.0, 0.1, 2.0], [0.0, 0.1, 4.0]])
    scores = hybrid_score(sensitivities)
    assert has_signal(scores).tolist() == [False, False, True]
    assert moments(sensitivities)[1][1] == 0


@pytest.mark.parametrize(
    "sensitivities, message",
    [
        (torch.rand(1, 3), "1 validation batch.*2 or more"),
        (torch.ones(4, 3), "standard deviation 0"),
        (torch.zeros(4, 3), "all are 0.*no gradient"),
        (torch.tensor([[1.0, float("nan")], [2.0, 1.0]]), "NaN or infinity in 1 of 2 modules, first column 1"),
        (torch.tensor([[float("inf"), 1.0], [2.0, 1.0]]), "NaN or infinity in 1 of 2 modules, first column 0"),
        (torch.tensor([[-1.0], [1.0]]), "negative"),
        (torch.rand(3), "shape"),
        (torch.rand(3, 0), "shape"),
    ],
    ids=["one batch", "no spread", "all zero", "nan", "inf", "negative", "one dimension", "no module"],
)
def test_sensitivities_that_allow_no_ranking_are_refused_each_with_its_own_message(sensitivities, message):
    with pytest.raises(ScoringError, match=message):
        hybrid_score(sensitivities)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_of_the_configuration_is_registered_with_direction_run_and_source(name):
    criterion = get_criterion(name)
    assert criterion.name == name and criterion.source
    assert (criterion.method is None) == (criterion.needs == ())


def test_scores_of_what_full_tuning_would_gain_keep_the_highest():
    highest = {name for name in CRITERIA if get_criterion(name).direction == "highest"}
    assert highest == {"full_pruning", "gradient_norm", "snip", "lookahead", "trial"} | {
        "signal_to_noise", "sign_consistency", "residual_gradient"
    }  # fmt: skip


def test_each_criterion_names_the_probe_method_it_needs():
    runs = {name: get_criterion(name).method for name in CRITERIA}
    assert {run: sum(value == run for value in runs.values()) for run in runs.values()} == {
        "svd_lora": 9,
        "full_delta": 1,
        "adalora": 1,
        "autolora": 1,
        "lookahead": 1,
        "weight_gradient": 3,
        "features": 1,
        "trial": 1,
        None: 4,
    }
    assert (runs["full_pruning"], runs["adalora"], runs["autolora"]) == ("full_delta", "adalora", "autolora")


def test_an_unknown_criterion_is_refused_with_all_names():
    with pytest.raises(ConfigurationError, match="criterion: 'hybird' is unknown; choose one of ") as caught:
        get_criterion("hybird")
    assert all(name in str(caught.value) for name in CRITERIA)


def test_a_criterion_cannot_be_registered_twice_or_without_a_direction_or_method_there_is():
    with pytest.raises(ValueError, match="registered already"):
        register_criterion("trial", direction="lowest", source="test")
    with pytest.raises(ValueError, match="give 'lowest' or 'highest'"):
        register_criterion("other", direction="auto", source="test")
    with pytest.raises(ValueError, match="method 'gpu'; give None or one of svd_lora, full_delta"):
        register_criterion("other", direction="lowest", method="gpu", source="test")
    with pytest.raises(ConfigurationError, match="unknown"):
        get_criterion("other")
