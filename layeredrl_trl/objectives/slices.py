"""Masked slices of transitions: their entries, and reading them without what is masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor

from layeredrl_trl import keys
from layeredrl_trl.functional import can_read

Reader = Callable[[Sequence[NestedKey], Tensor], TensorDictBase]
"""Reads the named entries at steps ``[B, J]`` of ``B`` slices, as a TensorDict ``[B, J]``."""


@dataclass
class SliceKeys:
    """What the entries of slices are called; all that is under ``"next"`` without it."""

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
        """Flags of an episode's end: ``done`` and ``truncated`` stand beside ``terminated``."""
        *beside, _ = self.next_terminated
        return [self.next_terminated, (*beside, keys.DONE), (*beside, keys.TRUNCATED)]


def rows_with_data(mask: Tensor) -> Tensor:
    """Say which slice to read for each: itself, or where it is nothing but padding one that is not.

    It stays masked, but nothing that it holds (NaN, for all one knows) is ever looked at.

    Args:
        mask: bool ``[B, T]``.

    Returns:
        long ``[B]``.
    """
    real = mask[:, 0]
    return torch.where(real, torch.arange(len(real), device=real.device), real.byte().argmax())


def read_steps(
    slices: TensorDictBase, row: Tensor, names: Sequence[NestedKey], steps: Tensor
) -> TensorDictBase:
    """Read ``slices`` ``[N, T]`` at ``row`` ``[B]`` and ``steps`` ``[B, J]``, where there."""
    return slices.select(*names, strict=False)[row[:, None], steps]


def per_step(
    tensordict: TensorDictBase, key: NestedKey, batch: torch.Size, *, flag: bool = False
) -> Tensor:
    """Get an entry ``[*batch, 1]`` and refuse any other shape: it would broadcast into nonsense.

    Args:
        tensordict: holds the entry.
        key: of the entry.
        batch: its shape but for the trailing 1.
        flag: return it as bool; ``~`` of a flag stored as a number would be something else.

    Raises:
        KeyError: if the entry is missing; names it and those that are there.
        ValueError: naming ``key`` and both shapes.
    """
    x = tensordict.get(key, default=None)
    if x is None:
        there = sorted(str(name) for name in tensordict.keys(True, True))
        raise KeyError(f"The batch has no {key!r}; it has {there}.")
    if x.shape != (*batch, 1):
        raise ValueError(
            f"{key}: expected shape {[*batch, 1]} (a trailing dim of 1), got {list(x.shape)}."
        )
    return x != 0 if flag and x.dtype is not torch.bool else x


def read_reward(tensordict: TensorDictBase, names: SliceKeys, batch: torch.Size) -> Tensor:
    """Get the reward ``[*batch, 1]`` as a float; integers and bools are cast to float32.

    Raises:
        KeyError: if there is none.
        ValueError: if it has another shape.
    """
    reward = per_step(tensordict, names.next_reward, batch)
    return reward if reward.is_floating_point() else reward.to(torch.float32)


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


def as_slices(
    tensordict: TensorDictBase, slice_len: int, needed: Sequence[NestedKey], mask_key: NestedKey
) -> TensorDictBase:
    """Check the entries and the shape of a sample of slices.

    Args:
        tensordict: flat ``[B * T]``, or ``[B, T]``.
        slice_len: ``T``; slices of a rectangular sample may be longer.
        needed: entries that it must have.
        mask_key: the one that says what is padding.

    Returns:
        The sample as ``[B, T]``.

    Raises:
        KeyError: if an entry is missing.
        ValueError: if a shape does not fit, or a flat sample was, as can be seen on the CPU, drawn
            with another slice length.
    """
    try:
        check_keys(tensordict, needed)
    except KeyError as error:
        if tensordict.get(mask_key, None) is not None:
            raise
        raise KeyError(
            "Slices come with a mask from TransitionSliceSampler("
            f"slice_len={slice_len}) as the buffer's sampler. {error.args[0]}"
        ) from None
    per_step(tensordict, mask_key, tensordict.batch_size)
    if tensordict.ndim == 2 and tensordict.shape[1] >= slice_len:
        return tensordict
    if tensordict.ndim != 1 or tensordict.shape[0] % slice_len:
        raise ValueError(
            f"RewardPredictorLoss: expected slices of slice_len={slice_len} steps, flat "
            f"[B * {slice_len}] or [B, {slice_len}], got batch size "
            f"{list(tensordict.batch_size)}."
        )
    slices = tensordict.reshape(-1, slice_len)
    if can_read(slices.get(mask_key)):
        _check_cut(slices, slice_len, mask_key)
    return slices


def _check_cut(slices: TensorDictBase, slice_len: int, mask_key: NestedKey) -> None:
    """Check that no slice ``[B, T]`` made of a flat sample is pieces of several.

    Behind padding nothing is real, and real steps follow each other in the storage (of one dim; a
    ring goes on at 0).

    Raises:
        ValueError: if it is otherwise.
    """
    real = slices.get(mask_key).squeeze(-1) != 0
    wrong = (real[:, 1:] & ~real[:, :-1]).any()
    index = slices.get(keys.INDEX, default=None)
    if index is not None and index.numel() == real.numel():
        index = index.reshape(real.shape)
        step = index[:, 1:] - index[:, :-1]
        follows = (step == 0) | (step == 1) | (index[:, 1:] == 0)
        wrong = wrong | (real[:, 1:] & ~follows).any()
    if wrong:
        raise ValueError(
            f"RewardPredictorLoss: a flat sample cut into slices of slice_len={slice_len} steps "
            "joins steps that do not follow each other: it was drawn with another slice length. "
            f"Give the sampler slice_len={slice_len} (loss.slice_len)."
        )
