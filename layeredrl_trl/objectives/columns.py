"""What the loss computes with: plain tensors by name, read from TensorDicts once.

A learning step asks for some fifty entries. Asking a tuple for them costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import NamedTuple, TypeVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor

from layeredrl_trl import keys
from layeredrl_trl.objectives.slices import SliceKeys, check_keys, per_step, read_reward

Columns = TypeVar("Columns", bound="tuple[Tensor | None, ...]")


class SliceParts(NamedTuple):
    """What value targets of the first ``k`` steps of slices are made of; no network was asked yet.

    Attributes:
        observation: ``[B, k, *obs_shape]``.
        action: ``[B, k, A]``, or indices ``[B, k]``.
        reward: ``[B, k, 1]``.
        terminated: bool ``[B, k, 1]``.
        valid: whether the step counts, bool ``[B, k, 1]``.
        planned: bool ``[B, k, 1]``; ``None``: all are.
        partial_return: discounted sum of the rewards up to the bootstrap, float64 ``[B, k, 1]``; 0
            where the step does not count.
        discount: of the value behind them, float64 ``[B, k, 1]``.
        bootstraps: whether that value counts, bool ``[B, k, 1]``; not where the step does not.
        observation_behind: what is valued, ``[B, k, *obs_shape]``; ``None`` without a value.
        action_behind: for a Q-function, as ``action``.
        index: storage positions, ``[B, k]`` or ``[B, k, ndim]``; ``None`` if nobody asks.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    valid: Tensor
    planned: Tensor | None
    partial_return: Tensor
    discount: Tensor
    bootstraps: Tensor
    observation_behind: Tensor | None
    action_behind: Tensor | None
    index: Tensor | None = None


class Targets(NamedTuple):
    """What reward and value learn from.

    Attributes:
        latent: ``[B, k, D]``.
        context: ``[B, k, C]``.
        action: ``[B, k, A]``, or indices ``[B, k]``.
        reward: ``[B, k, 1]``; ``None`` where there is no reward to learn.
        terminated: bool ``[B, k, 1]``; ``None`` where it was not handed in.
        value_target: ``[B, k, 1]``; ``None`` where there is no value to learn.
        valid: whether the step counts, bool ``[B, k, 1]``.
        planned: bool ``[B, k, 1]``; ``None``: all are.
        index: as in :class:`SliceParts`.
    """

    latent: Tensor
    context: Tensor
    action: Tensor
    reward: Tensor | None
    terminated: Tensor | None
    value_target: Tensor | None
    valid: Tensor
    planned: Tensor | None
    index: Tensor | None = None

    @classmethod
    def read(
        cls,
        targets: TensorDictBase,
        encoded: list[NestedKey],
        names: SliceKeys,
        *,
        has_reward: bool,
        has_value: bool,
    ) -> Targets:
        """Take them from a TensorDict ``[B, k]``.

        Args:
            targets: what :meth:`to_tensordict` made.
            encoded: names of latent state and context.
            names: of the other entries.
            has_reward: whether a reward is needed.
            has_value: whether a value target is, and which steps were planned.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if a shape does not fit.
        """
        check_keys(targets, (*encoded, names.action))
        shape = targets.batch_size
        return cls(
            latent=targets.get(encoded[0]),
            context=targets.get(encoded[1]),
            action=targets.get(names.action),
            reward=read_reward(targets, names, shape) if has_reward else None,
            terminated=None,
            value_target=per_step(targets, keys.VALUE_TARGET, shape) if has_value else None,
            valid=per_step(targets, names.mask, shape, flag=True),
            planned=per_step(targets, names.planned, shape, flag=True) if has_value else None,
        )

    def to_tensordict(self, encoded: list[NestedKey], names: SliceKeys) -> TensorDict:
        """Put them into a TensorDict ``[B, k]``, ``planned`` always."""
        entries = {
            encoded[0]: self.latent,
            encoded[1]: self.context,
            names.action: self.action,
            names.next_reward: self.reward,
            names.next_terminated: self.terminated,
            keys.VALUE_TARGET: self.value_target,
            names.mask: self.valid,
            names.planned: torch.ones_like(self.valid) if self.planned is None else self.planned,
            keys.INDEX: self.index,
        }
        return _as_tensordict(entries, self.valid.shape[:-1], self.valid.device)


