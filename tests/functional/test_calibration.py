"""The distribution function of a mixture, PIT of samples, coverage, bins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layeredrl_trl.functional import (
    bin_mean,
    gaussian_mixture_cdf,
    interval_coverage,
    quantile_bin,
    sample_pit,
)
from tests import oracles

LEVELS = (0.5, 0.8, 0.95)


def random_mixture(*batch, k=3, d=2):
    mean, std = 3 * torch.randn(*batch, k, d), torch.rand(*batch, k, d) + 0.1
    return mean, std, torch.randn(*batch, k).log_softmax(-1)


# --- contract


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shapes(batch):
    mean, std, log_weights = random_mixture(*batch)
    assert gaussian_mixture_cdf(torch.zeros(*batch, 2), mean, std, log_weights).shape == (*batch, 2)
    uniform = torch.rand(batch)
    assert sample_pit(torch.zeros(batch), torch.randn(*batch, 5), uniform).shape == batch
    assert interval_coverage(torch.rand(7, *batch), LEVELS).shape == (3, *batch)


# --- oracle


def test_mixture_cdf_against_erfc():
    mean, std, log_weights = random_mixture(20)
    value = 3 * torch.randn(20, 2)
    expected = [
        [
            oracles.gaussian_mixture_cdf(
                mean[n, :, d], std[n, :, d], log_weights[n].exp(), value[n, d]
            )
            for d in range(2)
        ]
        for n in range(20)
    ]
    actual = gaussian_mixture_cdf(value, mean, std, log_weights)
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_mixture_cdf_of_draws_is_uniform():
    n = 20_000
    mean, std, log_weights = (x.expand(n, *x.shape) for x in random_mixture())
    mode = torch.multinomial(log_weights[0].exp(), n, replacement=True)
    row = torch.arange(n)
    value = mean[row, mode] + std[row, mode] * torch.randn(n, 2)
    pit = gaussian_mixture_cdf(value, mean, std, log_weights)
    coverage = interval_coverage(pit, LEVELS)
    torch.testing.assert_close(
        coverage, torch.tensor(LEVELS)[:, None].expand(3, 2), atol=0.015, rtol=0
    )


@pytest.mark.parametrize("n_samples", [1, 2, 7])
@pytest.mark.parametrize("discrete", [False, True])
def test_sample_pit_of_one_more_draw_is_uniform(n_samples, discrete):
    draws = torch.randn(40_000, n_samples + 1)
    draws = draws.round() if discrete else draws
    pit = sample_pit(draws[:, 0], draws[:, 1:], torch.rand(len(draws)))
    torch.testing.assert_close(
        interval_coverage(pit, LEVELS), torch.tensor(LEVELS), atol=0.01, rtol=0
    )
    assert pit.min() >= 0 and pit.max() < 1


# --- property


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 20))
def test_what_is_masked_does_not_count(pit, n_masked):
    pit = torch.tensor(pit)
    padded = torch.cat([pit, torch.full((n_masked,), torch.nan)])
    mask = torch.arange(len(padded)) < len(pit)
    torch.testing.assert_close(
        interval_coverage(padded, LEVELS, mask), interval_coverage(pit, LEVELS)
    )


def test_coverage_of_nothing_is_nan():
    assert interval_coverage(torch.rand(3), LEVELS, torch.zeros(3).bool()).isnan().all()


@given(st.integers(1, 60), st.integers(1, 12))
def test_bins_hold_equally_many_in_order(n, n_bins):
    x = torch.randn(n)
    bins = quantile_bin(x, n_bins)
    counts = torch.bincount(bins, minlength=n_bins)
    assert counts.max() - counts.min() <= 1
    assert (bins[x.argsort()].diff() >= 0).all()


def test_bin_mean_against_a_loop():
    x, bins = torch.randn(30), torch.randint(0, 3, (30,))
    actual = bin_mean(x, bins, 4)
    expected = torch.tensor([x[bins == i].mean() for i in range(4)])
    torch.testing.assert_close(actual, expected, equal_nan=True)
    assert actual[3].isnan()
