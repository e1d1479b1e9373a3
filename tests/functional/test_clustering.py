"""spread_modes: clusters are found, a loop over samples, masks, outliers, errors."""

import pytest
import torch

from layeredrl_trl.functional import spread_modes


def clusters(centres, n=40, noise=0.05):
    return (centres[:, None] + noise * torch.randn(len(centres), n, centres.shape[1])).flatten(0, 1)


def spread_oracle(samples, n_modes, n_steps):
    """The same with lists."""
    rows = samples.double()
    middle = rows.mean(0)
    picked = [max(rows, key=lambda x: float((x - middle).norm()))]
    while len(picked) < n_modes:
        picked.append(max(rows, key=lambda x: min(float((x - p).norm()) for p in picked)))
    prior, variance = len(rows) / (16 * n_modes), rows.var(0, correction=0)
    std = []
    for _ in range(n_steps):
        near = [min(range(n_modes), key=lambda m: float((x - picked[m]).norm())) for x in rows]
        following, std = [], []
        for m in range(n_modes):
            own = [x - middle for x, k in zip(rows, near, strict=True) if k == m]
            n = len(own) + prior
            mean = sum(own, torch.zeros(rows.shape[1])) / n
            square = (sum((x**2 for x in own), torch.zeros(rows.shape[1])) + prior * variance) / n
            following.append(middle + mean)
            std.append((square - mean**2).sqrt())
        picked = following
    return torch.stack(picked), torch.stack(std)


@pytest.mark.parametrize("n_modes", [1, 2, 5])
@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_like_a_loop_over_samples(n_modes, dims, n_steps):
    samples = 7 + torch.randn(30, dims)
    found = spread_modes(samples, n_modes, n_steps=n_steps)
    for x, y in zip(found, spread_oracle(samples, n_modes, n_steps), strict=True):
        assert x.shape == (n_modes, dims)
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def test_one_mode_is_the_mean():
    samples = torch.randn(50, 2)
    mean, _ = spread_modes(samples, 1)
    torch.testing.assert_close(mean[0], samples.mean(0))


@pytest.mark.parametrize("dims", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_separate_clusters_get_a_mode_each(dims, seed):
    torch.manual_seed(seed)
    centres = 3 * torch.randperm(4 * dims).reshape(4, dims).float()
    mean, std = spread_modes(clusters(centres)[torch.randperm(160)], 4)
    nearest = torch.cdist(centres, mean).min(-1)
    assert nearest.indices.unique().numel() == 4
    scale = clusters(centres).std(0)
    assert (nearest.values < 0.2 * scale.norm()).all()
    assert (std < scale).all()


def test_an_outlier_gets_no_mode_of_its_own():
    samples = torch.cat([torch.randn(255, 2), torch.tensor([[100.0, 100.0]])])
    mean, _ = spread_modes(samples, 4)
    assert mean.norm(dim=-1).max() < 30


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_masked_samples_change_nothing(garbage):
    samples, mask = torch.randn(20, 2), torch.rand(20) < 0.5
    expected = spread_modes(samples[mask], 3)
    samples[~mask] = garbage
    for x, y in zip(spread_modes(samples, 3, mask), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_nothing_but_padding_gives_0():
    for x in spread_modes(torch.full((4, 2), float("nan")), 3, torch.zeros(4).bool()):
        assert torch.equal(x, torch.zeros(3, 2))


def test_fewer_samples_than_modes_stay_finite():
    assert all(torch.isfinite(x).all() for x in spread_modes(torch.randn(2, 3), 5))


@pytest.mark.parametrize(
    ("n_modes", "mask", "options", "message"),
    [
        (0, None, {}, "n_modes and n_steps must be at least 1, got 0 and 3"),
        (2, None, {"n_steps": 0}, "n_modes and n_steps must be at least 1, got 2 and 0"),
        (2, torch.ones(1).bool(), {}, r"mask: expected shape \[5\], got \[1\]"),
    ],
)
def test_errors(n_modes, mask, options, message):
    with pytest.raises(ValueError, match=message):
        spread_modes(torch.zeros(5, 2), n_modes, mask, **options)
