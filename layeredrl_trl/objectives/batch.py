"""The one kind of batch that learning works on: slices of consecutive steps, as plain tensors.

A transition is a slice of one step. Entries are read from a TensorDict and checked once, here; then
the loss computes with tensors, of which a learning step asks for some fifty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor

from layeredrl_trl import keys
from layeredrl_trl.acceleration import check_values


@dataclass
class SliceKeys:
    """Names of the entries of slices; those under ``"next"`` are given without it."""

    observation: NestedKey = keys.OBSERVATION
    action: NestedKey = keys.ACTION
    reward: NestedKey = keys.REWARD
    terminated: NestedKey = keys.TERMINATED
    mask: NestedKey = keys.MASK
    planned: NestedKey = keys.PLANNED

    @property
    def next_observation(self) -> NestedKey:
        """The observation after a step."""
        return unravel_key(("next", self.observation))

    @property
    def next_reward(self) -> NestedKey:
        """The reward of a step."""
        return unravel_key(("next", self.reward))

    @property
    def next_terminated(self) -> NestedKey:
        """Whether a step terminated."""
        return unravel_key(("next", self.terminated))

    @property
    def end_keys(self) -> list[NestedKey]:
        """Flags of an episode's end: ``done`` and ``truncated`` are found beside ``terminated``."""
        *group, _ = self.next_terminated
        return [self.next_terminated, (*group, keys.DONE), (*group, keys.TRUNCATED)]


class NStepReturns(NamedTuple):
    """What the first ``k`` steps of slices earn, as far as no network is asked for it.

    Attributes:
        total: discounted sum of the rewards of a target, float64 ``[B, k, 1]``; 0 without one.
        discount: of the value behind them, float64 ``[B, k, 1]``.
        bootstraps: whether that value counts, bool ``[B, k, 1]``.
        observation: what is valued, ``[B, k, *obs_shape]``.
        action: for a Q-function, ``[B, k, A]`` or indices ``[B, k]``; else ``None``.
    """

    total: Tensor
    discount: Tensor
    bootstraps: Tensor
    observation: Tensor
    action: Tensor | None


class Slices(NamedTuple):
    """Slices of ``T`` consecutive steps. Past the end of an episode its last real step repeats.

    Single transitions, slices of one step, are of the same kind without the dim ``T``.

    Attributes:
        observation: ``[B, T, *obs_shape]``.
        action: ``[B, T, A]``, or indices ``[B, T]``.
        next_observation: ``[B, T, *obs_shape]``.
        terminated: bool ``[B, T, 1]``.
        reward: ``[B, T, 1]``; ``None`` if it was not asked for.
        mask: False past the end, bool ``[B, T, 1]``; ``None``: every step is real.
        planned: False where the action was random, bool ``[B, T, 1]``; ``None``: never.
        weight: of a transition, ``[B, T, 1]`` or for each member ``[B, T, E]``; ``None``: all 1.
        index: storage positions, ``[B, T]`` or ``[B, T, ndim]``; ``None`` if not known.
        returns: what the steps earn; ``None`` before :func:`~.targets.n_step_returns`.
    """

    observation: Tensor
    action: Tensor
    next_observation: Tensor
    terminated: Tensor
    reward: Tensor | None = None
    mask: Tensor | None = None
    planned: Tensor | None = None
    weight: Tensor | None = None
    index: Tensor | None = None
    returns: NStepReturns | None = None

    @classmethod
    def read(
        cls,
        tensordict: TensorDictBase,
        names: SliceKeys,
        *,
        with_reward: bool = True,
        with_mask: bool = True,
    ) -> Slices:
        """Take entries from a TensorDict and check their shapes.

        Args:
            tensordict: ``[B, T]``, or transitions ``[B]``.
            names: of the entries.
            with_reward: whether a reward is needed.
            with_mask: whether a mask is needed.

        Raises:
            KeyError: if an entry is missing; the text names it and those that are there.
            ValueError: if a per-step entry lacks its trailing 1.
        """
        check_keys(tensordict, (names.observation, names.action, names.next_observation))
        there = tensordict.keys(True)
        return cls(
            observation=tensordict.get(names.observation),
            action=tensordict.get(names.action),
            next_observation=tensordict.get(names.next_observation),
            terminated=flag(tensordict, names.next_terminated),
            reward=_as_float(per_step(tensordict, names.next_reward)) if with_reward else None,
            mask=flag(tensordict, names.mask) if with_mask else None,
            planned=flag(tensordict, names.planned) if names.planned in there else None,
            weight=tensordict.get(keys.WEIGHT, default=None),
            index=tensordict.get(keys.INDEX, default=None),
        )

    @property
    def first(self) -> Slices:
        """The first step of each slice, transitions ``[B]``."""
        return Slices(*(None if x is None else x[:, 0] for x in self[:-1]))

    def split(self, n: int) -> Iterator[Slices]:
        """Cut ``[n * B, ...]`` into ``n`` batches ``[B, ...]``."""
        return _split(self, n)


