"""Centre and spread of samples of which a few may be faults."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 1e5
"""Distance from the centre, in units of the spread, at which a number is taken for a fault."""

ROUNDING = torch.finfo(torch.float32).eps
"""Spread, relative to the centre, of numbers that differ by rounding only."""

_MAD = 1.4826
"""Standard deviation of a Gaussian, relative to its median absolute deviation."""


def robust_moments(samples: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the median, and the spread by the median distance from it.

    For Gaussian samples the spread is the standard deviation. It is infinite, that is unknown, for
    a dim in which more than half of the samples are the same.

    Args:
        samples: ``[N, D]``; NaN does not count.
        mask: bool ``[N]``; samples where it is False do not count.

    Returns:
        Centre and spread, each ``[D]``; NaN and infinite if no sample counts.

    Example:
        >>> robust_moments(torch.tensor([[0.0], [1.0], [2.0], [3.0], [1e9]]))
        (tensor([2.]), tensor([1.4826]))
    """
    if mask is not None:
        samples = torch.where(mask.unsqueeze(-1), samples, torch.nan)
    if len(samples) == 0:
        nothing = samples.new_full(samples.shape[1:], torch.nan)
        return nothing, torch.full_like(nothing, torch.inf)
    centre = samples.nanmedian(0).values
    spread = _MAD * (samples - centre).abs().nanmedian(0).values
    return centre, torch.where(spread > ROUNDING * centre.abs(), spread, torch.inf)
