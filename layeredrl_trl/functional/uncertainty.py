"""Uncertainty of an ensemble: what it does not know (epistemic) and noise (aleatoric)."""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_trl.functional.mixtures import gaussian_mixture_mean, gaussian_mixture_variance


def epistemic_variance(mean: Tensor, weights: Tensor) -> Tensor:
    """Compute the variance, over members, of the member means.

    The members are the whole population (no Bessel correction), so one member gives 0.

    Args:
        mean: mode means, ``[..., E, M, D]``.
        weights: mode weights, ``[..., E, M]``.

    Returns:
        ``[..., D]``, in squared units of the latent.

    Reference:
        Chua et al. 2018, arXiv:1805.12114; the variance between members in the law of total
        variance.
    """
    return gaussian_mixture_mean(mean, weights).var(-2, correction=0)


def aleatoric_variance(mean: Tensor, std: Tensor, weights: Tensor) -> Tensor:
    """Compute the mean, over members, of the variance of each member's mixture.

    Args:
        mean: mode means, ``[..., E, M, D]``.
        std: mode standard deviations, ``[..., E, M, D]``.
        weights: mode weights, ``[..., E, M]``.

    Returns:
        ``[..., D]``, in squared units of the latent. Its sum with :func:`epistemic_variance` is
        the variance of the even mixture of all members.
    """
    return gaussian_mixture_variance(mean, std, weights).mean(-2)


def disagreement(epistemic_var: Tensor) -> Tensor:
    """Compute how much the members disagree, ``sqrt(mean_d epistemic_var_d)``.

    Its gradient at 0 is 0, not infinite.

    Args:
        epistemic_var: ``[..., D]``, see :func:`epistemic_variance`.

    Returns:
        ``[..., 1]``, in units of the latent.

    Example:
        >>> disagreement(torch.tensor([[0.0, 0.0], [32.0, 0.0]]))
        tensor([[0.],
                [4.]])
    """
    mean = epistemic_var.mean(-1, keepdim=True)
    is_zero = mean == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, mean).sqrt())
