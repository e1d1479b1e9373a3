"""The cross-entropy method."""

from __future__ import annotations

from torch import Tensor
from torchrl.envs import EnvBase

from layeredrl_trl.checks import check_count, check_finite
from layeredrl_trl.functional import elite_weights, weighted_moments
from layeredrl_trl.planners.gaussian import GaussianBelief, GaussianPlanner


class CrossEntropyPlanner(GaussianPlanner):
    """Plan by the cross-entropy method in a model-based environment; a policy.

    Action sequences are drawn from a diagonal Gaussian and clipped to the bounds of the action;
    mean and standard deviation are fitted to the ``top_k`` with the highest returns; repeat.
    Candidates whose return is not finite are no elites. How the Gaussian starts, what
    ``return_action`` does, and what is read: see :class:`~layeredrl_trl.planners.GaussianPlanner`.

    Args:
        env (EnvBase): the model, any environment with ``batch_locked=False``.
        num_candidates, top_k (int): action sequences N per environment and round, with the mean,
            and how many of them are elites, at most N.
        momentum (float): weight of the old mean and standard deviation in a fit, in [0, 1).
        min_std (float): floor of the standard deviation, as a fraction of that of a cold start.
        **options: the other arguments of :class:`~layeredrl_trl.planners.GaussianPlanner`.

    Reads:
        the state of ``env``; where they exist, ``plan`` ``[..., H, A]``, ``is_init`` ``[..., 1]``.

    Writes:
        ``action`` ``[..., A]``, ``("next", "plan")`` ``[..., H, A]``, and ``plan_return`` (mean
        return of the last elites, or the best return), ``plan_spread``, ``plan_std`` (mean standard
        deviation of the last elites, as a fraction of the first) ``[..., 1]``.

    Raises:
        ValueError: if ``top_k`` is not in [1, ``num_candidates``], ``momentum`` is not in [0, 1) or
            ``min_std`` is below 0 or not finite; and what
            :class:`~layeredrl_trl.planners.GaussianPlanner` raises.

    Reference:
        Botev, Kroese, Rubinstein, L'Ecuyer (2013), The cross-entropy method for optimization,
        algorithm 2.2 for continuous optimisation, ``momentum`` being their smoothing.
        Chua et al. (2018), arXiv:1805.12114, for its use with a learned model; deviation:
        candidates are clipped, not drawn from a truncated Gaussian. Pinneri et al. (2020),
        arXiv:2008.06389, for the mean as a candidate; deviation: in every round, not the last.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule, TensorDictSequential
        >>> from torchrl.data import Bounded, Composite, Unbounded
        >>> from torchrl.envs import ModelBasedEnvBase
        >>> class Integrator(ModelBasedEnvBase):  # reward is higher closer to 1
        ...     def __init__(self):
        ...         step = lambda x, a: (x + a, -((x + a - 1) ** 2))
        ...         super().__init__(TensorDictModule(step, ["x", "action"], ["x", "reward"]))
        ...         self.observation_spec = Composite(x=Unbounded((1,)))
        ...         self.action_spec = Bounded(-0.5, 0.5, (1,))
        ...         self.reward_spec = Unbounded((1,))
        ...
        ...     def _reset(self, tensordict):
        ...         return self.observation_spec.zero(tensordict.batch_size)
        >>> _ = torch.manual_seed(0)
        >>> planner = CrossEntropyPlanner(
        ...     Integrator(), planning_horizon=3, optim_steps=8, num_candidates=64, top_k=8
        ... )
        >>> td = planner(TensorDict({"x": torch.zeros(5, 1)}, batch_size=[5]))
        >>> td["action"].shape, td["next", "plan"].shape
        (torch.Size([5, 1]), torch.Size([5, 3, 1]))
        >>> (td["action"] - 0.5).abs().max() < 0.01
        tensor(True)

        As a policy for a real environment, after a module that makes the state:

        >>> to_state = TensorDictModule(lambda obs: obs, ["observation"], ["x"])
        >>> policy = TensorDictSequential(to_state, planner)
        >>> policy(TensorDict({"observation": torch.zeros(1)}))["action"].shape
        torch.Size([1])
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        num_candidates: int,
        top_k: int,
        momentum: float = 0.0,
        min_std: float = 0.0,
        **options,
    ) -> None:
        check_elites(top_k, num_candidates, momentum)
        check_finite("min_std", min_std)
        if min_std < 0.0:
            raise ValueError(f"min_std must not be negative, got {min_std}.")
        super().__init__(env, num_candidates=num_candidates, **options)
        self.top_k = top_k
        self.momentum = momentum
        self.min_std = min_std

    def weigh(self, returns: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the ``top_k`` candidates alike."""
        return elite_weights(returns, self.top_k)

    def fit(self, belief: GaussianBelief, chosen: Tensor, weights: Tensor) -> GaussianBelief:
        """Fit mean and standard deviation, with momentum and the floor."""
        mean, std = weighted_moments(chosen, weights)
        mean = belief.mean.lerp(mean, 1 - self.momentum)
        std = belief.std.lerp(std, 1 - self.momentum)
        if self.min_std:
            std = std.maximum(self.min_std * self.std * self.half_range)
        return belief.moved(mean, std, weights)


def check_elites(top_k: int, num_candidates: int, momentum: float) -> None:
    """Check what every cross-entropy method asks for."""
    for name, value in (("top_k", top_k), ("num_candidates", num_candidates)):
        check_count(name, value, least=0)
    if not 1 <= top_k <= num_candidates:
        raise ValueError(
            f"top_k must be in [1, num_candidates], got top_k={top_k} and "
            f"num_candidates={num_candidates}."
        )
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
