"""The cross-entropy method."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from layeredrl_trl.planners.base import SamplingPlanner


class CrossEntropyPlanner(SamplingPlanner):
    """Plan by the cross-entropy method in a model-based environment; a policy.

    Action sequences are drawn from a diagonal Gaussian and clipped to the bounds of the action;
    mean and standard deviation are fitted to the ``top_k`` with the highest returns; repeat. The
    first candidate of a round is the mean itself. The first mean is mid-range, or the previous
    plan moved on by one step; the first standard deviation is half the range of the action (1 in
    unbounded dims), times ``warm_std`` after a previous plan.

    How candidates are scored at termination and at the horizon, when a start is cold, and all
    other arguments: see :class:`~layeredrl_trl.planners.SamplingPlanner`. Candidates whose return
    is not finite are no elites; where there are no others, the distribution stays as it is and
    ``plan_return`` is ``-inf``.

    Args:
        env (EnvBase): the model, any environment with ``batch_locked=False``.
        planning_horizon (int): steps H of a plan.
        optim_steps (int): rounds of sampling and fitting.
        num_candidates (int): action sequences N per environment and round, with the mean.
        top_k (int): elites per round, at most ``num_candidates``.
        momentum (float): weight of the old mean and standard deviation in a fit, in [0, 1).
        min_std (float): floor of the standard deviation, as a fraction of that of a cold start.
        warm_std (float): first standard deviation of a warm start, as a fraction of that of a cold
            one. Near 1 the previous plan is soon forgotten, near 0 it is hard to leave.
        return_action ("mean" or "best"): the plan is the last mean, or the best candidate of all
            rounds. ``plan_return`` is the mean return of the last elites, or the best return.
        **options: the other arguments of :class:`~layeredrl_trl.planners.SamplingPlanner`
            (``gamma``, ``terminal_value``, ``warm_start``, keys).

    Reads:
        the state of ``env``; ``plan`` ``[..., H, A]`` and ``is_init`` ``[..., 1]`` if they are
        there and ``warm_start`` is True.

    Writes:
        ``action`` ``[..., A]``, ``("next", "plan")`` ``[..., H, A]``, ``plan_return`` ``[..., 1]``.

    Raises:
        ValueError: if ``optim_steps`` < 1, ``top_k`` is not in [1, ``num_candidates``],
            ``momentum`` is not in [0, 1), ``min_std`` < 0, ``warm_std`` <= 0, or ``return_action``
            is unknown; and what :class:`~layeredrl_trl.planners.SamplingPlanner` raises.

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
        planning_horizon: int,
        optim_steps: int,
        num_candidates: int,
        top_k: int,
        momentum: float = 0.0,
        min_std: float = 0.0,
        warm_std: float = 0.5,
        return_action: Literal["mean", "best"] = "mean",
        **options,
    ) -> None:
        if optim_steps < 1:
            raise ValueError(f"optim_steps must be at least 1, got {optim_steps}.")
        if not 1 <= top_k <= num_candidates:
            raise ValueError(
                f"top_k must be in [1, num_candidates], got top_k={top_k} and "
                f"num_candidates={num_candidates}."
            )
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
        if min_std < 0.0:
            raise ValueError(f"min_std must not be negative, got {min_std}.")
        if warm_std <= 0.0:
            raise ValueError(f"warm_std must be positive, got {warm_std}.")
        if return_action not in ("mean", "best"):
            raise ValueError(f"return_action must be 'mean' or 'best', got {return_action!r}.")
        super().__init__(
            env, planning_horizon=planning_horizon, num_candidates=num_candidates, **options
        )
        self.optim_steps = optim_steps
        self.top_k = top_k
        self.momentum = momentum
        self.min_std = min_std
        self.warm_std = warm_std
        self.return_action = return_action

    def _improve(
        self, candidates: TensorDictBase, plan: Tensor, is_warm: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch_size, steps = plan.shape[:-2], plan.shape[-2:]
        cold_std = self._initial_std.expand_as(plan)
        mean = plan
        std = torch.where(is_warm[..., None, None], self.warm_std * cold_std, cold_std)
        floor = self.min_std * cold_std
        best, best_return = plan, torch.full((*batch_size, 1), -torch.inf, device=plan.device)
        for _ in range(self.optim_steps):
            noise = torch.randn(
                *batch_size, self.num_candidates, *steps, dtype=plan.dtype, device=plan.device
            )
            noise[..., 0, :, :] = 0.0  # the mean is a candidate: a good plan is not lost
            actions = mean.unsqueeze(-3) + std.unsqueeze(-3) * noise
            actions = actions.clamp(self._low, self._high)
            returns = self.score(candidates, actions)

            elite_returns, index = returns.topk(self.top_k, dim=-2)
            elites = actions.take_along_dim(index.unsqueeze(-1), -3)
            finite = elite_returns > -torch.inf
            count = finite.sum(-2)
            any_finite = (count > 0).unsqueeze(-1)
            weight = (finite / count.clamp(min=1).unsqueeze(-2)).unsqueeze(-1).to(plan.dtype)
            elite_mean = (weight * elites).sum(-3)
            elite_std = (weight * (elites - elite_mean.unsqueeze(-3)) ** 2).sum(-3).sqrt()
            elite_mean = mean.lerp(elite_mean, 1 - self.momentum)
            elite_std = std.lerp(elite_std, 1 - self.momentum).maximum(floor)
            mean = torch.where(any_finite, elite_mean, mean)
            std = torch.where(any_finite, elite_std, std)

            top = elite_returns[..., 0, :]
            better = top > best_return
            best_return = torch.where(better, top, best_return)
            best = torch.where(better.unsqueeze(-1), elites[..., 0, :, :], best)
        if self.return_action == "best":
            return best, best_return
        total = torch.where(finite, elite_returns, 0.0).sum(-2)
        return mean, torch.where(count > 0, total / count.clamp(min=1), -torch.inf)
