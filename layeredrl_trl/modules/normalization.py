"""Running moments of a data stream, for standardising inputs and scaling targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Keep the running mean and variance of every dim of a stream of batches.

    The first ``1 / rate`` batches are averaged evenly, later ones exponentially with ``rate``: the
    moments are unbiased from the first batch on and still follow a drifting stream. A batch with a
    non-finite number changes nothing.

    Args:
        dim: ``D``, number of dims.
        rate: minimum weight of a new batch, in (0, 1].

    Example:
        >>> moments = RunningMoments(2)
        >>> moments.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> moments.mean, moments.var
        (tensor([1., 1.]), tensor([1., 0.]))
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, dim: int, *, rate: float = 1e-3) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"RunningMoments: rate must be in (0, 1], got {rate}.")
        self.rate = rate
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.zeros(()))

    def update(self, samples: Tensor, mask: Tensor | None = None) -> None:
        """Update the moments with a batch.

        Args:
            samples: ``[..., D]``.
            mask: bool ``[...]``, False on entries to ignore.

        Raises:
            ValueError: if a shape does not fit.
        """
        mean, var, count = self.mean, self.var, self.count
        batch = samples.shape[:-1]
        if samples.shape[-1:] != mean.shape:
            expected = [*batch, *mean.shape]
            raise ValueError(f"samples: expected shape {expected}, got {list(samples.shape)}.")
        if mask is not None and mask.shape != batch:
            raise ValueError(f"mask: expected shape {list(batch)}, got {list(mask.shape)}.")
        samples = samples.detach().reshape(-1, samples.shape[-1])
        if mask is None:
            batch_mean, batch_var = _moments(samples)
        else:
            counts = mask.reshape(-1)
            batch_mean, batch_var = _moments(samples, counts)
        if samples.dtype is not mean.dtype:
            batch_var, batch_mean = batch_var.to(var.dtype), batch_mean.to(mean.dtype)
        # the variance is finite only if the mean is
        usable = batch_var.max() < torch.inf
        batch_mean, batch_var = (
            torch.where(usable, x, now) for x, now in ((batch_mean, mean), (batch_var, var))
        )
        rate = count.add_(usable).reciprocal().clamp(self.rate, 1.0)
        shift = batch_mean - mean
        var.lerp_(torch.addcmul(batch_var, shift, shift * (1 - rate)), rate)
        mean.lerp_(batch_mean, rate)

    def std(self, *, floor: float) -> Tensor:
        """Return the standard deviation ``[D]``, at least ``floor``."""
        return self.var.sqrt().clamp_min(floor)

    def standardize(self, samples: Tensor) -> Tensor:
        """Shift and scale ``samples`` ``[..., D]`` to mean 0 and standard deviation 1."""
        return (samples - self.mean) / self.divisor()

    def divisor(self) -> Tensor:
        """Return the divisor of :meth:`standardize`, ``[D]``; 1 for a dim that never changed."""
        std = self.var.sqrt()
        return torch.where(std > 1e-4, std, 1.0)


def _moments(samples: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[D]`` of the rows of ``[N, D]`` that count; NaN if there are none.

    A constant dim has a variance of exactly 0, because one row is subtracted first.
    (``torch.var_mean`` ensures this too, in three times the time.)
    """
    if counts is None:
        origin = samples[0] if len(samples) else samples.mean(0)
        offset = samples - origin
        mean = offset.mean(0)
        return origin + mean, (offset - mean).square().mean(0)
    weight = counts.unsqueeze(-1).to(samples.dtype)
    n = weight.sum()
    first = counts.byte().argmax(0, keepdim=True) if len(samples) else counts.long()
    origin = samples.index_select(0, first).sum(0)
    offset = torch.where(counts.unsqueeze(-1), samples - origin, 0.0)
    mean = offset.sum(0) / n
    return origin + mean, ((offset - mean).square() * weight).sum(0) / n
