"""Explained variance, correlations, precision, recall and the area under the ROC curve."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata, spearmanr

from layeredrl_trl.functional import (
    correlation,
    event_scores,
    explained_variance,
    rank_correlation,
    varies,
)
from layeredrl_trl.functional.scores import average_rank
from tests import oracles

EVENTS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.6, 1.0]), st.booleans()),
    min_size=1,
    max_size=30,
)


# --- oracle


def test_correlations_against_scipy():
    x = torch.randn(50)
    y = (x + torch.randn(50)).round()  # with ties
    assert correlation(x, y).item() == pytest.approx(pearsonr(x, y).statistic, rel=1e-5)
    assert rank_correlation(x, y).item() == pytest.approx(spearmanr(x, y).statistic, rel=1e-6)
    assert average_rank(y).tolist() == (rankdata(y) - 1).tolist()


def test_explained_variance_against_the_definition():
    target, prediction = torch.randn(2, 50)
    expected = 1 - (target - prediction).var() / target.var()
    assert explained_variance(target, prediction).item() == pytest.approx(expected.item(), rel=1e-5)


@given(EVENTS)
def test_event_scores_against_counting(events):
    prob, happened = map(list, zip(*events, strict=True))
    hits = sum(p > 0.5 and y for p, y in events)
    n_predicted = sum(p > 0.5 for p in prob)
    expected = (
        hits / n_predicted if n_predicted else math.nan,
        hits / sum(happened) if any(happened) else math.nan,
        oracles.area_under_roc(prob, happened),
    )
    actual = event_scores(torch.tensor(prob), torch.tensor(happened))
    assert [x.item() for x in actual] == pytest.approx(expected, nan_ok=True)


# --- property


def test_perfect_and_constant_predictions():
    target = torch.randn(50)
    assert explained_variance(target, target + 3).item() == pytest.approx(1.0)
    assert explained_variance(target, torch.full((50,), 7.0)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("constant", [0.0, 1.0, -0.1, 1e6])
def test_what_does_not_vary_is_nan_not_an_infinity(constant):
    x, y = torch.full((50,), constant), torch.randn(50)
    assert not varies(x) and varies(y)
    assert explained_variance(x, y).isnan()
    for score in (correlation, rank_correlation):
        assert score(x, y).isnan() and score(y, x).isnan()


def test_small_variation_of_a_large_number_varies():
    assert varies(1000 + torch.tensor([0.0, 0.1, 0.2]))


def test_nothing_to_score_is_nan():
    nothing = torch.zeros(0)
    assert not varies(nothing)
    assert explained_variance(nothing, nothing).isnan() and correlation(nothing, nothing).isnan()


def test_scores_of_nan_are_nan():
    prob, happened = torch.tensor([0.9, torch.nan, 0.1]), torch.tensor([True, False, False])
    assert all(x.isnan() for x in event_scores(prob, happened))
    assert rank_correlation(prob, torch.arange(3.0)).isnan()
