"""The network of a reward or a value: it learns alike whatever the units are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layeredrl_trl.checks import check_count, check_precision
from layeredrl_trl.modules.mlp import ConcatMLP
from layeredrl_trl.modules.normalization import RunningMoments
from layeredrl_trl.modules.spaces import action_features


class HeadMLP(ConcatMLP):
    """A perceptron from latent state, context and, where it has one, action to a number.

    It computes ``m + s f((x - m_x) / s_x)`` with running means and standard deviations of its
    inputs ``x`` and of rewards, so layers of one size fit every unit of reward and latent state. Of
    an input or a reward that never changed, ``s`` is the magnitude. Before any update it computes
    ``f(x)``.

    A value (``is_sum``) has a unit made of rewards, not of its own targets: these are made by the
    value itself, so their unit and the value would drive each other up. There ``m`` is 0 and ``s``
    a root mean square. The loss passes rewards divided by ``sqrt(1 - gamma^2)``: so large is the
    discounted sum of independent ones.

    Args:
        latent_state_dim, context_dim: ``D`` and ``C``.
        action_dim: ``A``; ``None`` for a function that reads no action.
        hidden_sizes: width of each hidden layer.
        activation: class of the nonlinearity.
        is_sum: whether it predicts discounted sums of rewards instead of rewards.

    Attributes:
        moments: running moments of the inputs and, last, of the rewards, ``[D + C + A + 1]``.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is below 1 (``context_dim``: below 0).
    """

    def __init__(
        self,
        latent_state_dim: int,
        context_dim: int,
        action_dim: int | None,
        hidden_sizes: Sequence[int],
        activation: type[nn.Module],
        *,
        is_sum: bool = False,
    ) -> None:
        check_count("latent_state_dim", latent_state_dim)
        check_count("context_dim", context_dim, least=0)
        dims = (latent_state_dim, context_dim)
        if action_dim is not None:
            check_count("action_dim", action_dim)
            dims = (*dims, action_dim)
        super().__init__(dims, 1, hidden_sizes, activation)
        self.moments = RunningMoments(sum(dims) + 1)
        self.is_sum = is_sum

    @property
    def target_scale(self) -> Tensor:
        """Unit in which targets are learned, ``[1]``."""
        return self._scale()[-1:]

    def update_statistics(
        self, inputs: Sequence[Tensor], reward: Tensor, mask: Tensor | None = None
    ) -> None:
        """Update the running moments with real steps.

        Args:
            inputs: arguments of :meth:`forward`, ``[..., *]``.
            reward: of the step, ``[..., 1]``.
            mask: bool ``[..., 1]``, False on steps to ignore.
        """
        x = self._join(*inputs)
        mask = None if mask is None else mask.squeeze(-1)
        self.moments.update(torch.cat([x, reward.to(x.dtype)], -1), mask)

    def _join(self, latent: Tensor, context: Tensor, *action: Tensor) -> Tensor:
        features = (action_features(a, latent.shape[:-1], self.in_dims[-1]) for a in action)
        return super()._join(latent, context, *features)

    def _run(self, rows: Tensor) -> Tensor:
        mean, scale = self.moments.mean, self._scale()
        out = self.layers((rows - mean[:-1]) / scale[:-1])
        return scale[-1:] * out if self.is_sum else torch.addcmul(mean[-1:], scale[-1:], out)

    def _scale(self) -> Tensor:
        mean, var = self.moments.mean, self.moments.var
        size = mean.abs()
        scale = self.moments.spread(unchanged=torch.where(size > 0, size, 1.0))
        if not self.is_sum:
            return scale
        square = torch.addcmul(var[-1:], mean[-1:], mean[-1:])
        return torch.cat([scale[:-1], torch.where(square > 0, square.sqrt(), 1.0)])

    def _apply(self, fn: Any, recurse: bool = True) -> HeadMLP:
        check_precision(type(self).__name__, fn)
        return super()._apply(fn, recurse)
