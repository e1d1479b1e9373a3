"""What planners share: rounds of drawing, scoring, weighing and fitting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import exploration_type

from layeredrl_trl import keys
from layeredrl_trl.acceleration import GraphReplay
from layeredrl_trl.checks import check_counts, check_flag, check_key
from layeredrl_trl.functional import return_spread
from layeredrl_trl.planners.scoring import CandidateReturn, base_env
from layeredrl_trl.planners.search_steps import SearchSteps
from layeredrl_trl.signatures import OwnSignature

ReturnAction = Literal["mean", "best", "sample"]


class SamplingPlanner(SearchSteps):
    """Plan by trying candidate action sequences in a model-based environment; a policy.

    A search has a *belief*, a distribution over action sequences. It starts from an initial plan;
    in each round candidates are drawn from it, scored and weighed, and it is fitted to them.

    A subclass says what the distribution is and how candidates are weighed: it brings
    :meth:`register_space`, :meth:`start`, :meth:`draw`, :meth:`weigh`, :meth:`fit`,
    :meth:`most_likely` and :meth:`width`, and may bring :meth:`sample_sequence`, :meth:`carry_on`
    and :meth:`to_actions`. Their shapes: ``[*B]`` are the environments, ``W`` is the width of a
    plan's step, and ``S`` that of a candidate's step, whatever :meth:`to_actions` takes; by default
    all are ``A``. To change no more than the weights, start from a planner that there is, such as
    :class:`~layeredrl_trl.planners.GaussianPlanner`.

    The initial plan knows nothing (mid-range, even odds) at a cold start: without ``warm_start``,
    where no plan is found, where a value of the plan found is not finite, and where ``is_init`` is
    True. Otherwise it is the plan found, moved on by one step, with a last step that knows nothing.
    How candidates are scored at termination, truncation and the horizon: see
    :class:`~layeredrl_trl.planners.CandidateReturn`. A candidate whose return is not finite counts
    for nothing; where a round has no others, the belief stays as it is and the return of the round
    is ``-inf``.

    All candidates of a round are imagined under the same random numbers, if the model can do so
    (see :class:`~layeredrl_trl.planners.CandidateReturn`), so that their returns differ by what
    they do and not by luck; environments and particles draw independently. With
    ``return_action="best"``, which compares candidates of all rounds, the numbers are those of the
    first round throughout; else every round draws its own, so that the belief is not fitted to a
    single draw.

    A model of your own plans faster if its class brings ``imagine(tensordict,
    actions)``, see there.

    The planner has no state of its own: it writes its plan under ``"next"``, and the environment
    carries it to the next step if it has the transform of :meth:`make_tensordict_primer`. Without
    that, TorchRL's ``rollout`` and ``Collector`` drop the plan after each step: everything works,
    but every start is cold. Other entries of the tensordict are neither read nor changed.

    Args:
        env (EnvBase): the model. Must accept any batch size (``batch_locked=False``) and have one
            action.
        planning_horizon, optim_steps, num_candidates (int): steps H of a plan, rounds of drawing
            and fitting, candidates N per environment and round; each at least 1.
        return_action ("mean", "best" or "sample"): the action is the first of the most likely
            sequence, of the best candidate of all rounds, or of a sequence drawn from the final
            belief (for exploration). ``plan_return`` is the best return for ``"best"``, else the
            mean return of the last round's candidates, as they were weighed.
        warm_start (bool): start from the previous plan.
        callback (callable, optional): called in every round with a TensorDict ``[*B, N]`` that
            holds copies: ``action`` ``[*B, N, H, A]``, ``return`` ``[*B, N, 1]`` (``-inf`` where
            it is not finite) and ``round``, an int from 0.
        cudagraphs (bool): replay a whole plan on CUDA, without Python in between, if there is no
            callback: see :class:`~layeredrl_trl.acceleration.GraphReplay`. Not yet run on a GPU.
        action_key (NestedKey, optional): where the action is written. Default: the environment's.
        plan_key (NestedKey): the plan. Read here, written under ``"next"``.
        plan_return_key, plan_spread_key, plan_std_key (NestedKey): what the planner expects its
            plan to return; standard deviation of the last round's finite returns, 0 without any;
            what is left of the belief's initial width, 1 for all of it.
        is_init_key (NestedKey): True at the first step of an episode.
        **scoring: ``gamma``, ``terminal_value``, ``terminal_penalty``, ``disagreement`` and keys
            of :class:`~layeredrl_trl.planners.CandidateReturn`.

    Reads:
        the state keys; ``plan`` ``[..., H, A]`` and ``is_init`` ``[..., 1]`` if they are there
        and ``warm_start`` is True.

    Writes:
        ``action`` ``[..., A]``, ``("next", "plan")`` ``[..., H, A]``, and ``plan_return``,
        ``plan_spread``, ``plan_std`` ``[..., 1]``.

    Raises:
        TypeError: if the action is of a kind that the planner cannot plan, ``callback`` is not
            callable, ``env`` is no ``EnvBase``, a number of steps or candidates no integer, a flag
            no bool, a key no key, or an option is missing or unknown.
        ValueError: if an action has a shape that does not fit, a number is out of range or
            ``return_action`` unknown, and what :class:`~layeredrl_trl.planners.CandidateReturn`
            raises; when planning, if an entry has a wrong shape or device.
        KeyError: when planning, if a state key is missing.
    """

    __signature__ = OwnSignature(CandidateReturn)

    def __init__(
        self,
        env: EnvBase,
        *,
        planning_horizon: int,
        optim_steps: int,
        num_candidates: int,
        return_action: ReturnAction = "mean",
        warm_start: bool = True,
        callback: Callable[[TensorDictBase], Any] | None = None,
        cudagraphs: bool = False,
        action_key: NestedKey | None = None,
        plan_key: NestedKey = "plan",
        plan_return_key: NestedKey = "plan_return",
        plan_spread_key: NestedKey = "plan_spread",
        plan_std_key: NestedKey = "plan_std",
        is_init_key: NestedKey = keys.IS_INIT,
        **scoring,
    ) -> None:
        check_counts(
            planning_horizon=planning_horizon,
            optim_steps=optim_steps,
            num_candidates=num_candidates,
        )
        check_flag("warm_start", warm_start)
        check_flag("cudagraphs", cudagraphs)
        keys_by_name = {
            "plan_key": plan_key,
            "plan_return_key": plan_return_key,
            "plan_spread_key": plan_spread_key,
            "plan_std_key": plan_std_key,
            "is_init_key": is_init_key,
        }
        if action_key is not None:
            keys_by_name["action_key"] = action_key
        for name, key in keys_by_name.items():
            check_key(name, key)
        if return_action not in get_args(ReturnAction):
            raise ValueError(
                f"return_action must be 'mean', 'best' or 'sample', got {return_action!r}."
            )
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}.")
        score = CandidateReturn(env, **scoring)

        super().__init__(warm_start, plan_key, is_init_key)
        self.score = score
        self.planning_horizon = planning_horizon
        self.optim_steps = optim_steps
        self.num_candidates = num_candidates
        self.return_action = return_action
        self.callback = callback
        self._replay = None
        if cudagraphs:
            self._replay = GraphReplay(self._search, [self], also=exploration_type)
        self.action_key = unravel_key(action_key or score.action_key)
        self.plan_return_key = unravel_key(plan_return_key)
        self.plan_spread_key = unravel_key(plan_spread_key)
        self.plan_std_key = unravel_key(plan_std_key)

        spec = env.full_action_spec_unbatched[score.action_key]
        self._action_shape = spec.shape
        step = self.register_space(spec)
        if step.ndim != 1:
            raise ValueError(
                f"{type(self).__name__}.register_space must return a step [W], got shape "
                f"{list(step.shape)}."
            )
        self.register_buffer("cold_step", step, persistent=False)
        self.in_keys = list(score.state_shapes)
        self.out_keys = [self.action_key]
        self.register_carried(self.plan_key, (planning_horizon, *self.cold_step.shape))
        if warm_start:
            self.in_keys.append(self.is_init_key)
        self.out_keys += self.statistics_keys

    @property
    def env(self) -> EnvBase:
        """The environment that is planned in."""
        return self.score.env

    @property
    def gamma(self) -> float:
        """Discount per step."""
        return self.score.gamma

    @property
    def statistics_keys(self) -> tuple[NestedKey, ...]:
        """Entries ``[..., 1]`` that say what the planner thinks of its plan."""
        return self.plan_return_key, self.plan_spread_key, self.plan_std_key

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Plan for every environment of the batch; see the class for what is read and written."""
        state, carried = self._state(tensordict), self._carried(tensordict)
        given = dict(state.items(True, True)), carried, (state.batch_size, state.device)
        search = self._search if self._replay is None or self.callback else self._replay
        for key, x in search(*given).items():
            tensordict.set(key, x)
        return tensordict

    def _search(
        self,
        state: dict[NestedKey, Tensor],
        carried: dict[NestedKey, Tensor],
        batch: tuple[Sequence[int], torch.device | None],
    ) -> dict[NestedKey, Tensor]:
        """All that :meth:`forward` writes, from all that it reads."""
        state = TensorDict(state, *batch)
        belief = self.start(carried)
        # A later round may have fewer candidates: any first few are spread evenly over members.
        candidates = self._repeat(state, self.num_candidates)
        score = self.score.scorer(candidates, same_numbers=self.return_action == "best")
        best = self._most_likely(belief, carried[self.plan_key].shape[:-1])
        best_return = torch.full((), -torch.inf, device=best.device)
        for number in range(self.optim_steps):
            samples = self._draw(belief, number, best.shape)
            actions = self._actions(samples)
            returns = score(actions)
            if self.callback is not None:
                seen = TensorDict({"action": actions, "return": returns}, returns.shape[:-1])
                self.callback(seen.clone().set_non_tensor("round", number))
            index, weights = self._weigh(returns)
            chosen, chosen_returns = samples, returns
            if index is not None:
                chosen = samples.take_along_dim(index.unsqueeze(-1), -3)
                chosen_returns = returns.take_along_dim(index, -2)
            if self.return_action == "best":
                top, at = returns.max(-2, keepdim=True)
                top, candidate = top.squeeze(-2), samples.take_along_dim(at.unsqueeze(-1), -3)
                best = torch.where((top > best_return).unsqueeze(-1), candidate.squeeze(-3), best)
                best_return = top.maximum(best_return)
            belief = self.fit(belief, chosen, weights)

        if self.return_action == "best":
            sequence, plan_return = best, best_return
        else:
            mean = (weights * torch.where(weights > 0, chosen_returns, 0.0)).sum(-2)
            plan_return = torch.where(weights.sum(-2) > 0, mean, -torch.inf)
            sequence = self._most_likely(belief, best.shape[:-1])
        carried = self._carry_on(belief, sequence)
        if self.return_action == "sample":
            drawn = self.sample_sequence(belief, chosen, weights)
            sequence = self._checked("sample_sequence", drawn, sequence.shape)
        return {
            self.action_key: self._actions(sequence[..., 0, :]).clone(),
            **{unravel_key(("next", key)): value for key, value in carried.items()},
            self.plan_return_key: plan_return,
            self.plan_spread_key: return_spread(returns),
            self.plan_std_key: self._checked("width", self.width(belief), plan_return.shape),
        }

    def planning(self, td: TensorDictBase) -> Tensor:
        """Plan, and return the action ``[..., A]`` only; ``td`` is not modified.

        This is what TorchRL's ``MPCPlannerBase`` calls planning.
        """
        return self.forward(td.copy()).get(self.action_key)

    @torch.no_grad()
    def candidate_return(self, tensordict: TensorDictBase, actions: Tensor) -> Tensor:
        """Score action sequences as the planner does.

        Args:
            tensordict (TensorDictBase): holds the state keys, batch ``[*B]``. Not modified.
            actions (Tensor): action sequences ``[*B, N, H, A]``, any N and H, taken as they are;
                indices ``[*B, N, H]`` for a categorical spec without dims.

        Returns:
            returns ``[*B, N, 1]``, ``-inf`` where they are not finite.

        Raises:
            ValueError: if ``actions`` has another shape.
        """
        batch_size, ndim = tensordict.batch_size, tensordict.ndim
        sizes = actions.shape[ndim : ndim + 2]
        if len(sizes) < 2 or actions.shape != (*batch_size, *sizes, *self._action_shape):
            trailing = ", ".join(["N", "H", *map(str, self._action_shape)])
            raise ValueError(
                f"actions must have shape [*{list(batch_size)}, {trailing}], "
                f"got {list(actions.shape)}."
            )
        return self.score(self._repeat(self._state(tensordict), actions.shape[ndim]), actions)

    def _repeat(self, state: TensorDictBase, num_candidates: int) -> TensorDictBase:
        env = base_env(self.env)  # transforms change nothing about copies
        if callable(getattr(type(env), "repeat_state", None)):
            return env.repeat_state(state, num_candidates)
        return state.unsqueeze(-1).expand(*state.batch_size, num_candidates).clone()

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
