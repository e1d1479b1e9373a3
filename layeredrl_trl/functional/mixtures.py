"""Mixtures of diagonal Gaussians, in log space and float32.

The ``K`` components of a mixture lie along the second to last dim of ``mean`` and of ``std``, which
is positive: both are ``[..., K, D]``. Weights ``[..., K]`` sum to 1; log weights are normalised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from layeredrl_trl.functional.common_noise import Draw, draw_each

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def gaussian_mixture_log_prob(
    value: Tensor, mean: Tensor, std: Tensor, log_weights: Tensor
) -> Tensor:
    """Compute ``log sum_k w_k N(value; mean_k, diag(std_k^2))`` by a log-sum-exp.

    Returns:
        Log density ``[...]`` of ``value`` ``[..., D]``, in nats. It is finite however far ``value``
        is from every mean, as long as the squared distance in units of ``std`` is finite.

    Example:
        >>> zero, one = torch.zeros(2, 1), torch.ones(2, 1)
        >>> gaussian_mixture_log_prob(torch.tensor([50.0]), zero, one, torch.full((2,), 0.5).log())
        tensor(-1250.9189)
    """
    scaled = (value.unsqueeze(-2) - mean) / std
    distance = torch.addcmul(std.log(), scaled, scaled, value=0.5).sum(-1)
    log_prob = log_weights - distance - _LOG_SQRT_2PI * scaled.shape[-1]
    return log_prob.squeeze(-1) if log_prob.shape[-1] == 1 else torch.logsumexp(log_prob, -1)


def gaussian_mixture_mean(mean: Tensor, weights: Tensor) -> Tensor:
    """Average the component means ``[..., K, D]``: ``sum_k w_k mean_k``, ``[..., D]``."""
    return (weights.unsqueeze(-1) * mean).sum(-2)


def gaussian_mixture_variance(mean: Tensor, std: Tensor, weights: Tensor) -> Tensor:
    """Compute the variance ``[..., D]``: within components plus between their means."""
    between = (mean - gaussian_mixture_mean(mean, weights).unsqueeze(-2)).square()
    return gaussian_mixture_mean(std.square() + between, weights)


class MixtureNoise(NamedTuple):
    """The random numbers of a draw from a mixture.

    Attributes:
        gumbel: standard Gumbel noise ``[..., K]``, chooses the component; ``None`` if ``K`` is 1.
        normal: standard normal noise, ``[..., D]``.
    """

    gumbel: Tensor | None
    normal: Tensor


def mixture_noise(
    shape: Sequence[int],
    dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    draw: Draw = draw_each,
) -> MixtureNoise:
    """Draw the noise of :func:`sample_gaussian_mixture`; follows torch's global generator.

    ``shape`` is that of the mixtures' log weights, ``[..., K]``, and ``dim`` is ``D``.
    Another ``draw`` lets mixtures share noise, see :class:`~layeredrl_trl.functional.CommonDraws`.
    """
    options = {"dtype": dtype, "device": device, "draw": draw}
    gumbel, normal = mixture_noise_of_steps(1, shape, dim, **options)
    return MixtureNoise(None if gumbel is None else gumbel[0], normal[0])


def mixture_noise_of_steps(
    steps: int,
    shape: Sequence[int],
    dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    draw: Draw = draw_each,
) -> MixtureNoise:
    """Draw the noise of ``steps`` calls of :func:`mixture_noise`, with a leading dim ``steps``.

    All noise of a step comes from normal numbers: half the squared length of a pair of them is
    exponential (Box and Muller 1958), in a third of the time of ``Tensor.exponential_``.
    """
    n_components = shape[-1] if shape[-1] > 1 else 0
    shape = (*shape[:-1], dim + 2 * n_components)
    randn = partial(torch.randn, dtype=dtype, device=device)
    noise = torch.stack([draw(randn, shape) for _ in range(steps)])
    if not n_components:
        return MixtureNoise(None, noise)
    normal, a, b = noise.split([dim, n_components, n_components], -1)
    exponential = 0.5 * (a.square() + b.square())
    return MixtureNoise(-exponential.log(), normal)


def sample_gaussian_mixture(
    mean: Tensor, std: Tensor, log_weights: Tensor, noise: MixtureNoise | None = None
) -> Tensor:
    """Draw a component by its weight, then a value from that component's Gaussian.

    Follows torch's global generator. The draw is differentiable in ``mean`` and ``std`` of the
    chosen component, not in the weights. ``noise`` is that of :func:`mixture_noise`; ``None`` draws
    it here.

    Returns:
        ``[..., D]``.
    """
    like = {"dtype": mean.dtype, "device": mean.device}
    gumbel, normal = noise or mixture_noise(log_weights.shape, mean.shape[-1], **like)
    if gumbel is None:
        mean, std = mean.squeeze(-2), std.squeeze(-2)
    else:
        component = (log_weights + gumbel).argmax(-1)[..., None, None]
        component = component.expand(*mean.shape[:-2], 1, mean.shape[-1])
        mean, std = mean.gather(-2, component).squeeze(-2), std.gather(-2, component).squeeze(-2)
    return torch.addcmul(mean, std, normal)
