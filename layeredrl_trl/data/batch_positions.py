"""Where the rows of a batch are stored, and which of them make a slice, by what is stored of them.

A transform of a replay buffer sees stored entries only: TorchRL adds ``index`` and the mask of its
sampler to a batch after the transforms.
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer, TensorStorage

from layeredrl_trl.data.positions import gather, leaf_keys
from layeredrl_trl.keys import INDEX

LANE = ("hindsight", "lane")
"""Entry that says in which column of envs a row is stored, in a storage of two dims."""


def buffer_of(storage: TensorStorage) -> ReplayBuffer | None:
    """Return the buffer that a storage belongs to."""
    return next((x for x in storage._attached_entities if isinstance(x, ReplayBuffer)), None)


def put_lanes(tensordict: TensorDictBase, storage: TensorStorage) -> TensorDictBase:
    """Note which env each row is of in data that are about to be stored; changes its argument.

    Data without a dim of time are those of ``buffer.add``: their only dim is that of envs.
    """
    buffer = buffer_of(storage)
    time_dim = 1 if buffer is None else buffer.dim_extend
    env_dim = 0 if tensordict.ndim == 1 or time_dim else 1
    shape = [-1 if dim == env_dim else 1 for dim in range(tensordict.ndim)]
    lane = torch.arange(tensordict.shape[env_dim], device=tensordict.device).view(shape)
    return tensordict.set(LANE, lane.expand(tensordict.batch_size).clone())


def batch_positions(
    batch: TensorDictBase, storage: TensorStorage, device: torch.device
) -> tuple[Tensor, ...]:
    """Find the storage positions of the rows of a flat batch ``[n]``.

    Returns:
        One LongTensor ``[n]`` per storage dim (time first), on ``device``.

    Raises:
        KeyError: if nothing stored says where a row is.
        ValueError: if what is stored cannot be true.
    """
    index, n, ndim = batch.get(INDEX, None), len(batch), storage.ndim
    if index is None:
        raise KeyError(
            f"HindsightGoals: the batch has no {INDEX!r}, the position of each row, which a "
            "TensorDictRoundRobinWriter stores (the writer of a TensorDictReplayBuffer, unless it "
            f"is given another); it has {leaf_keys(batch)}."
        )
    if index.shape == (n, ndim):  # a sample's own, from after the transforms
        position = index.unbind(-1)
    elif index.shape != (n,):
        raise ValueError(
            f"HindsightGoals: {INDEX!r}: expected shape {[n]}, got {list(index.shape)}."
        )
    elif ndim == 1:
        position = (index,)
    elif (lane := batch.get(LANE, None)) is not None:
        position = (index, lane)
    else:
        raise KeyError(
            f"HindsightGoals: the batch has no {LANE!r}, which says of which env a row is. The "
            "transform stores it when the buffer is extended: append it to the buffer before."
        )
    position = tuple(i.to(device).long() for i in position)
    if not _are_true(position, storage):
        raise ValueError(
            f"HindsightGoals: {INDEX!r} is not the position of the rows in this storage. Is it the "
            "storage of the buffer, and its writer a TensorDictRoundRobinWriter?"
        )
    return position


def slice_length(
    position: tuple[Tensor, ...], storage: TensorStorage, asked: int | None, row_len: int | None
) -> int:
    """Give the number of steps of a batch's slices, and check that they are slices.

    Positions alone decide. What is stored may have gone on since the batch was drawn, if the buffer
    reads ahead (``prefetch``) or another thread extends it.

    Args:
        position: from :func:`batch_positions`.
        storage: the storage.
        asked: steps of a slice; None: the largest number that cuts the batch into slices.
        row_len: size of the batch's dim of time, if it has one.

    Raises:
        ValueError: if the batch does not hold slices of so many steps.
    """
    n, wraps = len(position[0]), storage.shape[0] if storage._is_full else None
    if row_len is not None:
        if asked not in (None, row_len):
            raise ValueError(
                f"HindsightGoals: slice_len={asked}, but the batch has slices of {row_len} steps."
            )
        asked = row_len
    if asked is None:
        return next(length for length in _divisors(n) if _are_slices(position, length, wraps))
    if n % asked:
        raise ValueError(
            f"HindsightGoals: expected slices of slice_len={asked} steps, got a batch of {n} "
            "steps, which is no multiple. If slices have several lengths, pass slice_len=None."
        )
    if not _are_slices(position, asked, wraps):
        raise ValueError(
            f"HindsightGoals: the batch does not hold slices of slice_len={asked} consecutive "
            "steps. Give the buffer's TransitionSliceSampler the same slice_len, that of the loss. "
            "If slices have several lengths, pass slice_len=None."
        )
    return asked


def _are_true(position: tuple[Tensor, ...], storage: TensorStorage) -> bool:
    """Tell whether the rows at these positions, by their own account, are there."""
    for i, size in zip(position, storage.shape, strict=True):
        if not bool(((i >= 0) & (i < size)).all()):
            return False
    for key, i in zip((INDEX, LANE), position, strict=False):
        column = storage._storage.get(key, None)
        if column is not None and not torch.equal(gather(column, position).view_as(i), i):
            return False
    return True


def _are_slices(position: tuple[Tensor, ...], length: int, wraps: int | None) -> bool:
    """Tell whether pieces of ``length`` rows each hold consecutive steps of one env.

    The last step may repeat. A full ring of ``wraps`` rows continues at 0.
    """
    time, *lane = (i.reshape(-1, length) for i in position)
    step = time[:, 1:] - time[:, :-1]
    repeats = step == 0
    moves = step == 1 if wraps is None else (step == 1) | (step == 1 - wraps)
    stops = (repeats[:, :-1] & moves[:, 1:] & ~repeats[:, 1:]).any()
    follows = (moves | repeats).all() & ~stops
    return bool(follows) and all(bool((i == i[:, :1]).all()) for i in lane)


def _divisors(n: int) -> list[int]:
    """List the divisors of ``n``, the largest first."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)}, reverse=True)
