"""Whitening: a linear map that turns a random vector's covariance into the identity."""

from __future__ import annotations

import torch
from torch import Tensor


def covariance(samples: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the covariance matrix ``[D, D]`` of a batch ``[N, D]``.

    There is no Bessel's correction, so one sample gives 0. Samples where ``mask``, bool ``[N]``, is
    False do not count, but must be finite.
    """
    if mask is None:
        centred = samples - samples.mean(0)
        return centred.mT @ centred / samples.shape[0]
    weight = mask.to(samples.dtype).unsqueeze(-1)
    n = weight.sum().clamp_min(1)
    centred = (samples - (weight * samples).sum(0) / n) * weight
    return centred.mT @ centred / n


def whitening_residual(matrix: Tensor, samples: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Measure how far the whitening matrix ``W`` is from whitening: ``||cov(W x) - I||_F``.

    ``W`` is ``[D, D]``; samples ``x`` and their mask are as for :func:`covariance`.

    Returns:
        Scalar, 0 where ``W`` is ``cov(x)^{-1/2}`` up to a rotation.
    """
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    # cov(W x) - I = W cov(x) W^T - I, in one operation
    difference = torch.addmm(eye, matrix @ covariance(samples, mask), matrix.mT, beta=-1)
    return torch.linalg.vector_norm(difference)
