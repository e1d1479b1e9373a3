"""State values made of a Q-function, where an action must not be asked for.

A planner values the last state of a plan, which has no action. A Q-function gives it a value with
an action of a policy (:class:`PolicyValue`) or with the best of some actions
(:class:`BestActionValue`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Binary, Categorical, MultiCategorical, MultiOneHot, OneHot, TensorSpec

from layeredrl_trl import keys
from layeredrl_trl.checks import check_count, check_keys
from layeredrl_trl.modules.heads import LatentFunction, as_value_module, evaluate, reads_action
from layeredrl_trl.modules.outputs import as_float32, in_dtype_of

_IN_KEYS = (keys.LATENT, keys.CONTEXT, keys.ACTION)


class ActionValue(TensorDictModuleBase, ABC):
    """Base class: a state value made of a Q-function; a subclass says with which action.

    Args:
        q: the Q-function; a plain ``f(latent, context, action)`` is wrapped.
        in_keys: names of the latent state, the context and the action.
        out_keys: name of the value.
    """

    def __init__(
        self,
        q: nn.Module | Callable[..., Tensor],
        *,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
    ) -> None:
        name = type(self).__name__
        check_keys(f"{name}: in_keys", in_keys, 3)
        check_keys(f"{name}: out_keys", out_keys, 1)
        super().__init__()
        names = [unravel_key(key) for key in in_keys]
        q_module = as_value_module(q, names, argument=f"{name}: q")
        if q_module is None:
            raise TypeError(f"{name}: q must be a Q-function, got None.")
        self.action_key = names[2]
        if not reads_action(q_module, self.action_key):
            raise ValueError(
                f"{name}: q must be a Q-function, which reads {self.action_key!r}, but it reads "
                f"{q_module.in_keys}. A state value needs no {name}."
            )
        self.q = q_module
        self.in_keys = [key for key in map(unravel_key, q_module.in_keys) if key != names[2]]
        self.out_keys = list(out_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the value ``[..., 1]``.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if a shape does not fit.
        """
        missing = [key for key in self.in_keys if key not in tensordict.keys(True)]
        if missing:
            raise KeyError(
                f"{type(self).__name__} reads {missing}, but the TensorDict has only "
                f"{sorted(map(str, tensordict.keys(True, True)))}."
            )
        state = {key: tensordict.get(key) for key in self.in_keys}
        batch = next(iter(state.values())).shape[:-1]
        for key, x in state.items():
            if x.shape[:-1] != batch:
                raise ValueError(
                    f"{type(self).__name__}: expected entries of one leading shape, {list(batch)}, "
                    f"but {key!r} has the shape {list(x.shape)}."
                )
        return tensordict.set(self.out_keys[0], self._value(state, batch))

    @abstractmethod
    def _value(self, state: dict[NestedKey, Tensor], batch: torch.Size) -> Tensor:
        """Compute the value ``[*batch, 1]`` of a state ``[*batch, ...]``."""


