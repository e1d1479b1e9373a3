"""Weights of candidates: plain loops, sums, returns that are huge, equal, or not finite."""

import math

import pytest
import torch

from layeredrl_trl.functional import (
    draw_by_weight,
    elite_weights,
    return_spread,
    softmax_weights,
    weighted_moments,
)

INF = math.inf
HARD_RETURNS = [
    [1.0, 2.0, 3.0, -1.0],
    [1e30, -1e30, 9e29, 0.0],
    [3e38, -3e38, 0.0, 1.0],
    [-1e-30, 1e-30, 0.0, 2e-30],
    [5.0, 5.0, 5.0, 5.0],
    [-INF, 2.0, -INF, 1.0],
    [-INF, -INF, -INF, 7.0],
    [0.0, 0.0, 0.0, 0.0],
]


def column(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).unsqueeze(-1)


# ---- contract


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_shapes(lead):
    returns, samples = torch.randn(*lead, 7, 1), torch.randn(*lead, 7, 4, 2)
    index, weights = elite_weights(returns, 3)
    assert index.shape == weights.shape == (*lead, 3, 1)
    weights = softmax_weights(returns, 1.0)
    assert weights.shape == (*lead, 7, 1)
    assert return_spread(returns).shape == (*lead, 1)
    assert [x.shape for x in weighted_moments(samples, weights)] == [(*lead, 4, 2)] * 2


# ---- oracle


@pytest.mark.parametrize("returns", HARD_RETURNS)
def test_elites_are_the_best_finite_ones(returns):
    index, weights = elite_weights(column(returns), 3)
    best = sorted((r for r in returns if r > -INF), reverse=True)[:3]
    assert [column(returns)[i].item() for i in index.flatten()][: len(best)] == pytest.approx(best)
    assert weights.flatten().tolist() == pytest.approx(
        [1 / len(best)] * len(best) + [0.0] * (3 - len(best))
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1e6])
@pytest.mark.parametrize("returns", HARD_RETURNS)
def test_softmax_agrees_with_a_plain_loop(returns, temperature, normalize):
    finite = [r for r in returns if r > -INF]
    mean = math.fsum(finite) / len(finite)
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in finite) / len(finite))
    unit = (spread or 1.0) if normalize else 1.0
    terms = [math.exp((r - max(finite)) / unit / temperature) for r in returns]
    expected = [term / math.fsum(terms) for term in terms]
    weights = softmax_weights(column(returns), temperature, normalize=normalize)
    if max(map(abs, finite)) > 1e38 and normalize:
        assert weights.isfinite().all()  # a difference that float32 cannot hold
    else:
        assert weights.flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert weights.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("returns", HARD_RETURNS)
def test_spread_agrees_with_a_plain_loop(returns):
    finite = [r for r in returns if r > -INF]
    mean = math.fsum(finite) / len(finite)
    expected = math.sqrt(math.fsum((r - mean) ** 2 for r in finite) / len(finite))
    assert return_spread(column(returns)).item() == pytest.approx(expected, rel=1e-5, abs=1e-36)


def test_moments_agree_with_a_plain_loop():
    samples, weights = torch.randn(5, 4, 2), torch.rand(5, 1)
    weights = weights / weights.sum()
    mean, std = weighted_moments(samples, weights)
    for h in range(4):
        for a in range(2):
            values = [(w.item(), x.item()) for w, x in zip(weights, samples[:, h, a], strict=True)]
            expected = sum(w * x for w, x in values)
            spread = math.sqrt(sum(w * (x - expected) ** 2 for w, x in values))
            assert mean[h, a].item() == pytest.approx(expected, abs=1e-6)
            assert std[h, a].item() == pytest.approx(spread, abs=1e-6)


# ---- property


@pytest.mark.parametrize("bad", [-INF, math.nan, INF])
def test_where_nothing_is_finite_nothing_counts(bad):
    returns = torch.full((2, 3, 1), bad)
    returns[1, 0] = 1.0
    weights = softmax_weights(returns, 0.5, normalize=True)
    assert weights[0].abs().sum() == 0
    assert weights[1].flatten().tolist() == [1.0, 0.0, 0.0]
    assert return_spread(returns).flatten().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e20])
def test_normalized_weights_do_not_depend_on_the_scale(scale):
    returns = torch.randn(3, 8, 1)
    torch.testing.assert_close(
        softmax_weights(returns * scale, 0.3, normalize=True),
        softmax_weights(returns, 0.3, normalize=True),
    )


def test_at_infinite_temperature_an_infinite_gap_counts_alike():
    returns = torch.tensor([[3e38], [-3e38], [0.0], [-torch.inf]])
    weights = softmax_weights(returns, math.inf).flatten()
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_draws_are_as_frequent_as_their_weights(dim):
    torch.manual_seed(0)
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0])
    shape = [20_000, 20_000]
    shape[dim] = 4
    weights = weights.unsqueeze(1 - dim % 2).expand(shape)
    index = draw_by_weight(weights, dim)
    assert index.shape[dim] == 1
    found = index.flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(found, torch.tensor([0.0, 0.125, 0.25, 0.625]), atol=0.01, rtol=0)
