"""Whether consecutive rows of a storage are consecutive steps, by the observations they hold."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

import torch
from tensordict import NestedKey, unravel_key
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.storages import Storage

from layeredrl_trl.data.boundaries import read_flags
from layeredrl_trl.data.positions import flat_position, gather
from layeredrl_trl.data.reading import locked
from layeredrl_trl.data.slice_sampler import TransitionSliceSampler

_MOST_ROWS = 4096
"""Number of rows that are looked at, spread over what is stored."""

_GOLDEN = (5**0.5 - 1) / 2

_MOST_SEARCHED = 2**16
"""Number of rows among which the one that follows is looked for."""

_MOST_LOST = 16
"""Number of rows for which it is looked for."""

_ENOUGH = 8
"""Number of unfinished steps below which nothing is said of how many are cut off."""

_checked: WeakKeyDictionary[Storage, float] = WeakKeyDictionary()
"""Number of rows of a storage when it was last checked; infinite after a warning."""

_WAY_OUT = (
    "Let every env have a column of its own: LazyTensorStorage(size, ndim=2), extended with the "
    "collector's batch [N, T] as it is; TorchRL's TensorDictReplayBuffer needs T of 2 or more "
    "there (frames_per_batch=2 * N), its ReplayBuffer does not. Let stretches that stop in "
    "mid-episode have their ends marked: Collector(..., set_truncated=True)."
)


def warn_of_gaps(
    buffer: ReplayBuffer,
    sampler: TransitionSliceSampler,
    observation: NestedKey,
    next_observation: NestedKey,
    *,
    stacklevel: int = 2,
) -> None:
    """Warn if slices of a buffer join steps that do not follow each other, or have no second step.

    A storage is looked at when it is new and whenever its size has doubled, until it has been
    warned of. No random number is drawn.

    Args:
        buffer: the replay buffer.
        sampler: draws its slices.
        observation: entry before a step. Where transforms make it of others, all that are stored
            before and after a step are looked at, and the one that fits best counts.
        next_observation: entry after it, which should be ``observation`` of the following row.
        stacklevel: of the warning, as for ``warnings.warn``.
    """
    storage = buffer.storage
    if len(storage) < 2 * _checked.get(storage, 0) or len(storage) < 2:
        return
    _checked[storage] = len(storage)
    with locked(buffer):
        text = describe_gaps(storage, sampler, observation, next_observation)
    if text:
        _checked[storage] = float("inf")
        warnings.warn(text, stacklevel=stacklevel)


def describe_gaps(
    storage: Storage,
    sampler: TransitionSliceSampler,
    observation: NestedKey,
    next_observation: NestedKey,
) -> str:
    """Say which rows of a storage are wrongly joined, or cut off; empty if it looks right.

    Data in which no next observation is stored as the observation of any row (made up, or changed
    before storing) say nothing about what follows what.
    """
    shape = storage.shape
    first = torch.unravel_index(_spread(shape.numel()), shape)
    index, mask = sampler.slices_from(storage, first, 2)
    row, following = (tuple(i[:, step] for i in index) for step in (0, 1))
    joined = mask[:, 1]
    found = []
    for key, next_key in _pairs(storage, observation, next_observation):
        now, reached = storage._storage.get(key), gather(storage._storage.get(next_key), row)
        if not _same(reached, gather(now, row)).all():  # a goal that never changes tells nothing
            found.append((joined & ~_same(reached, gather(now, following)), now, reached, key))
    if found and (best := min(found, key=lambda x: int(x[0].sum())))[0].any():
        wrong, now, reached, observation = best
        next_observation = unravel_key(("next", observation))
        lag = _usual_lag(now, reached[wrong], tuple(i[wrong] for i in row), shape)
        if lag is None and bool(wrong[joined].all()):
            return ""
        elsewhere = "" if not lag else f" It is that of the row {lag} further on."
        return (
            f"Slices join steps that do not follow each other: in {int(wrong.sum())} of "
            f"{int(joined.sum())} looked at, {next_observation!r} is not {observation!r} of the "
            f"next row.{elsewhere} {_WAY_OUT}"
        )
    is_open = mask[:, 0] & ~_ended(storage, sampler, row)  # stored padding is no step
    n_open, n_cut = int(is_open.sum()), int((is_open & ~joined).sum())
    if n_open >= _ENOUGH and 2 * n_cut > n_open:
        return (
            f"Most slices have a single step: {n_cut} of {n_open} steps looked at do not end an "
            f"episode, but the next row is of another trajectory. {_WAY_OUT}"
        )
    return ""


def _spread(n: int) -> Tensor:
    """Spread positions over ``n`` rows, in no step with any period that the data may have."""
    count = min(_MOST_ROWS, n)
    fraction = torch.arange(count, dtype=torch.float64) * _GOLDEN % 1
    return torch.arange(n) if count == n else (fraction * n).long().unique()


def _pairs(
    storage: Storage, observation: NestedKey, next_observation: NestedKey
) -> list[tuple[NestedKey, NestedKey]]:
    """Name the observation before and after a step; where transforms make it, what may be of it."""
    data = storage._storage
    if observation in data.keys(True) or next_observation in data.keys(True):
        candidates = [(unravel_key(observation), unravel_key(next_observation))]
    else:
        candidates = [
            (key, unravel_key(("next", key)))
            for key in data.keys(True, True)
            if not (isinstance(key, tuple) and key[0] == "next")
            and data.get(key).is_floating_point()
        ]

    def comes_before(key: NestedKey, next_key: NestedKey) -> bool:
        now, later = data.get(key, None), data.get(next_key, None)
        both = isinstance(now, Tensor) and isinstance(later, Tensor)
        return both and now.shape == later.shape

    return [pair for pair in candidates if comes_before(*pair)]


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Tell which rows of ``[N, *F]`` are equal, NaN with NaN; bool ``[N]``."""
    return ((a == b) | ((a != a) & (b != b))).flatten(1).all(1)


def _ended(storage: Storage, sampler: TransitionSliceSampler, row: tuple[Tensor, ...]) -> Tensor:
    """Tell which rows ``[N]`` are marked as the last of their episode; bool ``[N]``."""
    position = flat_position(row, storage.shape[1:]).unsqueeze(-1)
    ends = [read_flags(column, position, storage.ndim) for column in sampler.end_columns(storage)]
    return torch.stack([torch.zeros_like(position, dtype=torch.bool), *ends]).any(0).squeeze(-1)


def _usual_lag(
    now: Tensor, reached: Tensor, row: tuple[Tensor, ...], shape: torch.Size
) -> int | None:
    """Find how many rows further on the observations that steps reach are stored, in most cases.

    Returns 0 if they are stored at no usual distance, ``None`` if most are not stored at all.
    """
    flat = now[: shape[0]].flatten(0, len(shape) - 1)
    start = flat_position(row, shape[1:])
    lags = []
    for position, x in zip(start[:_MOST_LOST].tolist(), reached[:_MOST_LOST], strict=True):
        window = flat[position : position + _MOST_SEARCHED]
        same = _same(window, x.expand_as(window)).nonzero()
        if not len(same) and position:
            same = _same(flat[:_MOST_SEARCHED], x.expand_as(flat[:_MOST_SEARCHED])).nonzero()
            lags += [0] * bool(len(same))
        elif len(same):
            lags.append(int(same[0]))
    if 2 * len(lags) < min(len(start), _MOST_LOST):
        return None
    usual = max(set(lags), key=lags.count)
    return usual if 2 * lags.count(usual) > len(lags) else 0