class PolicyValue(ActionValue):
    """The value of a state with the action of a policy, ``V(s) = Q(s, pi(s))``.

    Args:
        q: the Q-function: a :class:`ValueNet` with ``action_dim``, a TensorDict module, or a plain
            ``f(latent, context, action)``, which is wrapped. Returns ``[..., 1]``.
        policy: writes the action; a plain ``f(latent, context)`` that returns it is wrapped. It is
            asked in its current mode and exploration type.
        in_keys: names of the latent state, the context and the action.
        out_keys: name of the value.

    Reads:
        what ``q`` and ``policy`` read but for the action: ``latent`` ``[..., D]``, ``context``
        ``[..., C]``, of any leading shape, such as that of particles.

    Writes:
        ``state_value`` ``[..., 1]``, and nothing else.

    Raises:
        TypeError: if ``q`` or ``policy`` is of an unknown kind.
        ValueError: if ``q`` reads no action or ``policy`` writes none; when called, if a shape does
            not fit.

    Example:
        >>> from layeredrl_trl.modules.heads import ValueNet
        >>> value = PolicyValue(ValueNet(3, 0, action_dim=2), lambda s, c: s[..., :2].tanh())
        >>> state = TensorDict(latent=torch.zeros(4, 3), context=torch.zeros(4, 0), batch_size=[4])
        >>> value(state)["state_value"].shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        q: nn.Module | Callable[..., Tensor],
        policy: nn.Module | Callable[..., Tensor],
        *,
        in_keys: Sequence[NestedKey] = _IN_KEYS,
        out_keys: Sequence[NestedKey] = (keys.STATE_VALUE,),
    ) -> None:
        super().__init__(q, in_keys=in_keys, out_keys=out_keys)
        if not isinstance(policy, TensorDictModuleBase):
            if not callable(policy):
                raise TypeError(
                    "PolicyValue: policy: expected a module or a function f(latent, context), got "
                    f"{policy!r} ({type(policy).__name__})."
                )
            policy = LatentFunction(policy, in_keys=[*in_keys[:2]], out_keys=[self.action_key])
        if self.action_key not in map(unravel_key, policy.out_keys):
            raise ValueError(
                f"PolicyValue: policy must write {self.action_key!r}, it writes {policy.out_keys}."
            )
        self.policy = policy
        read = map(unravel_key, policy.in_keys)
        self.in_keys += [key for key in read if key not in self.in_keys]

    def _value(self, state: dict[NestedKey, Tensor], batch: torch.Size) -> Tensor:
        if isinstance(self.policy, LatentFunction):
            action = self.policy.evaluate(state)
        else:
            own = dict(zip(state, in_dtype_of(self.policy, *state.values()), strict=True))
            action = self.policy(TensorDict(own, batch_size=batch)).get(self.action_key)
        if not isinstance(action, Tensor) or action.shape[: len(batch)] != batch:
            got = list(action.shape) if isinstance(action, Tensor) else type(action).__name__
            raise ValueError(
                f"PolicyValue: policy must return actions {[*batch, 'A']} or indices "
                f"{list(batch)}, got {got}."
            )
        return evaluate(self.q, state | {self.action_key: action})


class BestActionValue(ActionValue):
    """The value of a state with the best of some actions, ``V(s) = max_k Q(s, a_k)``.

    Args:
        q: as for :class:`PolicyValue`.
        actions: the actions ``[K, A]`` or indices ``[K]``; or a TorchRL spec of one env. Of a
            ``OneHot`` or ``Categorical`` one all actions are tried; of a continuous one
            ``num_samples``, spread evenly by a Sobol sequence. Nothing is random, so that the
            candidates and rounds of a plan are compared under the same actions.
        num_samples: ``K`` for a continuous spec.
        in_keys, out_keys: as for :class:`PolicyValue`.

    Reads:
        what ``q`` reads but for the action: ``latent`` ``[..., D]``, ``context`` ``[..., C]``, of
        any leading shape, such as that of particles.

    Writes:
        ``state_value`` ``[..., 1]``, and nothing else.

    Raises:
        TypeError: if ``q`` or ``actions`` is of an unknown kind, or ``num_samples`` no integer.
        ValueError: if ``q`` reads no action, there is no action, a spec is unbounded, of several
            envs or has masked actions, or ``num_samples`` is below 1; when called, if a shape does
            not fit.

    Example:
        >>> from torchrl.data import Bounded
        >>> from layeredrl_trl.modules.heads import ValueNet
        >>> q = ValueNet(3, 0, action_dim=2)
        >>> value = BestActionValue(q, Bounded(-1.0, 1.0, (2,)), num_samples=16)
        >>> state = TensorDict(latent=torch.zeros(4, 3), context=torch.zeros(4, 0), batch_size=[4])
        >>> value(state)["state_value"].shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        q: nn.Module | Callable[..., Tensor],
        actions: Tensor | TensorSpec,
        *,
        num_samples: int = 32,
        in_keys: Sequence[NestedKey] = _IN_KEYS,
        out_keys: Sequence[NestedKey] = (keys.STATE_VALUE,),
    ) -> None:
        super().__init__(q, in_keys=in_keys, out_keys=out_keys)
        check_count("BestActionValue: num_samples", num_samples)
        self.num_samples = num_samples
        tried = as_float32(_actions(actions, num_samples))
        self.register_buffer("_actions", tried, persistent=False)

    def _value(self, state: dict[NestedKey, Tensor], batch: torch.Size) -> Tensor:
        actions = self._actions
        each = {
            key: x.unsqueeze(-2).expand(*batch, len(actions), x.shape[-1])
            for key, x in state.items()
        }
        each[self.action_key] = actions.expand(*batch, *actions.shape)
        return evaluate(self.q, each).amax(-2)


def _actions(actions: Tensor | TensorSpec, num_samples: int) -> Tensor:
    """Return the actions to try ``[K, ...]``."""
    if isinstance(actions, Tensor):
        if actions.ndim not in (1, 2) or not actions.numel():
            raise ValueError(
                "BestActionValue: actions must be [K, A] or indices [K], at least one, got shape "
                f"{list(actions.shape)}."
            )
        return actions
    several = isinstance(actions, Binary | MultiCategorical | MultiOneHot)
    if not isinstance(actions, TensorSpec) or several:
        raise TypeError(
            "BestActionValue: actions: expected a tensor, or a OneHot, Categorical or bounded "
            f"continuous spec, got {type(actions).__name__}."
        )
    if isinstance(actions, OneHot | Categorical):
        n = actions.space.n
        expected = [(n,)] if isinstance(actions, OneHot) else [(), (1,)]
        if tuple(actions.shape) not in expected or actions.mask is not None:
            raise ValueError(
                f"BestActionValue: actions must be a spec of one env, without masked actions, got "
                f"{actions}."
            )
        index = torch.arange(n, device=actions.device)
        if isinstance(actions, OneHot):
            return torch.nn.functional.one_hot(index, n)
        return index.reshape(n, *actions.shape)
    if actions.domain != "continuous" or actions.ndim != 1:
        raise ValueError(
            f"BestActionValue: actions must be a spec of one vector of one env, got {actions}."
        )
    low, high = actions.space.low, actions.space.high
    if not (high - low).isfinite().all():
        raise ValueError(f"BestActionValue: actions must be bounded, got {actions}.")
    share = torch.quasirandom.SobolEngine(low.shape[0]).draw(num_samples).to(low)
    return low + (high - low) * share
