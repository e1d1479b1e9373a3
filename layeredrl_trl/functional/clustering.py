"""Clusters of a batch of samples, at which the modes of a mixture start."""

from __future__ import annotations

import torch
from torch import Tensor


def spread_modes(
    samples: Tensor, n_modes: int, mask: Tensor | None = None, *, n_steps: int = 3
) -> tuple[Tensor, Tensor]:
    r"""Spread the modes of a mixture over a batch: farthest-first traversal, then k-means.

    The first mode starts at the sample farthest from the mean, each further one at the sample
    farthest from the modes before, so well separated clusters get a mode each. Each step of k-means
    moves a mode to the mean of the samples nearest to it and of ``N / (16 M)`` pseudo-samples that
    have the moments of the whole batch. So a mode that only stands for a few outliers returns to
    the middle. Nothing is random, and nothing waits for a GPU.

    Args:
        samples: ``[N, D]``.
        n_modes: ``M``, at least 1.
        mask: bool ``[N]``; samples where it is False do not count and may hold anything.
        n_steps: number of k-means steps, at least 1.

    Returns:
        Mean and standard deviation of the modes, each ``[M, D]``; all 0 if no sample counts.

    Raises:
        ValueError: if a number is out of its range or the shape of ``mask`` does not fit.

    Reference:
        Gonzalez 1985, Clustering to minimize the maximum intercluster distance. Deviation: steps
        of k-means with a prior follow.

    Example:
        >>> samples = torch.tensor([[-1.0], [-1.2], [0.1], [0.0], [3.0], [3.2]])
        >>> mean, std = spread_modes(samples, 3)
        >>> mean.mT
        tensor([[ 3.0,  -1.0,  0.1]])
    """
    if n_modes < 1 or n_steps < 1:
        raise ValueError(
            f"spread_modes: n_modes and n_steps must be at least 1, got {n_modes} and {n_steps}."
        )
    if mask is not None and mask.shape != samples.shape[:1]:
        raise ValueError(f"mask: expected shape {[len(samples)]}, got {list(mask.shape)}.")
    counts = samples.new_ones(len(samples)) if mask is None else mask.to(samples.dtype)
    counts = counts.unsqueeze(-1)
    samples = torch.where(counts > 0, samples, 0.0)
    total = counts.sum().clamp_min(1)
    middle = samples.sum(0) / total
    samples = torch.where(counts > 0, samples - middle, 0.0)
    variance = samples.square().sum(0) / total
    prior = total / (16 * n_modes)
    mean = _farthest_first(samples, n_modes)
    std = variance.sqrt().expand_as(mean)
    for _ in range(n_steps):
        nearest = (samples[:, None] - mean).square().sum(-1).argmin(-1)
        belongs = torch.nn.functional.one_hot(nearest, n_modes).to(samples.dtype) * counts
        n = belongs.sum(0).unsqueeze(-1) + prior
        mean = belongs.mT @ samples / n
        square = (belongs.mT @ samples.square() + prior * variance) / n
        std = (square - mean.square()).clamp_min(0).sqrt()
    return middle + mean, std


def _farthest_first(samples: Tensor, n: int) -> Tensor:
    """Pick ``n`` of the centred samples ``[N, D]``, each the farthest from those picked before."""
    picked = [samples[samples.square().sum(-1).argmax()]]
    distance = (samples - picked[0]).square().sum(-1)
    for _ in range(n - 1):
        picked.append(samples[distance.argmax()])
        distance = distance.minimum((samples - picked[-1]).square().sum(-1))
    return torch.stack(picked)
