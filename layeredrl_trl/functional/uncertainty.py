"""Uncertainty of an ensemble: what it does not know (epistemic) and noise (aleatoric).

``mean`` and ``std`` of the members' modes are ``[..., E, M, D]``, the weights of the modes
``[..., E, M]``. Variances are in squared units of the latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_trl.functional.mixtures import gaussian_mixture_mean, gaussian_mixture_variance


def epistemic_variance(mean: Tensor, weights: Tensor) -> Tensor:
    """Compute the variance, over members, of the member means.

    The members are the whole population (no Bessel correction), so one member gives 0.

    Returns:
        ``[..., D]``.

    Reference:
        Chua et al. 2018, arXiv:1805.12114; the variance between members in the law of total
        variance.
    """
    return gaussian_mixture_mean(mean, weights).var(-2, correction=0)


def aleatoric_variance(mean: Tensor, std: Tensor, weights: Tensor) -> Tensor:
    """Compute the mean, over members, of the variance of each member's mixture.

    Returns:
        ``[..., D]``. Its sum with :func:`epistemic_variance` is the variance of the even mixture
        of all members.
    """
    return gaussian_mixture_variance(mean, std, weights).mean(-2)


def disagreement(epistemic_var: Tensor) -> Tensor:
    """Compute how much the members disagree, ``sqrt(mean_d epistemic_var_d)``.

    Its gradient at 0 is 0, not infinite.

    Returns:
        ``[..., 1]``, in units of the latent, for an :func:`epistemic_variance` ``[..., D]``.

    Example:
        >>> disagreement(torch.tensor([[0.0, 0.0], [32.0, 0.0]]))
        tensor([[0.],
                [4.]])
    """
    mean = epistemic_var.mean(-1, keepdim=True)
    is_zero = mean == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, mean).sqrt())
