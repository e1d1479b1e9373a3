"""A learned matrix that whitens changes of the latent state: alike in scale in every direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layeredrl_trl.functional import whitening_residual
from layeredrl_trl.modules.normalization import RunningMoments

_UNCHANGED = 1e-4
"""Standard deviation of a dim that never changed. It is small, because the symmetry-breaking start
moves each dim by some standard deviations."""


class DeltaStandardizer(nn.Module):
    """Learn the whitening matrix ``W`` of changes ``delta`` of the latent: ``cov(W delta) = I``.

    ``W_ij = A_ij / max(std_i, std_j)`` with ``A`` learned and symmetric, and ``std`` from running
    moments of ``delta``. So ``W`` starts with the right scale in every dim, and all entries of
    ``A`` have a similar size, whatever the units of the latent are. The ``std`` of a dim that never
    changed is set to 1e-4.

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
        """The whitening matrix ``W``, ``[D, D]``, symmetric."""
        twice_std = 2 * self.moments.spread(unchanged=_UNCHANGED)
        return (self.raw + self.raw.mT) / torch.maximum(twice_std[:, None], twice_std)

    def residual(self, delta: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute ``||cov(W delta) - I||_F``, a scalar to minimise.

        Args:
            delta: ``[..., D]``.
            mask: bool ``[...]``; changes where it is False do not count.
        """
        mask = None if mask is None else mask.reshape(-1)
        return whitening_residual(self.matrix, delta.flatten(0, -2), mask)

    def update_statistics(self, delta: Tensor, mask: Tensor | None = None) -> None:
        """Update the running moments with changes ``[..., D]`` of real transitions."""
        self.moments.update(delta, mask)
