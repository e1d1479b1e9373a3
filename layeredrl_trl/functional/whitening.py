"""Whitening: a linear map that makes a random vector's covariance the identity."""

from __future__ import annotations

import torch
from torch import Tensor


def covariance(samples: Tensor) -> Tensor:
    """Compute the covariance matrix of a batch.

    Args:
        samples: ``[N, D]``.

    Returns:
        ``[D, D]``, divided by ``N`` (so one sample gives 0, not NaN).
    """
    centred = samples - samples.mean(0)
    return centred.mT @ centred / samples.shape[0]


def whitening_residual(matrix: Tensor, samples: Tensor) -> Tensor:
    r"""Measure how far ``matrix`` is from whitening ``samples``: ``||cov(W x) - I||_F``.

    Args:
        matrix: ``W``, ``[D, D]``.
        samples: ``x``, ``[N, D]``.

    Returns:
        Scalar, 0 where ``W`` is ``cov(x)^{-1/2}`` up to a rotation.
    """
    whitened = covariance(samples @ matrix.mT)
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.matrix_norm(whitened - eye)
