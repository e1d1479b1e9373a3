"""Calibration of a predicted distribution: probability integral transform, coverage, bins.

The probability integral transform (PIT) of an observed value is ``F(value)`` in ``[0, 1]``, with
``F`` the predicted distribution function. If the predictions are right, the PIT is uniform over
many of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gaussian_mixture_cdf(value: Tensor, mean: Tensor, std: Tensor, log_weights: Tensor) -> Tensor:
    """Compute the distribution function of each dim: ``sum_k w_k Phi((value - mean_k) / std_k)``.

    Shapes are those of :func:`~layeredrl_trl.functional.gaussian_mixture_log_prob`.

    Returns:
        ``[..., D]`` in ``[0, 1]``, the PIT of ``value`` dim by dim.

    Example:
        >>> mean, std = torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1)
        >>> gaussian_mixture_cdf(torch.zeros(1), mean, std, torch.tensor([0.25, 0.75]).log())
        tensor([0.2500])
    """
    below = torch.special.ndtr((value.unsqueeze(-2) - mean) / std)
    return (log_weights.exp().unsqueeze(-1) * below).sum(-2)


def sample_pit(value: Tensor, samples: Tensor, uniform: Tensor) -> Tensor:
    """Compute the PIT of a value from samples of its predicted distribution.

    ``(less + uniform * (1 + equal)) / (K + 1)`` with the number of samples that are less than and
    equal to the value. If the value is drawn like the samples, the result is exactly uniform for
    any ``K``, also for discrete values, which have ties.

    Args:
        value: ``[...]``.
        samples: ``[..., K]``.
        uniform: draws from ``[0, 1)``, ``[...]``, as is the result.

    Reference:
        Czado, Gneiting and Held 2009, Biometrics 65(4), section 2 (the randomised PIT).

    Example:
        >>> samples = torch.tensor([1.0, 2.0, 3.0])
        >>> sample_pit(torch.tensor(2.5), samples, torch.tensor(0.5))
        tensor(0.6250)
    """
    value = value.unsqueeze(-1)
    less, equal = (samples < value).sum(-1), (samples == value).sum(-1)
    return (less + uniform * (1 + equal)) / (samples.shape[-1] + 1)


def interval_coverage(pit: Tensor, levels: Sequence[float], mask: Tensor | None = None) -> Tensor:
    """Compute how often the central interval of each level held the observed value.

    The interval holds the value where ``|pit - 0.5| <= level / 2``.

    Args:
        pit: ``[N, ...]``.
        levels: levels of the ``L`` intervals, in ``[0, 1]``.
        mask: bool ``[N, ...]``; where it is False, ``pit`` does not count and may be NaN.

    Returns:
        Fractions over ``N``, ``[L, ...]``; NaN where nothing counts.

    Example:
        >>> interval_coverage(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), [0.5, 0.9])
        tensor([0.6000, 1.0000])
    """
    mask = torch.ones_like(pit, dtype=torch.bool) if mask is None else mask
    distance = (pit - 0.5).abs()
    inside = torch.stack([(distance <= level / 2) & mask for level in levels])
    return inside.sum(1).to(pit.dtype) / mask.sum(0)


def quantile_bin(x: Tensor, n_bins: int) -> Tensor:
    """Sort values ``[N]`` into bins whose sizes differ by at most one.

    Returns:
        Bin of each value, long ``[N]``, 0 for the smallest; some bins are empty if ``N < n_bins``.

    Example:
        >>> quantile_bin(torch.tensor([3.0, 1.0, 2.0, 9.0]), 2)
        tensor([1, 0, 0, 1])
    """
    rank = x.argsort(stable=True).argsort()
    return rank * n_bins // max(1, x.numel())


def bin_mean(x: Tensor, bins: Tensor, n_bins: int) -> Tensor:
    """Average values ``[N]`` by their bin, long ``[N]`` in ``0..n_bins - 1``.

    Returns:
        ``[n_bins]``; NaN for an empty bin.

    Example:
        >>> bin_mean(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1, 0, 0]), 3)
        tensor([1.5000, 3.0000,    nan])
    """
    total = x.new_zeros(n_bins).index_add(0, bins, x)
    return total / torch.bincount(bins, minlength=n_bins)
