"""The batch that learning works on: slices of consecutive steps, as plain tensors.

A transition is a slice of one step. Entries are read from a TensorDict and checked once, here:
losses access entries some fifty times per step, which is faster with plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import repeat
from operator import and_
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor

from layeredrl_trl import keys
from layeredrl_trl.acceleration import check_values
from layeredrl_trl.functional import rows_with_data


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
        """Flags of an episode's end; ``done`` and ``truncated`` are siblings of ``terminated``."""
        *group, _ = self.next_terminated
        return [self.next_terminated, (*group, keys.DONE), (*group, keys.TRUNCATED)]


class NStepReturns(NamedTuple):
    """N-step returns of the first ``k`` steps of slices, before the bootstrap value is added.

    Attributes:
        total: discounted sum of the rewards, float64 ``[B, k, 1]``; 0 for a step without target.
        discount: factor of the bootstrap value, float64 ``[B, k, 1]``.
        bootstraps: whether a bootstrap value is added, bool ``[B, k, 1]``.
        observation: observation to bootstrap from, ``[B, k, *obs_shape]``.
        action: for a Q-function, ``[B, k, A]`` or indices ``[B, k]``; else ``None``.
        exists: whether the step has a target, bool ``[B, k, 1]``; ``None``: every real step has.
    """

    total: Tensor
    discount: Tensor
    bootstraps: Tensor
    observation: Tensor
    action: Tensor | None
    exists: Tensor | None = None


class Slices(NamedTuple):
    """Slices of ``T`` consecutive steps. Past the end of an episode its last real step repeats.

    Single transitions are stored without the dim ``T``.

    Attributes:
        observation: ``[B, T, *obs_shape]``.
        action: ``[B, T, A]``, or indices ``[B, T]``.
        next_observation: ``[B, T, *obs_shape]``.
        terminated: bool ``[B, T, 1]``.
        reward: ``[B, T, 1]``; ``None`` if it was not read.
        mask: False past the end, bool ``[B, T, 1]``; ``None``: every step is real.
        planned: False where the action was random, bool ``[B, T, 1]``; ``None``: all True.
        weight: of a transition, ``[B, T, 1]`` or for each member ``[B, T, E]``; ``None``: all 1.
        index: storage positions, ``[B, T]`` or ``[B, T, ndim]``; ``None`` if not known.
        returns: n-step returns; ``None`` before :func:`~.targets.n_step_returns`.
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
        """Take entries from a TensorDict ``[B, T]``, or ``[B]`` for transitions; check shapes.

        Raises:
            KeyError: if an entry is missing; the text names it and the existing ones.
            ValueError: if a per-step entry lacks its trailing 1, or a row is a transition of
                several steps (checked only on a CPU).
        """
        check_keys(tensordict, (names.observation, names.action, names.next_observation))
        there = tensordict.keys(True)
        if keys.STEPS_TO_NEXT in there:
            check_single_steps(tensordict.get(keys.STEPS_TO_NEXT))
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
    """Make a sample of slices rectangular, and fill its padding with real steps.

    Takes a flat sample ``[B * T]``, or ``[B, T]`` with ``T`` at least ``slice_len``, and returns
    its ``needed`` and optional entries as ``[B, T]``. Padding (possibly NaN) is overwritten with
    the last real step of its slice, or with another slice if it has none; its mask stays False.

    Raises:
        KeyError: if an entry is missing.
        ValueError: if a shape does not fit, or a flat sample was drawn with another slice length
            (checked only on a CPU).
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
    optional = (names.planned, keys.WEIGHT, keys.INDEX, keys.STEPS_TO_NEXT)
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


def per_step(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """Get an entry ``[*batch, 1]``; any other shape would be broadcast silently.

    Raises:
        KeyError: if the entry is missing; the text names it and the existing ones.
        ValueError: if its shape differs; the text names ``key`` and both shapes.
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
    """Get a per-step entry as bool, even if it is stored as a number; see :func:`per_step`."""
    x = per_step(tensordict, key)
    return x if x.dtype is torch.bool else x != 0


def all_of(*flags: Tensor | None) -> Tensor | None:
    """Return where all flags of one shape are True; ``None`` stands for True everywhere."""
    given = [x for x in flags if x is not None]
    return reduce(and_, given) if given else None


def check_keys(tensordict: TensorDictBase, needed: Sequence[NestedKey]) -> None:
    """Check that a batch has all needed entries.

    Raises:
        KeyError: if not; the text names the missing and the existing ones.
    """
    there = set(tensordict.keys(True, True))
    missing = [key for key in needed if key not in there]
    if missing:
        raise KeyError(
            f"RewardPredictorLoss: the batch has no {missing}; it has {sorted(map(str, there))}."
        )


def _split(x: Any, n: int) -> Iterator[Any]:
    """Cut a tensor, or a tuple of tensors, into ``n`` pieces of equal size."""
    if x is None:
        return repeat(None, n)
    if isinstance(x, Tensor):
        # contiguous, because steps are compiled and recorded for specific strides
        return iter(x.contiguous().unflatten(0, (n, -1)).unbind(0))
    pieces = (_split(entry, n) for entry in x)
    return (type(x)(*piece) for piece in zip(*pieces, strict=True))


def _as_float(reward: Tensor) -> Tensor:
    """Cast rewards to float32, unless they are float64.

    Sums of integers would be cut off, sums of float16 rounded or infinite.
    """
    return reward if reward.dtype is torch.float64 else reward.to(torch.float32)


def check_single_steps(steps: Tensor) -> None:
    """Check that ``steps_to_next_obs`` is 1 everywhere (on a CPU).

    Raises:
        ValueError: if it is not.
    """
    check_values(
        steps == 1,
        lambda: ValueError(
            f"{keys.STEPS_TO_NEXT}: expected 1, got up to {int(steps.max())}: the data hold "
            "transitions of several steps, of which a model of one step cannot be learned. Leave "
            "out MultiStep or MultiStepTransform, and pass n_steps for n-step value targets."
        ),
    )


def _check_cut(mask: Tensor, index: Tensor | None, slice_len: int) -> None:
    """Check that slices ``[B, T]`` cut from a flat sample do not join pieces of several slices.

    No real step comes after padding, and real steps are consecutive in a one-dim storage (a ring
    continues at 0).
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
