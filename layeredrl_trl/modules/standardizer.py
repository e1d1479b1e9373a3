"""A learned map that makes changes of the latent state comparable in every direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layeredrl_trl.functional import whitening_residual
from layeredrl_trl.modules.normalization import RunningMoments


class DeltaStandardizer(nn.Module):
    """Learn a symmetric matrix ``W`` with ``cov(W delta) = I`` for changes ``delta`` of the latent.

    ``W_ij = A_ij / max(std_i, std_j)`` with ``A`` learned, symmetric, and ``std`` from running
    moments: ``W`` starts at the right scale of every dim, and no entry of ``A`` weighs more than
    another, whatever the units of the latent are.

    Args:
        latent_state_dim: ``D``.

    Example:
        >>> DeltaStandardizer(3).matrix.shape
        torch.Size([3, 3])
    """

    def __init__(self, latent_state_dim: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.eye(latent_state_dim))
        self.moments = RunningMoments(latent_state_dim)

    @property
    def matrix(self) -> Tensor:
        """``W``, ``[D, D]``, symmetric."""
        twice = 2 * self.moments.std(floor=1e-4)
        return (self.raw + self.raw.mT) / torch.maximum(twice[:, None], twice)

    def residual(self, delta: Tensor, mask: Tensor | None = None) -> Tensor:
        """Measure ``||cov(W delta) - I||_F``, a scalar to minimise.

        Args:
            delta: ``[..., D]``.
            mask: bool ``[...]``; changes where it is False count for nothing.
        """
        mask = None if mask is None else mask.reshape(-1)
        return whitening_residual(self.matrix, delta.flatten(0, -2), mask)

    def update_statistics(self, delta: Tensor, mask: Tensor | None = None) -> None:
        """Take changes ``[..., D]`` of real transitions into the running moments."""
        self.moments.update(delta, mask)