class TransitionParts(NamedTuple):
    """Single transitions as they are stored; no network was asked yet.

    Attributes:
        observation: ``[N, *obs_shape]``.
        action: ``[N, A]``, or indices ``[N]``.
        next_observation: ``[N, *obs_shape]``.
        terminated: bool ``[N, 1]``.
        weight: ``[N, 1]`` or ``[N, E]``; ``None``: all weigh alike.
        index: storage positions, ``[N]`` or ``[N, ndim]``; ``None`` if they are not known.
    """

    observation: Tensor
    action: Tensor
    next_observation: Tensor
    terminated: Tensor
    weight: Tensor | None
    index: Tensor | None

    @classmethod
    def read(cls, transitions: TensorDictBase, names: SliceKeys) -> TransitionParts:
        """Take them from a TensorDict ``[N]``.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if ``terminated`` has another shape.
        """
        check_keys(transitions, (names.observation, names.action, names.next_observation))
        return cls(
            observation=transitions.get(names.observation),
            action=transitions.get(names.action),
            next_observation=transitions.get(names.next_observation),
            terminated=per_step(
                transitions, names.next_terminated, transitions.batch_size, flag=True
            ),
            weight=transitions.get(keys.WEIGHT, default=None),
            index=transitions.get(keys.INDEX, default=None),
        )


class Transitions(NamedTuple):
    """What the dynamics learn from.

    Attributes:
        latent: ``[N, D]``.
        context: ``[N, C]``.
        action: ``[N, A]``, or indices ``[N]``.
        next_latent: ``[N, D]``.
        terminated: bool ``[N, 1]``.
        weight: as in :class:`TransitionParts`.
        index: as in :class:`TransitionParts`.
        mask: bool ``[N, 1]``, False on padding; ``None``: there is none.
        observation: ``[N, *obs_shape]``; ``None`` if the encoder keeps no statistics of them.
        next_observation: likewise.
    """

    latent: Tensor
    context: Tensor
    action: Tensor
    next_latent: Tensor
    terminated: Tensor
    weight: Tensor | None = None
    index: Tensor | None = None
    mask: Tensor | None = None
    observation: Tensor | None = None
    next_observation: Tensor | None = None

    @classmethod
    def read(
        cls, transitions: TensorDictBase, encoded: list[NestedKey], names: SliceKeys
    ) -> Transitions:
        """Take them from a TensorDict ``[N]``.

        Args:
            transitions: what :meth:`to_tensordict` made.
            encoded: names of latent state and context.
            names: of the other entries.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if ``terminated`` has another shape.
        """
        needed = (*encoded, names.action, _next(encoded[0]))
        terminated = per_step(transitions, names.next_terminated, transitions.batch_size, flag=True)
        check_keys(transitions, needed)
        optional = [keys.WEIGHT, keys.INDEX, keys.MASK]
        if names.observation != encoded[0]:
            optional += [names.observation, names.next_observation]
        return cls(
            *(transitions.get(key) for key in needed),
            terminated,
            *(transitions.get(key, default=None) for key in optional),
        )

    def weights(self) -> TensorDict:
        """Put what says how much each counts into a TensorDict ``[N]``."""
        entries = {keys.WEIGHT: self.weight, keys.INDEX: self.index, keys.MASK: self.mask}
        return _as_tensordict(entries, self.latent.shape[:-1])

    def to_tensordict(self, encoded: list[NestedKey], names: SliceKeys) -> TensorDict:
        """Put them into a TensorDict ``[N]``; those that are ``None`` are left out."""
        entries = {
            names.observation: self.observation,
            names.next_observation: self.next_observation,
            encoded[0]: self.latent,  # behind the observation: it may be called the same
            encoded[1]: self.context,
            names.action: self.action,
            _next(encoded[0]): self.next_latent,
            names.next_terminated: self.terminated,
            keys.WEIGHT: self.weight,
            keys.INDEX: self.index,
            keys.MASK: self.mask,
        }
        return _as_tensordict(entries, self.latent.shape[:-1], self.latent.device)


def split(columns: Columns, n: int) -> Iterator[Columns]:
    """Cut columns into ``n`` pieces of as many rows each.

    Args:
        columns: tensors ``[n * B, ...]``, or ``None``.
        n: number of pieces.
    """
    # contiguous: steps are compiled and recorded for the strides that they get
    whole = [None if x is None else x.contiguous() for x in columns]
    if n == 1:
        return iter((type(columns)._make(whole),))
    pieces = (repeat(None, n) if x is None else x.unflatten(0, (n, -1)).unbind(0) for x in whole)
    return map(type(columns)._make, zip(*pieces, strict=True))


def _as_tensordict(
    entries: Mapping[NestedKey, Tensor | None],
    batch_size: torch.Size,
    device: torch.device | None = None,
) -> TensorDict:
    """Make a TensorDict of those entries that are there."""
    there = {key: x for key, x in entries.items() if x is not None}
    return TensorDict(there, batch_size=batch_size, device=device)


def _next(key: NestedKey) -> NestedKey:
    return unravel_key(("next", key))
