"""Weights of a planner's candidates by their returns, and moments of weighted candidates.

A candidate with a return of ``-inf`` or NaN gets the weight 0. If no candidate of a search has a
finite return, all weights are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def elite_weights(returns: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the ``K = top_k`` of ``N`` candidates with the highest returns; they weigh the same.

    Returns are ``[..., N, 1]``, without NaN, and ``K`` is at most ``N``.

    Returns:
        Index ``[..., K, 1]``, best first, and weights ``[..., K, 1]``, which sum to 1 or are all 0.

    Example:
        >>> index, weights = elite_weights(torch.tensor([[1.0], [3.0], [-torch.inf], [2.0]]), 2)
        >>> index.flatten(), weights.flatten()
        (tensor([1, 3]), tensor([0.5000, 0.5000]))
    """
    elite_returns, index = returns.topk(top_k, dim=-2)
    finite = (elite_returns > -torch.inf).to(returns.dtype)
    return index, finite / finite.sum(-2, keepdim=True).clamp_min(1)


def softmax_weights(returns: Tensor, temperature: float, *, normalize: bool = False) -> Tensor:
    r"""Weigh candidates by ``exp(R / temperature)``, for returns of any magnitude.

    Args:
        returns: ``R``, ``[..., N, 1]``.
        temperature: above 0; in units of the return or, with ``normalize``, of its spread.
        normalize: divide by :func:`return_spread` first, so that the scale of the reward does not
            matter.

    Returns:
        Weights ``[..., N, 1]``, which sum to 1 or are all 0.

    Example:
        >>> softmax_weights(torch.tensor([[1e30], [1e30], [-1e30]]), 0.1).flatten()
        tensor([0.5000, 0.5000, 0.0000])
    """
    finite = returns.isfinite()
    top = torch.where(finite, returns, -torch.inf).amax(-2, keepdim=True)
    any_finite = top > -torch.inf
    gap = returns - torch.where(any_finite, top, 0.0)
    if normalize:
        spread = return_spread(returns).unsqueeze(-2)
        gap = gap / spread.clamp_min(torch.finfo(returns.dtype).tiny)
    gap = torch.nan_to_num(gap / temperature, nan=0.0)  # inf / inf is NaN
    weights = torch.where(finite, gap, -torch.inf).softmax(-2)
    return torch.where(any_finite, weights, 0.0)


def return_spread(returns: Tensor) -> Tensor:
    """Compute the standard deviation (without Bessel's correction) of the finite returns.

    Returns ``[..., N, 1]`` may have any magnitude: they are scaled so that no square overflows.

    Returns:
        ``[..., 1]``; 0 where no return is finite.

    Example:
        >>> return_spread(torch.tensor([[-3e30], [3e30], [-torch.inf]])).item()
        3e+30
    """
    finite = returns.isfinite()
    count = finite.sum(-2, keepdim=True).clamp_min(1)
    known = torch.where(finite, returns, 0.0)
    scale = known.abs().amax(-2, keepdim=True).clamp_min(torch.finfo(returns.dtype).tiny)
    known = known / scale
    deviation = torch.where(finite, known - known.sum(-2, keepdim=True) / count, 0.0)
    return ((deviation.square().sum(-2, keepdim=True) / count).sqrt() * scale).squeeze(-2)


def weighted_moments(samples: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the moments of candidates ``[..., N, H, A]`` whose weights ``[..., N, 1]`` sum to 1.

    Returns:
        Mean and standard deviation, each ``[..., H, A]``.

    Example:
        >>> mean, std = weighted_moments(torch.tensor([[[0.0]], [[2.0]]]), torch.full((2, 1), 0.5))
        >>> mean.item(), std.item()
        (1.0, 1.0)
    """
    weights = weights.unsqueeze(-1).to(samples.dtype)
    mean = (weights * samples).sum(-3)
    return mean, (weights * (samples - mean.unsqueeze(-3)).square()).sum(-3).sqrt()


def draw_by_weight(weights: Tensor, dim: int) -> Tensor:
    """Draw an index along ``dim`` with probabilities proportional to ``weights``, none below 0.

    The draw is the index of the largest ``w / x`` with ``x`` from ``Exp(1)``;
    ``torch.multinomial`` would wait for the GPU. Follows torch's global generator.

    Returns:
        Index, long, shaped like ``weights`` with a ``dim`` of size 1.

    Example:
        >>> draw_by_weight(torch.tensor([[0.0, 2.0, 0.0]]), -1)
        tensor([[1]])
    """
    noise = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device).exponential_()
    return (weights / noise).argmax(dim, keepdim=True)
