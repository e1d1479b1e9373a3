"""What planners share: bounds of the action, and the plan as an entry of the TensorDict."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import Unbounded
from torchrl.data.tensor_specs import TensorSpec
from torchrl.envs import EnvBase
from torchrl.envs.transforms import TensorDictPrimer

from layeredrl_trl import keys
from layeredrl_trl.planners.scoring import CandidateReturn


class SamplingPlanner(TensorDictModuleBase, ABC):
    """Plan by trying candidate action sequences in a model-based environment; a policy.

    A subclass gives :meth:`_improve`, which turns an initial plan into a better one. The initial
    plan is mid-range (0 in unbounded dims, clipped to their bounds) at a cold start: without
    ``warm_start``, where no plan is found, where a value of the plan found is not finite, and where
    ``is_init`` is True. Otherwise it is the plan found, moved on by one step, with a mid-range last
    step. How candidates are scored at termination, truncation and the horizon: see
    :class:`~layeredrl_trl.planners.CandidateReturn`.

    The planner has no state of its own: it writes its plan under ``"next"``, and the environment
    carries it to the next step if it has the transform of :meth:`make_tensordict_primer`. Without
    that, TorchRL's ``rollout`` and ``Collector`` drop the plan after each step: everything works,
    but every start is cold. Other entries of the tensordict are neither read nor changed.

    Args:
        env (EnvBase): the model. Must accept any batch size (``batch_locked=False``) and have one
            continuous action vector ``[A]``.
        planning_horizon (int): steps H of a plan, at least 1.
        num_candidates (int): candidates N per environment and evaluation, at least 1.
        warm_start (bool): start from the previous plan.
        action_key (NestedKey, optional): where the action is written. Default: the environment's.
        plan_key (NestedKey): the plan. Read here, written under ``"next"``.
        plan_return_key (NestedKey): what the planner expects its plan to return.
        is_init_key (NestedKey): True at the first step of an episode.
        **scoring: ``gamma``, ``terminal_value``, ``reward_key``, ``state_keys``, ``value_key``,
            ``alive_key`` of :class:`~layeredrl_trl.planners.CandidateReturn`.

    Reads:
        the state keys; ``plan`` ``[..., H, A]`` and ``is_init`` ``[..., 1]`` if they are there
        and ``warm_start`` is True.

    Writes:
        ``action`` ``[..., A]``, ``("next", "plan")`` ``[..., H, A]``, ``plan_return`` ``[..., 1]``.

    Raises:
        TypeError: if the action is discrete, or ``env`` is no ``EnvBase``.
        ValueError: if an action is no vector or a number is out of range, and what
            :class:`~layeredrl_trl.planners.CandidateReturn` raises; when planning, if an entry has
            a wrong shape or device.
        KeyError: when planning, if a state key is missing.
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        planning_horizon: int,
        num_candidates: int,
        warm_start: bool = True,
        action_key: NestedKey | None = None,
        plan_key: NestedKey = "plan",
        plan_return_key: NestedKey = "plan_return",
        is_init_key: NestedKey = keys.IS_INIT,
        **scoring,
    ) -> None:
        if planning_horizon < 1:
            raise ValueError(f"planning_horizon must be at least 1, got {planning_horizon}.")
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, got {num_candidates}.")
        score = CandidateReturn(env, **scoring)
        low, high = _bounds(env.full_action_spec_unbatched[score.action_key], type(self).__name__)

        super().__init__()
        self.score = score
        self.planning_horizon = planning_horizon
        self.num_candidates = num_candidates
        self.warm_start = warm_start
        self.action_key = unravel_key(action_key or score.action_key)
        self.plan_key = unravel_key(plan_key)
        self.plan_return_key = unravel_key(plan_return_key)
        self.is_init_key = unravel_key(is_init_key)
        self.in_keys = list(score.state_shapes)
        if warm_start:
            self.in_keys += [self.plan_key, self.is_init_key]
        self.next_plan_key = unravel_key(("next", self.plan_key))
        self.out_keys = [self.action_key, self.next_plan_key, self.plan_return_key]

        bounded = (high - low).isfinite()
        mean = torch.where(bounded, low / 2 + high / 2, torch.zeros_like(low).clamp(low, high))
        std = torch.where(bounded, high / 2 - low / 2, 1.0)
        self.register_buffer("_low", low, persistent=False)
        self.register_buffer("_high", high, persistent=False)
        self.register_buffer("_initial_mean", mean, persistent=False)
        self.register_buffer("_initial_std", std, persistent=False)

    @property
    def env(self) -> EnvBase:
        """The environment that is planned in."""
        return self.score.env

    @abstractmethod
    def _improve(
        self, candidates: TensorDictBase, plan: Tensor, is_warm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn an initial plan into a better one.

        Args:
            candidates (TensorDictBase): the state, repeated for every candidate, batch ``[*B, N]``.
            plan (Tensor): the initial plan ``[*B, H, A]``.
            is_warm (Tensor): True where it comes from a previous plan ``[*B]``.

        Returns:
            the plan ``[*B, H, A]`` and its expected return ``[*B, 1]``.
        """

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Plan for every environment of the batch; see the class for what is read and written."""
        state = self._state(tensordict)
        plan, is_warm = self._initial_plan(tensordict)
        candidates = self._repeat(state, self.num_candidates)
        plan, plan_return = self._improve(candidates, plan, is_warm)
        plan = plan.clamp(self._low, self._high)
        tensordict.set(self.action_key, plan[..., 0, :].clone())
        tensordict.set(self.next_plan_key, plan)
        tensordict.set(self.plan_return_key, plan_return)
        return tensordict

    @torch.no_grad()
    def candidate_return(self, tensordict: TensorDictBase, actions: Tensor) -> Tensor:
        """Score action sequences as the planner does.

        Args:
            tensordict (TensorDictBase): holds the state keys, batch ``[*B]``. Not modified.
            actions (Tensor): action sequences ``[*B, N, H, A]``, any N and H, taken as they are.

        Returns:
            returns ``[*B, N, 1]``, ``-inf`` where they are not finite.

        Raises:
            ValueError: if ``actions`` has another shape.
        """
        batch_size, action_dim = tensordict.batch_size, self._low.shape[0]
        fits = actions.ndim == len(batch_size) + 3 and actions.shape[-1:] == self._low.shape
        if not fits or actions.shape[:-3] != batch_size:
            raise ValueError(
                f"actions must have shape [*{list(batch_size)}, N, H, {action_dim}], "
                f"got {list(actions.shape)}."
            )
        return self.score(self._repeat(self._state(tensordict), actions.shape[-3]), actions)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Make the transform that lets an environment carry the plan from step to step.

        Append it to the real environment, or let ``Collector(...,
        auto_register_policy_transforms=True)`` do so. At a reset it fills ``plan`` with NaN, which
        stands for "no plan yet", so ``InitTracker`` is not needed besides.

        Returns:
            the primer, for environments of any batch size.
        """
        shape = (self.planning_horizon, self._low.shape[0])
        spec = Unbounded(shape=shape, dtype=self._low.dtype, device=self._low.device)
        return TensorDictPrimer(
            {self.plan_key: spec}, default_value=float("nan"), expand_specs=True
        )

    def _state(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The entries that a step of the environment reads, and no others, checked."""
        batch_size = tensordict.batch_size
        state = TensorDict({}, batch_size=batch_size, device=tensordict.device)
        for key, shape in self.score.state_shapes.items():
            value = tensordict.get(key, None)
            if value is None:
                raise KeyError(
                    f"{type(self).__name__} needs the state entry {key!r} of "
                    f"{type(self.env).__name__}, but the tensordict has "
                    f"{sorted(map(str, tensordict.keys(True, True)))}. For a real environment, put "
                    "the module that makes an imagined state out of an observation before it."
                )
            if shape is not None:
                self._check(f"state entry {key!r}", value, (*batch_size, *shape))
            state.set(key, value)
        return state

    def _initial_plan(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """The previous plan moved on, or mid-range, ``[*B, H, A]``; which of the two, ``[*B]``."""
        batch_size = tensordict.batch_size
        shape = (*batch_size, self.planning_horizon, self._low.shape[0])
        cold = self._initial_mean.expand(shape)
        plan = tensordict.get(self.plan_key, None) if self.warm_start else None
        if plan is None:
            return cold, torch.zeros(batch_size, dtype=torch.bool, device=cold.device)
        self._check(f"plan {self.plan_key!r}", plan, shape)
        plan = plan.to(cold.dtype)
        is_warm = plan.isfinite().all(-1).all(-1)
        is_init = tensordict.get(self.is_init_key, None)
        if is_init is not None:
            self._check(f"entry {self.is_init_key!r}", is_init, (*batch_size, 1))
            is_warm = is_warm & ~is_init.squeeze(-1).bool()
        warm = torch.cat([plan[..., 1:, :], cold[..., :1, :]], -2).clamp(self._low, self._high)
        return torch.where(is_warm[..., None, None], warm, cold), is_warm

    def _check(self, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if value.shape != torch.Size(shape):
            raise ValueError(f"The {name} must have shape {shape}, got {tuple(value.shape)}.")
        if value.device != self._low.device:
            raise ValueError(
                f"The {name} is on {value.device}, but {type(self).__name__} on {self._low.device}."
            )

    def _repeat(self, state: TensorDictBase, num_candidates: int) -> TensorDictBase:
        if callable(getattr(type(self.env), "repeat_state", None)):
            return self.env.repeat_state(state, num_candidates)
        return state.unsqueeze(-1).expand(*state.batch_size, num_candidates).clone()


def _bounds(spec: TensorSpec, planner: str) -> tuple[Tensor, Tensor]:
    """Lowest and highest action ``[A]``."""
    if spec.domain != "continuous" or not spec.dtype.is_floating_point:
        raise TypeError(
            f"{planner} samples continuous actions; discrete actions are not supported yet by this "
            f"planner, got {type(spec).__name__} of dtype {spec.dtype}."
        )
    if spec.ndim != 1 or spec.shape[0] < 1:
        raise ValueError(
            f"{planner} needs an action vector of shape [A], got shape {tuple(spec.shape)}."
        )
    return spec.space.low.clone(), spec.space.high.clone()
