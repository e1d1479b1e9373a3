"""What candidate action sequences return in a model-based environment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from numbers import Real

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs import EnvBase, TransformedEnv

from layeredrl_trl import keys
from layeredrl_trl.acceleration import promised
from layeredrl_trl.checks import check_finite, check_key, check_keys
from layeredrl_trl.functional import disagreement as member_disagreement
from layeredrl_trl.functional import zero_if_dead
from layeredrl_trl.modules.outputs import in_dtype_of

_Steps = TensorDictBase | dict[NestedKey, Tensor]


class CandidateReturn(nn.Module):
    """Imagine candidate action sequences and add up what they earn.

    The return of a candidate is ``sum_{t<H} gamma^t (r_t + w d_t - p q_t) + gamma^H V(s_H)``, where
    ``d_t`` is how much the members of an ensemble disagree about the step, ``q_t`` the probability
    that the episode terminates in it, and ``w`` and ``p`` are 0 by default.

    Edge rules: rewards after the first ``done`` do not count; a hard termination stops the
    bootstrap, a truncation bootstraps from the state it happened in (with the discount of that
    step). Where the state holds ``alive`` (soft termination), rewards are taken as already weighted
    by it, the bootstrap is the mean over particles of ``alive * V``, ``d_t`` is weighted by the
    mean of ``alive`` before the step, and ``q_t`` is what that mean loses in the step; else ``q_t``
    is 1 at the step that terminates, and 0 at one that is truncated. What is not finite of a dead
    particle (``alive`` 0) counts as 0; otherwise a return that is not finite counts as ``-inf``.

    Rewards and values of half precision are summed in float32.

    The environment is stepped open-loop by ``env.step`` and ``env.step_mdp`` or, where its class
    itself defines ``imagine(tensordict, actions)``, by that. It is never reset, and nothing is read
    back to the host. An ``imagine`` of an environment under transforms is not used: it would skip
    them.

    The last batch dim of the candidates is that of the candidates of one environment: they are
    imagined under common random numbers if the class of the environment, beneath all transforms,
    has ``common_random_numbers(n, tape)``, as :class:`~layeredrl_trl.envs.PredictorEnv` does: a
    context in which every ``n`` consecutive environments of the flattened batch share random
    numbers, and take those of the list ``tape`` again if it is not ``None``.

    Args:
        env (EnvBase): the model; must accept any batch size (``batch_locked=False``).
        gamma (float, optional): discount per step, in [0, 1]. Default: the attribute ``gamma`` of
            the environment beneath all transforms, which ``RewardPredictor.env`` sets to the
            discount of its value. Without that it is 1, and required with ``terminal_value``.
        terminal_value (TensorDictModuleBase, optional): what comes after the last step is worth,
            from the last state (``latent``, ``context``) to ``state_value`` ``[..., 1]``. It must
            not read the action: make a state value of a Q-function by
            :class:`~layeredrl_trl.modules.PolicyValue` or
            :class:`~layeredrl_trl.modules.BestActionValue`. Applied per particle where the state
            holds ``alive``.
        terminal_penalty, disagreement (float): ``p``, in units of the reward, and ``w``, in units
            of the reward per unit of the latent. ``w`` above 0 is a bonus for what the model does
            not know, below 0 a penalty. ``d_t = sqrt(mean_d v_d)`` of the variance ``v`` that the
            environment writes.
        reward_key (NestedKey, optional): where the reward of a step is found. Default: ``"next"``
            and the environment's reward key.
        state_keys (sequence of NestedKey, optional): what a step of the environment reads.
            Default: the keys of ``env.state_spec`` or, if that is empty, of
            ``env.observation_spec``.
        value_key, alive_key, epistemic_var_key (NestedKey): the entry that ``terminal_value``
            writes; the probability that a particle is alive, ``[..., E, P, 1]``; the variance over
            members, ``[..., D]``.

    Raises:
        TypeError: if ``env`` is no ``EnvBase``, ``terminal_value`` no ``TensorDictModule``, a
            weight or ``gamma`` no number, a key no key, or there is a ``terminal_value`` without
            ``gamma``.
        ValueError: if ``env`` is batch-locked or has several actions, ``gamma`` is out of range,
            ``terminal_penalty`` or ``disagreement`` is not finite, ``terminal_value`` reads the
            action or what the environment gives of one of several particles, or does not write
            ``value_key``, or ``disagreement`` is not 0 and ``env`` does not write
            ``epistemic_var_key``.
        KeyError: if ``terminal_value`` reads what the environment does not have.
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        gamma: float | None = None,
        terminal_value: TensorDictModuleBase | None = None,
        terminal_penalty: float = 0.0,
        disagreement: float = 0.0,
        reward_key: NestedKey | None = None,
        state_keys: list[NestedKey] | None = None,
        value_key: NestedKey = keys.STATE_VALUE,
        alive_key: NestedKey = keys.ALIVE,
        epistemic_var_key: NestedKey = keys.EPISTEMIC_VAR,
    ) -> None:
        if not isinstance(env, EnvBase):
            raise TypeError(f"A planner needs a torchrl EnvBase, got {type(env).__name__}.")
        if env.batch_locked:
            raise ValueError(
                "A planner steps all candidates at once and needs an environment that accepts any "
                f"batch size, but {type(env).__name__} is batch-locked (batch size "
                f"{tuple(env.batch_size)})."
            )
        if len(env.action_keys) != 1:
            raise ValueError(
                f"A planner plans one action, but {type(env).__name__} has {env.action_keys}."
            )
        gamma = _discount(gamma, env)
        if gamma is None and terminal_value is not None:
            raise TypeError(
                "A planner with a terminal_value needs gamma, the discount that the value was "
                "learned with. An env made by RewardPredictor.env brings it along."
            )
        gamma = 1.0 if gamma is None else gamma
        check_finite("gamma", gamma)
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}.")
        keys_by_name = {
            "value_key": value_key,
            "alive_key": alive_key,
            "epistemic_var_key": epistemic_var_key,
        }
        if reward_key is not None:
            keys_by_name["reward_key"] = reward_key
        for name, key in keys_by_name.items():
            check_key(name, key)
        if state_keys is not None:
            check_keys("state_keys", state_keys)
        check_finite("terminal_penalty", terminal_penalty)
        check_finite("disagreement", disagreement)
        super().__init__()
        self.env = env
        self.gamma = gamma
        self.terminal_penalty = terminal_penalty
        self.disagreement = disagreement
        self.action_key = unravel_key(env.action_keys[0])
        self.reward_key = unravel_key(reward_key or ("next", env.reward_keys[0]))
        self.value_key = unravel_key(value_key)
        self.alive_key = unravel_key(("next", alive_key))
        self.first_alive_key = unravel_key(alive_key)
        self.epistemic_var_key = unravel_key(("next", epistemic_var_key))
        self.done_key = _outermost(env.done_keys, keys.DONE)
        self.terminated_key = _outermost(env.done_keys, keys.TERMINATED)

        shapes = {}
        for spec in (env.full_observation_spec_unbatched, env.full_state_spec_unbatched):
            shapes |= {unravel_key(key): spec[key].shape for key in spec.keys(True, True)}
        state_keys = state_keys or list(spec.keys(True, True)) or list(shapes)
        self.state_shapes = {unravel_key(k): shapes.get(unravel_key(k)) for k in state_keys}
        known = {*shapes, *self.state_shapes}
        self._has_alive = self.first_alive_key in known
        if disagreement and unravel_key(epistemic_var_key) not in known:
            raise ValueError(
                f"disagreement={disagreement} needs the entry {epistemic_var_key!r}, but "
                f"{type(env).__name__} writes {sorted(map(str, known))}. A PredictorEnv writes it "
                "with uncertainty=True."
            )
        self._read = {self.reward_key, self.alive_key, self.done_key, self.terminated_key}
        if terminal_value is not None:
            self._check_terminal_value(terminal_value, known)
            self._read |= {unravel_key(("next", key)) for key in terminal_value.in_keys}
        self.terminal_value = terminal_value

    def forward(self, candidates: TensorDictBase, actions: Tensor) -> Tensor:
        """Score one action sequence per state of the batch ``[...]``, which is not modified.

        The ``actions`` are ``[..., H, A]``, indices ``[..., H]`` for a categorical spec. Returns
        are ``[..., 1]``, ``-inf`` where they are not finite.

        Raises:
            ValueError: if reward, flags, ``alive`` or the variance of a step, or what
                ``terminal_value`` writes, has another shape than ``[..., H, 1]``,
                ``[..., H, E, P, 1]``, ``[..., H, D]`` or ``[..., 1]``.
        """
        return self.scorer(candidates)(actions)

    def scorer(
        self, candidates: TensorDictBase, *, same_numbers: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Prepare to score several rounds of sequences, between which the model does not change.

        Returns a function of actions ``[..., H, A]`` that does what :meth:`forward` does. If there
        are fewer of them than candidates, it scores them from the first ones. With
        ``same_numbers``, all rounds are imagined under the random numbers of the first one, else
        each under its own.
        """
        imaginer = promised(self.env, "imaginer")
        imagine = partial(self._imagine, candidates)
        if imaginer is not None:  # variances may cost as much as all the rest
            asked = {self.epistemic_var_key} if self.disagreement else set()
            imagine = imaginer(candidates, self._read | asked)

        tape = [] if same_numbers else None

        def score(actions: Tensor) -> Tensor:
            with self._common_random_numbers(actions.shape[: candidates.ndim], tape):
                steps = imagine(actions)
            self._check_steps(candidates, actions, steps)
            return self._add_up(candidates, steps)

        return score

    def _common_random_numbers(
        self, batch: torch.Size, tape: list[Tensor] | None
    ) -> AbstractContextManager[None]:
        """Let all candidates of an env, the last dim of ``batch``, share random numbers."""
        env = base_env(self.env)
        if not batch or not callable(getattr(type(env), "common_random_numbers", None)):
            return nullcontext()
        return env.common_random_numbers(batch[-1], tape)

    def _add_up(self, candidates: TensorDictBase, steps: _Steps) -> Tensor:
        """Returns ``[..., 1]`` of imagined steps ``[..., H]``."""
        reward = self._rewards(candidates, steps)
        done = steps.get(self.done_key, None)
        running = None if done is None else done.cumsum(-2) <= done
        if running is not None:
            reward = torch.where(running, reward, 0.0)
        step = torch.arange(reward.shape[-2], dtype=reward.dtype, device=reward.device)
        total = (self.gamma ** step.unsqueeze(-1) * reward).sum(-2)
        if self.terminal_value is not None:
            running = torch.ones_like(reward, dtype=torch.bool) if running is None else running
            length = running.sum(-2)
            value = self._bootstrap(self.terminal_value, candidates, steps, length - 1)
            total = total + self.gamma ** length.to(value.dtype) * value
        return total.nan_to_num(-torch.inf, -torch.inf, -torch.inf)

    def _check_steps(self, candidates: TensorDictBase, actions: Tensor, steps: _Steps) -> None:
        """Check the shapes of entries that would broadcast if they had others."""
        ndim = candidates.ndim
        batch = actions.shape[: ndim + 1]
        expected: dict[NestedKey, tuple[int | None, ...]] = {
            key: (*batch, 1) for key in (self.reward_key, self.done_key, self.terminated_key)
        }
        expected[self.epistemic_var_key] = (*batch, None)
        first = candidates.get(self.first_alive_key, None)
        if first is not None:
            expected[self.alive_key] = (*batch, *first.shape[ndim:])
        for key, shape in expected.items():
            x = steps.get(key, None)
            if x is not None and not _fits(x.shape, shape):
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                raise ValueError(
                    f"The entry {key!r} of {type(self.env).__name__} must have shape [{wanted}], "
                    f"got {list(x.shape)}."
                )

    def _imagine(self, candidates: TensorDictBase, actions: Tensor) -> TensorDictBase:
        """Step through the actions: batch ``[...]`` to ``[..., H]``."""
        batch = actions.shape[: candidates.ndim]
        if candidates.batch_size != batch:
            candidates = candidates[..., : batch[-1]]
        imagine = promised(self.env, "imagine")
        if imagine is not None:
            return imagine(candidates, actions)
        # Not env.rollout: it resets finished candidates, which draws random numbers and syncs.
        tensordict = candidates.copy()
        steps = []
        for action in actions.unbind(candidates.ndim):
            tensordict.set(self.action_key, action)
            tensordict = self.env.step(tensordict)
            steps.append(tensordict.select("next"))
            # The state only: ModelBasedEnvBase takes a stale `done` of the input for the step's.
            tensordict = self.env.step_mdp(tensordict).select(*self.state_shapes)
        return torch.stack(steps, -1)  # pyright: ignore[reportReturnType]

    def _rewards(self, candidates: TensorDictBase, steps: _Steps) -> Tensor:
        """The reward of each step ``[..., H, 1]`` with disagreement and termination in it."""
        reward = _at_least_float32(steps[self.reward_key])
        if not self.disagreement and not self.terminal_penalty:
            return reward
        alive = None
        if self._has_alive:  # of the whole state, from before the first step on: [..., H + 1, 1]
            time = candidates.ndim
            first = _first(candidates, self.first_alive_key, reward.shape[:time])
            alive = torch.cat([first.unsqueeze(time), steps.get(self.alive_key)], time)
            alive = alive.flatten(time + 1).mean(-1, keepdim=True)
        if self.disagreement:
            distance = member_disagreement(steps.get(self.epistemic_var_key))
            if alive is not None:
                before = alive[..., :-1, :]
                distance = before * zero_if_dead(before, distance)
            reward = reward + self.disagreement * distance
        if self.terminal_penalty:
            ends = steps.get(self.terminated_key, None)
            if alive is not None:
                ends = alive[..., :-1, :] - alive[..., 1:, :]
            if ends is not None:
                reward = reward - self.terminal_penalty * ends
        return reward

    def _bootstrap(
        self, module: TensorDictModuleBase, candidates: TensorDictBase, steps: _Steps, last: Tensor
    ) -> Tensor:
        """Value ``[..., 1]``, by a module, of the state after step number ``last`` ``[..., 1]``."""
        time = candidates.ndim
        batch = last.shape[:time]

        def at_last(key: NestedKey) -> Tensor | None:
            value = steps.get(key, None)
            if value is None:
                return None
            index = last.reshape(*last.shape, *[1] * (value.ndim - last.ndim))
            return value.take_along_dim(index, time).squeeze(time)

        alive = at_last(self.alive_key)
        batch_size = batch if alive is None else alive.shape[:-1]
        state = TensorDict({}, batch_size=batch_size, device=candidates.device)
        for key in module.in_keys:
            value = at_last(unravel_key(("next", key)))
            value = _first(candidates, key, batch) if value is None else value
            for _ in range(len(batch_size) + 1 - value.ndim):  # context: the same in all particles
                value = value.unsqueeze(time)
            (value,) = in_dtype_of(module, value)
            state.set(key, value.expand(*batch_size, *value.shape[len(batch_size) :]))
        value = module(state).get(self.value_key)
        if value is None or value.shape != (*batch_size, 1):
            got = "nothing" if value is None else f"shape {list(value.shape)}"
            raise ValueError(
                f"terminal_value must write {self.value_key!r} of shape {[*batch_size, 1]}, got "
                f"{got}."
            )
        value = _at_least_float32(value)
        if alive is not None:
            value = alive * zero_if_dead(alive, value)
        value = value.reshape(*batch, -1, 1).mean(-2)
        terminated = at_last(self.terminated_key)
        return value if terminated is None else torch.where(terminated, 0.0, value)

    def _check_terminal_value(
        self, terminal_value: TensorDictModuleBase, known: set[NestedKey]
    ) -> None:
        if not isinstance(terminal_value, TensorDictModuleBase):
            raise TypeError(
                "terminal_value must be a TensorDictModule with in_keys and out_keys, got "
                f"{type(terminal_value).__name__}."
            )
        in_keys = [unravel_key(key) for key in terminal_value.in_keys]
        out_keys = [unravel_key(key) for key in terminal_value.out_keys]
        if self.action_key in in_keys:
            raise ValueError(
                f"terminal_value must be a state value, but it reads {in_keys}: the last state of "
                "a plan has no action. Make it one of your Q-function by PolicyValue(q, policy) or "
                "BestActionValue(q, actions) of layeredrl_trl."
            )
        of_one_particle = getattr(base_env(self.env), "one_particle_keys", ())
        if partial := [key for key in in_keys if key in of_one_particle]:
            raise ValueError(
                f"terminal_value reads {partial}, which {type(self.env).__name__} gives of its "
                "first particle only. Give a value of the latent state, or carry one particle "
                "(num_particles=1)."
            )
        if self.value_key not in out_keys:
            raise ValueError(
                f"terminal_value must write {self.value_key!r} (value_key), it writes {out_keys}."
            )
        if missing := {*in_keys} - known:
            raise KeyError(
                f"terminal_value reads {sorted(map(str, missing))}, but the state of "
                f"{type(self.env).__name__} has {sorted(map(str, known))}."
            )

    def _apply(self, fn, recurse: bool = True):
        """Move the environment's specs along: they are no buffers."""
        before = self.env.device
        super()._apply(fn, recurse)
        if before is not None:
            device = fn(torch.empty(0, device=before)).device
            if device != before:
                self.env.to(device)
        return self


def _discount(gamma: float | None, env: EnvBase) -> float | None:
    """Return the given discount, else the one that the env brings along, if it does."""
    if gamma is not None:
        return gamma
    own = getattr(base_env(env), "gamma", None)
    return float(own) if isinstance(own, Real) else None


def _outermost(done_keys: list[NestedKey], name: str) -> NestedKey:
    """Where a step has the flag ``name``, if at all; TorchRL gives outer done groups precedence."""
    found = [unravel_key(("next", key)) for key in done_keys]
    return min((key for key in found if key[-1] == name), key=len, default=("next", name))


def _fits(shape: torch.Size, expected: tuple[int | None, ...]) -> bool:
    """Compare a shape with an expected one, in which ``None`` is any size."""
    return len(shape) == len(expected) and all(
        size is None or size == own for own, size in zip(shape, expected, strict=True)
    )


def _at_least_float32(x: Tensor) -> Tensor:
    """Cast to float32 what is less precise: sums of half-precision numbers lose their last ones."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _first(candidates: TensorDictBase, key: NestedKey, batch: torch.Size) -> Tensor:
    """An entry of the first candidates, as many as there are in ``batch``."""
    value = candidates.get(key)
    return value.narrow(len(batch) - 1, 0, batch[-1]) if batch else value


def base_env(env: EnvBase) -> EnvBase:
    """Return what is beneath all transforms."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env
