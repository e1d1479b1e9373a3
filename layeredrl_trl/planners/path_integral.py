"""Path integral control (MPPI)."""

from __future__ import annotations

from torch import Tensor
from torchrl.envs import EnvBase

from layeredrl_trl.checks import check_flag, check_number
from layeredrl_trl.functional import softmax_weights
from layeredrl_trl.planners.base import SamplingPlanner
from layeredrl_trl.planners.gaussian import GaussianBelief, GaussianPlanner


class PathIntegralPlanner(GaussianPlanner):
    """Plan by path integrals (MPPI) in a model-based environment; a policy.

    Action sequences are drawn around the plan and clipped to the bounds of the action; the new plan
    is their mean, weighted by ``exp(return / temperature)``; repeat. The weights are a softmax, so
    returns of any size neither overflow nor give NaN. Unlike in the cross-entropy method the
    standard deviation is not fitted: it shrinks by ``std_decay`` from round to round.

    A candidate whose return is not finite has weight 0. With ``return_action="sample"`` the action
    is that of one of the last candidates, drawn by its weight. How the Gaussian starts, and what is
    read: see :class:`~layeredrl_trl.planners.GaussianPlanner`.

    Args:
        env (EnvBase): the model, any environment with ``batch_locked=False``.
        temperature (float): above 0; near 0 the best candidate alone counts, at infinity all count
            alike. By default in units of the spread of the returns.
        normalize (bool): divide returns by their standard deviation over the candidates, so that
            ``temperature`` need not be fitted to the scale of the reward, nor to the horizon. False
            for the textbook's weights, in which certainty grows with the scale.
        std_decay (float): factor of the standard deviation after each round, in (0, 1].
        **options: the other arguments of :class:`~layeredrl_trl.planners.GaussianPlanner`.

    Reads:
        the state of ``env``; where they exist, ``plan`` ``[..., H, A]``, ``is_init`` ``[..., 1]``.

    Writes:
        ``action`` ``[..., A]``, ``("next", "plan")`` ``[..., H, A]``, and ``plan_return`` (weighted
        mean of the last returns, or the best return), ``plan_spread``, ``plan_std`` (what
        ``std_decay`` and ``warm_std`` left of the first standard deviation) ``[..., 1]``.

    Raises:
        TypeError: if ``normalize`` is no bool.
        ValueError: if ``temperature`` is not above 0 or ``std_decay`` not in (0, 1]; and what
            :class:`~layeredrl_trl.planners.GaussianPlanner` raises.

    Reference:
        Williams, Wagener, Goldfain, Drews, Rehg, Boots, Theodorou (2017), Information theoretic MPC
        for model-based reinforcement learning, ICRA, algorithm 2 (``temperature`` is their lambda).
        Deviations: no cost of control beside the reward's, the first candidate is the plan itself,
        several rounds, ``normalize``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from layeredrl_trl.envs import PredictorEnv
        >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet
        >>> parts = IdentityEncoder(3), ProbabilisticEnsemble(3, 0, 1), RewardNet(3, 0, 1)
        >>> env = PredictorEnv(*parts, Bounded(-2.0, 2.0, (1,)))
        >>> planner = PathIntegralPlanner(
        ...     env, planning_horizon=5, optim_steps=2, num_candidates=32, temperature=0.5
        ... )
        >>> td = TensorDict(observation=torch.zeros(4, 3), batch_size=[4])
        >>> planner(env.initial_state(td))["action"].shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        temperature: float = 0.1,
        normalize: bool = True,
        std_decay: float = 1.0,
        **options,
    ) -> None:
        check_flag("normalize", normalize)
        check_number("temperature", temperature)
        check_number("std_decay", std_decay)
        if not temperature > 0.0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        if not 0.0 < std_decay <= 1.0:
            raise ValueError(f"std_decay must be in (0, 1], got {std_decay}.")
        super().__init__(env, **options)
        self.temperature = temperature
        self.normalize = normalize
        self.std_decay = std_decay

    def weigh(self, returns: Tensor) -> tuple[None, Tensor]:
        """Weigh all candidates by a softmax of their returns."""
        return None, softmax_weights(returns, self.temperature, normalize=self.normalize)

    def fit(self, belief: GaussianBelief, chosen: Tensor, weights: Tensor) -> GaussianBelief:
        """Move the mean to that of the candidates, and shrink the standard deviation."""
        mean = (weights.unsqueeze(-1).to(chosen.dtype) * chosen).sum(-3)
        return belief.moved(mean, self.std_decay * belief.std, weights)

    # one of the last candidates, as the belief is not what remains uncertain: see `std_decay`
    sample_sequence = SamplingPlanner.sample_sequence