def as_slices(
    tensordict: TensorDictBase, slice_len: int, needed: Sequence[NestedKey], names: SliceKeys
) -> TensorDictBase:
    """Make a sample of slices rectangular, and let its padding repeat real steps.

    Args:
        tensordict: flat ``[B * T]``, or ``[B, T]``.
        slice_len: ``T``; slices of a rectangular sample may be longer.
        needed: entries that it must have.
        names: of all entries of slices.

    Returns:
        Its entries as ``[B, T]``. What padding holds (NaN, possibly) is replaced by the last real
        step of its slice, and a slice without any by another slice; masked it stays.

    Raises:
        KeyError: if an entry is missing.
        ValueError: if a shape does not fit, or a flat sample was drawn with another slice length
            (which can be seen on a CPU only).
    """
    try:
        check_keys(tensordict, needed)
    except KeyError as error:
        if tensordict.get(names.mask, None) is not None:
            raise
        raise KeyError(
            "Slices come with a mask from TransitionSliceSampler("
            f"slice_len={slice_len}) as the buffer's sampler. {error.args[0]}"
        ) from None
    mask = flag(tensordict, names.mask)
    optional = (names.planned, keys.WEIGHT, keys.INDEX)
    tensordict = tensordict.select(*needed, *optional, strict=False)
    if tensordict.ndim != 2 or tensordict.shape[1] < slice_len:
        if tensordict.ndim != 1 or tensordict.shape[0] % slice_len:
            raise ValueError(
                f"RewardPredictorLoss: expected slices of slice_len={slice_len} steps, flat "
                f"[B * {slice_len}] or [B, {slice_len}], got batch size "
                f"{list(tensordict.batch_size)}."
            )
        tensordict = tensordict.reshape(-1, slice_len)
        mask = mask.reshape(-1, slice_len, 1)
        _check_cut(mask.squeeze(-1), tensordict.get(keys.INDEX, default=None), slice_len)
    mask = mask.squeeze(-1)
    last = (mask.sum(-1, keepdim=True) - 1).clamp_min(0)
    step = torch.arange(mask.shape[1], device=mask.device).minimum(last)
    real = tensordict[rows_with_data(mask)[:, None], step]
    return real.set(names.mask, mask.unsqueeze(-1))


def rows_with_data(mask: Tensor) -> Tensor:
    """Choose a slice to read for each: itself, or where it is all padding one that is not.

    Args:
        mask: bool ``[B, T]``.

    Returns:
        long ``[B]``.
    """
    real = mask[:, 0]
    return torch.where(real, torch.arange(len(real), device=real.device), real.byte().argmax())


def per_step(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """Get an entry ``[*batch, 1]``; any other shape would be broadcast without a word.

    Raises:
        KeyError: if the entry is missing; names it and those that are there.
        ValueError: naming ``key`` and both shapes.
    """
    x = tensordict.get(key, default=None)
    if x is None:
        there = sorted(str(name) for name in tensordict.keys(True, True))
        raise KeyError(f"The batch has no {key!r}; it has {there}.")
    expected = (*tensordict.batch_size, 1)
    if x.shape != expected:
        raise ValueError(
            f"{key}: expected shape {[*expected]} (a trailing dim of 1), got {list(x.shape)}."
        )
    return x


def flag(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """Get a per-step entry as bool, also where it is stored as a number; see :func:`per_step`."""
    x = per_step(tensordict, key)
    return x if x.dtype is torch.bool else x != 0


def check_keys(tensordict: TensorDictBase, needed: Sequence[NestedKey]) -> None:
    """Check that a batch for the loss has the entries that it needs.

    Raises:
        KeyError: naming those that are missing and those that are there.
    """
    there = set(tensordict.keys(True, True))
    missing = [key for key in needed if key not in there]
    if missing:
        raise KeyError(
            f"RewardPredictorLoss: the batch has no {missing}; it has {sorted(map(str, there))}."
        )


def _split(x: Any, n: int) -> Iterator[Any]:
    """Cut a tensor, or each of a tuple of tensors, into ``n`` pieces of as many rows."""
    if x is None:
        return repeat(None, n)
    if isinstance(x, Tensor):
        # contiguous: steps are compiled and recorded for the strides that they get
        return iter(x.contiguous().unflatten(0, (n, -1)).unbind(0))
    pieces = (_split(entry, n) for entry in x)
    return (type(x)(*piece) for piece in zip(*pieces, strict=True))


def _as_float(reward: Tensor) -> Tensor:
    """Cast rewards that are integers or bools to float32."""
    return reward if reward.is_floating_point() else reward.to(torch.float32)


def _check_cut(mask: Tensor, index: Tensor | None, slice_len: int) -> None:
    """Check that no slice ``[B, T]`` cut from a flat sample is made of pieces of several.

    No real step comes after padding, and real steps follow each other in the storage (if it has one
    dim; a ring goes on at 0).
    """
    wrong = mask[:, 1:] & ~mask[:, :-1]
    if index is not None and index.numel() == mask.numel():
        index = index.reshape(mask.shape)
        step = index[:, 1:] - index[:, :-1]
        follows = (step == 0) | (step == 1) | (index[:, 1:] == 0)
        wrong = wrong | (mask[:, 1:] & ~follows)
    check_values(
        ~wrong,
        lambda: ValueError(
            f"RewardPredictorLoss: a flat sample cut into slices of slice_len={slice_len} steps "
            "joins steps that do not follow each other: it was drawn with another slice length. "
            f"Give the sampler slice_len={slice_len} (loss.slice_len)."
        ),
    )
