"""Particles by the probability that they are alive: what a dead one would do counts for nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_if_dead(alive: Tensor, x: Tensor) -> Tensor:
    """Set to 0 what is not finite in ``x`` where ``alive`` is exactly 0.

    A sum of ``alive * x`` needs this, because 0 times infinity is NaN. Both broadcast to one shape.
    Finite entries stay as they are, and so does everything of a particle that may be alive.

    Example:
        >>> alive, x = torch.tensor([0.0, 0.0, 0.1]), torch.tensor([3.0, torch.inf, torch.inf])
        >>> zero_if_dead(alive, x)
        tensor([3., 0., inf])
    """
    return torch.where((alive == 0) & ~x.isfinite(), 0.0, x)


def survival(alive: Tensor, term_prob: Tensor) -> Tensor:
    """Compute ``alive_t = alive_{t-1} (1 - term_prob_t)`` for ``H`` steps.

    A particle that is dead (``alive`` exactly 0) stays dead, whatever its ``term_prob`` is.

    Args:
        alive: before the first step, ``[N, ...]``.
        term_prob: of each step, ``[N, H, ...]``.

    Returns:
        Probability to be alive after each step, ``[N, H, ...]``.

    Example:
        >>> survival(torch.tensor([1.0]), torch.tensor([[0.5, 1.0, torch.nan]]))
        tensor([[0.5000, 0.0000, 0.0000]])
    """
    alive = alive.unsqueeze(1)
    goes_on = 1 - term_prob
    before = torch.cat([alive, goes_on[:, :-1]], 1).detach().cumprod(1)
    was_dead = (before == 0).cumsum(1) > 0  # behind a NaN the product is NaN, but not before it
    return alive * torch.where(was_dead & ~goes_on.isfinite(), 1.0, goes_on).cumprod(1)
