"""How much each candidate of a search counts, by its return, and the moments that follow.

A return of ``-inf`` or NaN counts for nothing; where all are like that, all weights are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def elite_weights(returns: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the candidates with the highest returns, which count alike.

    Args:
        returns: ``[..., N, 1]``, no NaN.
        top_k: elites ``K``, at most ``N``.

    Returns:
        index ``[..., K, 1]``, best first, and weights ``[..., K, 1]``, which sum to 1 or are all 0.

    Example:
        >>> index, weights = elite_weights(torch.tensor([[1.0], [3.0], [-torch.inf], [2.0]]), 2)
        >>> index.flatten(), weights.flatten()
        (tensor([1, 3]), tensor([0.5000, 0.5000]))
    """
    elite_returns, index = returns.topk(top_k, dim=-2)
    finite = (elite_returns > -torch.inf).to(returns.dtype)
    return index, finite / finite.sum(-2, keepdim=True).clamp_min(1)


def softmax_weights(returns: Tensor, temperature: float, *, normalize: bool = False) -> Tensor:
    r"""Weigh candidates by ``exp(R / temperature)``, for returns of any size.

    Args:
        returns: ``R``, ``[..., N, 1]``.
        temperature: above 0; in units of the return or, if normalized, of its spread.
        normalize: divide by :func:`return_spread` first, so that the scale of the reward does not
            matter.

    Returns:
        ``[..., N, 1]``, which sum to 1 or are all 0.

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
    gap = torch.nan_to_num(gap / temperature, nan=0.0)  # nan: an infinite gap at no temperature
    weights = torch.where(finite, gap, -torch.inf).softmax(-2)
    return torch.where(any_finite, weights, 0.0)


def return_spread(returns: Tensor) -> Tensor:
    """Compute the standard deviation (divided by N) of the returns that are finite.

    Args:
        returns: ``[..., N, 1]``, of any size: nothing is squared that could overflow.

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
    """Compute mean and standard deviation of weighted candidates.

    Args:
        samples: ``[..., N, H, A]``.
        weights: ``[..., N, 1]``, sum 1.

    Returns:
        mean and standard deviation ``[..., H, A]``.

    Example:
        >>> mean, std = weighted_moments(torch.tensor([[[0.0]], [[2.0]]]), torch.full((2, 1), 0.5))
        >>> mean.item(), std.item()
        (1.0, 1.0)
    """
    weights = weights.unsqueeze(-1).to(samples.dtype)
    mean = (weights * samples).sum(-3)
    return mean, (weights * (samples - mean.unsqueeze(-3)).square()).sum(-3).sqrt()


def draw_by_weight(weights: Tensor, dim: int) -> Tensor:
    """Draw an index along ``dim`` by weight; follows torch's global generator.

    The largest of ``w / Exp(1)`` is such a draw; ``torch.multinomial`` would wait for the GPU.

    Args:
        weights: at least 0, of any sum.
        dim: of ``weights``.

    Returns:
        long, of the shape of ``weights`` but for a ``dim`` of size 1.

    Example:
        >>> draw_by_weight(torch.tensor([[0.0, 2.0, 0.0]]), -1)
        tensor([[1]])
    """
    noise = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device).exponential_()
    return (weights / noise).argmax(dim, keepdim=True)
