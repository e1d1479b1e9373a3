"""A learned matrix that whitens changes of the latent state: alike in scale in every direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layeredrl_trl.checks import check_count, check_precision
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

    Raises:
        TypeError: if ``latent_state_dim`` is no integer.
        ValueError: if it is below 1.

    Example:
        >>> DeltaStandardizer(3).matrix.shape
        torch.Size([3, 3])
    """

    def __init__(self, latent_state_dim: int) -> None:
        super().__init__()
        check_count("DeltaStandardizer: latent_state_dim", latent_state_dim)
        self.raw = nn.Parameter(torch.eye(latent_state_dim, dtype=torch.float32))
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
        delta = delta.to(self.raw.dtype).flatten(0, -2)
        return whitening_residual(self.matrix, delta, mask)

    def update_statistics(self, delta: Tensor, mask: Tensor | None = None) -> None:
        """Update the running moments with changes ``[..., D]`` of real transitions."""
        self.moments.update(delta, mask)

    def _apply(self, fn: Any, recurse: bool = True) -> DeltaStandardizer:
        check_precision(type(self).__name__, fn)
        return super()._apply(fn, recurse)
