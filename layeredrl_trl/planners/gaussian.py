"""Plans of continuous actions: a diagonal Gaussian, clipped to the bounds of the action."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.tensor_specs import TensorSpec
from torchrl.envs import EnvBase

from layeredrl_trl.checks import check_finite, check_number
from layeredrl_trl.functional import colour, colouring_matrix, weighted_moments
from layeredrl_trl.planners.base import SamplingPlanner


class GaussianBelief(NamedTuple):
    """A diagonal Gaussian over action sequences, from which a planner draws.

    Attributes:
        mean, std: of every step, ``[*B, H, A]``.
        kept: sequences to try again, ``[*B, K, H, A]``, NaN where there are none; or ``None``.
    """

    mean: Tensor
    std: Tensor
    kept: Tensor | None = None

    def moved(self, mean: Tensor, std: Tensor, weights: Tensor) -> GaussianBelief:
        """Give the belief another ``mean`` and ``std`` ``[*B, H, A]``, where candidates count.

        Where all ``weights`` ``[*B, K, 1]`` are 0, it stays as it is.
        """
        fitted = weights.sum(-2, keepdim=True) > 0
        return self._replace(
            mean=torch.where(fitted, mean, self.mean), std=torch.where(fitted, std, self.std)
        )


class GaussianPlanner(SamplingPlanner):
    """Plan continuous actions with a diagonal Gaussian; a subclass weighs the candidates.

    It brings :meth:`weigh`; see :class:`~layeredrl_trl.planners.SamplingPlanner`. By default the
    Gaussian is fitted to the weighted mean and standard deviation of the candidates; :meth:`fit`,
    :meth:`round_size` and :meth:`mean_is_candidate` are the next to override. The belief is a
    :class:`~layeredrl_trl.planners.GaussianBelief`.

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

    Attributes:
        half_range: half the range of each dim of the action, 1 in unbounded ones; ``[A]``.

    Raises:
        TypeError: if the action is not continuous.
        ValueError: if the action is no vector, ``std`` or ``warm_std`` is not positive and
            finite, or ``noise_beta`` is not finite.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from layeredrl_trl.envs import PredictorEnv
        >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet
        >>> class BetterHalf(GaussianPlanner):
        ...     def weigh(self, returns):
        ...         median = returns.median(-2, keepdim=True).values
        ...         good = returns.isfinite() & (returns >= median)
        ...         return None, good / good.sum(-2, keepdim=True).clamp_min(1)
        >>> parts = IdentityEncoder(3), ProbabilisticEnsemble(3, 0, 1), RewardNet(3, 0, 1)
        >>> env = PredictorEnv(*parts, Bounded(-2.0, 2.0, (1,)))
        >>> planner = BetterHalf(env, planning_horizon=5, optim_steps=4, num_candidates=32)
        >>> td = TensorDict(observation=torch.zeros(4, 3), batch_size=[4])
        >>> planner(env.initial_state(td))["action"].shape
        torch.Size([4, 1])
    """

    half_range: Tensor

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
        check_number("noise_beta", noise_beta)
        super().__init__(env, **options)
        self.std = std
        self.warm_std = warm_std
        self.noise_beta = noise_beta
        like = {"dtype": self.half_range.dtype, "device": self.half_range.device}
        matrix = colouring_matrix(noise_beta, self.planning_horizon, **like)
        self.register_buffer("_colouring", matrix if noise_beta else None, persistent=False)

    def register_space(self, spec: TensorSpec) -> Tensor:
        """Check the action, and register its bounds; a step that knows nothing is mid-range."""
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
        for name, value in (("_low", low), ("_high", high), ("half_range", half_range)):
            self.register_buffer(name, value, persistent=False)
        return torch.where(bounded, low / 2 + high / 2, torch.zeros_like(low).clamp(low, high))

    def clip(self, actions: Tensor) -> Tensor:
        """Clip actions ``[..., A]`` to their bounds."""
        return actions.clamp(self._low, self._high)

    def start(self, carried: dict[NestedKey, Tensor]) -> GaussianBelief:
        """Start from the middle of the range or the previous plan, with the first width."""
        mean, is_warm = self.initial_plan(carried)
        cold_std = self.std * self.half_range
        std = torch.where(is_warm, self.warm_std * cold_std, cold_std)
        return GaussianBelief(self.clip(mean), std)

    def round_size(self, number: int) -> int:
        """Return how many candidates to draw in round ``number``, at most ``num_candidates``."""
        return self.num_candidates

    def mean_is_candidate(self, number: int) -> bool:
        """Tell whether the mean is the first candidate of round ``number``."""
        return True

    def draw(self, belief: GaussianBelief, number: int) -> Tensor:
        """Draw sequences ``[*B, N, H, A]`` within the bounds."""
        mean, std = belief.mean.unsqueeze(-3), belief.std.unsqueeze(-3)
        shape = (*mean.shape[:-3], self.round_size(number), *mean.shape[-2:])
        noise = torch.randn(shape, dtype=mean.dtype, device=mean.device)
        if self._colouring is not None:
            noise = colour(noise, self._colouring)
        if self.mean_is_candidate(number):
            noise.select(-3, 0).zero_()  # a good plan is not lost
        return self.clip(torch.addcmul(mean, std, noise))

    def fit(self, belief: GaussianBelief, chosen: Tensor, weights: Tensor) -> GaussianBelief:
        """Fit mean and standard deviation to the weighted candidates ``[*B, K, H, A]``."""
        return belief.moved(*weighted_moments(chosen, weights), weights)

    def most_likely(self, belief: GaussianBelief) -> Tensor:
        """Return the mean ``[*B, H, A]``."""
        return self.clip(belief.mean)

    def sample_sequence(self, belief: GaussianBelief, chosen: Tensor, weights: Tensor) -> Tensor:
        """Draw a sequence ``[*B, H, A]`` from the Gaussian."""
        return self.clip(torch.addcmul(belief.mean, belief.std, torch.randn_like(belief.mean)))

    def width(self, belief: GaussianBelief) -> Tensor:
        """Return the mean standard deviation as a fraction of the first one, ``[*B, 1]``."""
        cold_std = self.std * self.half_range
        relative = belief.std / cold_std.clamp_min(torch.finfo(cold_std.dtype).tiny)
        return relative.mean((-2, -1)).unsqueeze(-1)
