"""Running moments of a data stream, for standardising inputs and scaling targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layeredrl_trl.acceleration import is_surely_none, peek
from layeredrl_trl.checks import check_count, check_finite
from layeredrl_trl.functional import FAR, ROUNDING, robust_moments

_ROWS_PER_FAULT = 32
"""At most one row in so many of a batch is a fault, or a single one."""

_ROWS_PER_EVENT = 400
"""More than one row in so many of the last batches is no fault."""

_MEMORY = 1000.0
"""Number of batches for which far rows are remembered."""

_LEAST_EVENTS = 10
"""At least so many far rows must be remembered before they are no faults."""


class RunningMoments(nn.Module):
    """Keep the running mean and variance of every dim of a stream of batches.

    The first ``1 / rate`` batches are averaged evenly, later ones exponentially with ``rate``: the
    moments are unbiased from the first batch on and still follow a drifting stream.

    A batch in which a number or its square is not finite changes nothing. A single number 100,000
    standard deviations from the mean is taken for a fault and replaced by the mean: it would hide
    what all others vary by. It counts if more than one row in 32 of the batch is as far, or more
    than one in 400 of the last thousand batches: then this is what the stream is like. In the first
    batch, median and median deviation tell what is far; a dim in which most values are the same has
    none.

    Args:
        dim: ``D``, number of dims.
        rate: minimum weight of a new batch, in (0, 1].

    Raises:
        TypeError: if ``dim`` is no integer or ``rate`` no number.
        ValueError: if a number is out of its range.

    Attributes:
        mean, var: running moments, ``[D]``.
        count: number of batches, a scalar.
        n_far: number of values as far as faults, left out or not, where they can be counted without
            cost: not on a GPU and not in compiled code.

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
        check_count("RunningMoments: dim", dim)
        check_finite("RunningMoments: rate", rate)
        if not 0 < rate <= 1:
            raise ValueError(f"RunningMoments: rate must be in (0, 1], got {rate}.")
        self.rate = rate
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.float32))
        self.n_far = 0
        self._has_started = False  # the host's copy of ``count > 0``, so as not to read the device
        # of the far rows of late: how many, and at which count; no state that is worth saving
        self._far_rows = torch.zeros(2, dim, dtype=torch.float32)
        self.register_load_state_dict_post_hook(_sync_has_started)

    @property
    def has_started(self) -> bool:
        """Whether a batch has been seen, as far as the host may look; else :attr:`count` tells."""
        self._has_started = peek(self.count, otherwise=float(self._has_started)) > 0
        return self._has_started

    @torch.no_grad()
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
        counts = None if mask is None else mask.reshape(-1)
        batch_mean, batch_var = self._faultless_moments(samples, counts)
        if samples.dtype is not mean.dtype:
            batch_var, batch_mean = batch_var.to(var.dtype), batch_mean.to(mean.dtype)
        # A mean whose square overflows would make every later variance infinite.
        shift = batch_mean - mean
        squares = torch.addcmul(batch_var, shift, shift).addcmul_(batch_mean, batch_mean)
        usable = squares.max() < torch.inf
        shift = torch.where(usable, shift, 0.0)
        batch_var = torch.where(usable, batch_var, var)
        rate = count.add_(usable).reciprocal().clamp(self.rate, 1.0)
        var.lerp_(torch.addcmul(batch_var, shift, shift * (1 - rate)), rate)
        mean.addcmul_(shift, rate)

    def std(self, *, floor: float | Tensor) -> Tensor:
        """Return the standard deviation ``[D]``, at least ``floor``."""
        std = self.var.sqrt()
        return std.clamp_min(floor) if isinstance(floor, float) else std.maximum(floor)

    def spread(self, *, unchanged: float | Tensor) -> Tensor:
        """Return the standard deviation ``[D]``, ``unchanged`` for dims that never changed.

        Changes by float32's rounding of the mean do not count.
        """
        std = self.var.sqrt()
        return torch.where(std > ROUNDING * self.mean.abs(), std, unchanged)

    def standardize(self, samples: Tensor) -> Tensor:
        """Shift and scale ``samples`` ``[..., D]`` to mean 0 and standard deviation 1."""
        return (samples - self.mean) / self.divisor()

    def divisor(self) -> Tensor:
        """Return the divisor of :meth:`standardize`, ``[D]``; 1 for a dim that never changed."""
        return self.spread(unchanged=1.0)

    def _faultless_moments(self, samples: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[D]`` of the rows of ``[N, D]`` that count, without faults."""
        mean, var = _moments(samples, counts)
        # A fault adds at least its squared distance to the sum of those of all samples.
        shift = mean - self.mean
        square = torch.addcmul(var, shift, shift) * (len(samples) / FAR**2)
        if self.has_started and is_surely_none(square > self.var):
            return mean, var
        centre, spread = self.mean, self.spread(unchanged=torch.inf)
        if not self.has_started:
            median, deviation = robust_moments(samples, counts)
            is_first = self.count == 0
            centre = torch.where(is_first, median, centre)
            spread = torch.where(is_first, deviation, spread)
        far = (samples - centre).abs() > FAR * spread
        n: int | Tensor = len(samples)
        if counts is not None:
            far, n = far & counts.unsqueeze(-1), counts.sum()
        n_far = far.sum(0)
        are_few = (n_far <= 1) | (_ROWS_PER_FAULT * n_far <= n)
        # a batch that is not usable stays so
        is_finite = torch.addcmul(var, mean, mean).isfinite()
        are_faults = far & are_few & is_finite & ~self._recur(torch.where(is_finite, n_far, 0), n)
        self.n_far += int(peek((far & is_finite).sum(), otherwise=0))
        return _moments(torch.where(are_faults, centre, samples), counts)

    def _recur(self, n_far: Tensor, n: int | Tensor) -> Tensor:
        """Remember the number of far rows ``[D]`` of ``n``; return where they are too many."""
        before, when = self._far_rows
        before.mul_(((when - self.count) / _MEMORY).exp()).add_(n_far)
        when.copy_(self.count.expand_as(when))
        seen = self.count.clamp_max(_MEMORY) * n
        return before > _LEAST_EVENTS + seen / _ROWS_PER_EVENT

    def _apply(self, fn: Any, recurse: bool = True) -> RunningMoments:
        self._far_rows = fn(self._far_rows)
        return super()._apply(fn, recurse)


def _sync_has_started(moments: RunningMoments, _: Any) -> None:
    moments._has_started = not moments.count.is_meta and bool(moments.count > 0)


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
