"""Plans of continuous actions: a diagonal Gaussian, clipped to the bounds of the action."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.tensor_specs import TensorSpec
from torchrl.envs import EnvBase

from layeredrl_trl.checks import check_finite
from layeredrl_trl.functional import colour, colouring_matrix
from layeredrl_trl.planners.base import SamplingPlanner


class Gaussian(NamedTuple):
    """A distribution over action sequences: ``mean`` and ``std`` ``[*B, H, A]``.

    ``kept`` are sequences to try again, ``[*B, K, H, A]``, NaN where there are none; or None.
    """

    mean: Tensor
    std: Tensor
    kept: Tensor | None = None


class GaussianPlanner(SamplingPlanner):
    """Plan continuous actions with a diagonal Gaussian; a subclass weighs and fits.

    The first mean is mid-range (0 in unbounded dims, clipped to their bounds) or the previous plan
    moved on by one step, with a mid-range last step; the first standard deviation is ``std`` times
    half the range of the action (1 in unbounded dims), times ``warm_std`` after a previous plan.
    The first candidate of a round is the mean itself. Every candidate is clipped to the bounds.

    The plan is the last mean or, with ``return_action="best"``, the best candidate. With
    ``"sample"`` the action is that of a sequence drawn from the last Gaussian, clipped, and the
    plan is the mean all the same: noise is not carried over.

    Args:
        env (EnvBase): the model, with one continuous action vector ``[A]``.
        std (float): first standard deviation of a cold start, as a fraction of half the range.
        warm_std (float): first standard deviation of a warm start, as a fraction of that of a cold
            one. Near 1 the previous plan is soon forgotten, near 0 it is hard to leave.
        noise_beta (float): candidates vary over time like noise of power spectrum
            ``1 / f^noise_beta``: 0 is white, 2 and more is smooth.
        **options: ``planning_horizon``, ``optim_steps``, ``num_candidates``, ``return_action``,
            ``gamma``, ``terminal_value``, ``warm_start``, keys and the other arguments of
            :class:`~layeredrl_trl.planners.SamplingPlanner`, which also says what is read and
            written, and when a start is cold.

    Raises:
        TypeError: if the action is not continuous.
        ValueError: if the action is no vector, ``std`` or ``warm_std`` is not positive and
            finite, or ``noise_beta`` is not finite.
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        std: float = 1.0,
        warm_std: float = 0.5,
        noise_beta: float = 0.0,
        **options,
    ) -> None:
        check_finite("std", std, above=0)
        check_finite("warm_std", warm_std, above=0)
        super().__init__(env, **options)
        self.std = std
        self.warm_std = warm_std
        self.noise_beta = noise_beta
        like = {"dtype": self._half_range.dtype, "device": self._half_range.device}
        matrix = colouring_matrix(noise_beta, self.planning_horizon, **like)
        self.register_buffer("_colouring", matrix if noise_beta else None, persistent=False)

    def _register_space(self, spec: TensorSpec) -> Tensor:
        planner = type(self).__name__
        if spec.domain != "continuous" or not spec.dtype.is_floating_point:
            raise TypeError(
                f"{planner} samples continuous actions; discrete actions are not supported by it "
                "(CategoricalCrossEntropyPlanner takes OneHot and Categorical), got "
                f"{type(spec).__name__} of dtype {spec.dtype}."
            )
        if spec.ndim != 1 or spec.shape[0] < 1:
            raise ValueError(
                f"{planner} needs an action vector of shape [A], got shape {tuple(spec.shape)}."
            )
        low, high = spec.space.low.clone(), spec.space.high.clone()
        bounded = (high - low).isfinite()
        half_range = torch.where(bounded, high / 2 - low / 2, 1.0)
        for name, value in (("_low", low), ("_high", high), ("_half_range", half_range)):
            self.register_buffer(name, value, persistent=False)
        return torch.where(bounded, low / 2 + high / 2, torch.zeros_like(low).clamp(low, high))

    def _clip(self, actions: Tensor) -> Tensor:
        return actions.clamp(self._low, self._high)

    def _start(self, carried: dict[NestedKey, Tensor]) -> Gaussian:
        mean, is_warm = self._initial_plan(carried)
        cold_std = self.std * self._half_range
        return Gaussian(self._clip(mean), torch.where(is_warm, self.warm_std, 1.0) * cold_std)

    def _num_candidates(self, number: int) -> int:
        """Candidates of a round."""
        return self.num_candidates

    def _mean_is_candidate(self, number: int) -> bool:
        """Whether the mean is the first candidate of a round."""
        return True

    def _draw(self, belief: Gaussian, number: int) -> Tensor:
        mean, std = belief.mean.unsqueeze(-3), belief.std.unsqueeze(-3)
        shape = (*mean.shape[:-3], self._num_candidates(number), *mean.shape[-2:])
        noise = torch.randn(shape, dtype=mean.dtype, device=mean.device)
        if self._colouring is not None:
            noise = colour(noise, self._colouring)
        if self._mean_is_candidate(number):
            noise.select(-3, 0).zero_()  # a good plan is not lost
        return self._clip(torch.addcmul(mean, std, noise))

    def _mode(self, belief: Gaussian) -> Tensor:
        return self._clip(belief.mean)

    def _sample(self, belief: Gaussian, chosen: Tensor, weights: Tensor) -> Tensor:
        return self._clip(torch.addcmul(belief.mean, belief.std, torch.randn_like(belief.mean)))

    def _width(self, belief: Gaussian) -> Tensor:
        cold_std = self.std * self._half_range
        relative = belief.std / cold_std.clamp_min(torch.finfo(cold_std.dtype).tiny)
        return relative.mean((-2, -1)).unsqueeze(-1)

    def _carry_on(self, belief: Gaussian, sequence: Tensor) -> dict[NestedKey, Tensor]:
        return {self.plan_key: sequence}
