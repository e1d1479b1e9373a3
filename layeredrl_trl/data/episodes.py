"""Stored steps as flat rows whose every episode ends with a flag, and a split by episodes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers import ImmutableDatasetWriter

from layeredrl_trl import keys
from layeredrl_trl.checks import check_finite
from layeredrl_trl.data.positions import gather, leaf_keys

EPISODE = "episode"
SPLIT_MASK = "mask"
"""Entry that ``split_trajectories`` of TorchRL writes where data have no ids of trajectories."""
_IDS = (keys.TRAJ_IDS, EPISODE)


class Rows(NamedTuple):
    """Steps ``[N]`` in the order in which they were taken, and what ends where.

    Attributes:
        data: what is stored.
        terminated, truncated: as stored, bool ``[N]``.
        last: bool ``[N]``, True on the last step of every episode.
        flagged: whether a flag, an id or the shape of the data told where episodes end.
    """

    data: TensorDictBase
    terminated: Tensor
    truncated: Tensor
    last: Tensor
    flagged: bool


def to_rows(data: TensorDictBase) -> Rows:
    """Flatten steps ``[N]`` or ``[episodes, T]`` without their padding, and find the episodes.

    An episode ends where a flag says so, where the id of the trajectory changes, before an
    ``is_init``, before padding, and at the end of each row of two-dimensional data.
    """
    shape = data.batch_size
    stored = {
        name: data.get(("next", name), None)
        for name in (keys.DONE, keys.TERMINATED, keys.TRUNCATED)
    }
    flags = {name: _flag(x, shape) for name, x in stored.items() if x is not None}
    none = torch.zeros(shape, dtype=torch.bool, device=data.device)
    last = torch.stack([none, *flags.values()]).any(0)
    truncated = flags.get(keys.TRUNCATED, none)
    terminated = flags.get(keys.TERMINATED, last & ~truncated)
    flagged = bool(flags) or len(shape) > 1
    for key in _IDS:
        if (ids := data.get(key, None)) is not None:
            ids = ids.reshape(shape)
            last[..., :-1] |= ids[..., 1:] != ids[..., :-1]
            flagged = True
    if (first := data.get(keys.IS_INIT, None)) is not None:
        last[..., :-1] |= _flag(first, shape)[..., 1:]
        flagged = True
    last[..., -1] = True
    real = data.get(keys.MASK, None)
    if real is None and len(shape) > 1:
        real = data.get(SPLIT_MASK, None)
    if real is not None:
        real = _flag(real, shape)
        last[..., :-1] |= ~real[..., 1:]
    columns = data, terminated, truncated, last
    flat = [column.reshape(-1) for column in columns]
    if real is not None and not real.all():
        keep = real.reshape(-1)
        flat = [column[keep] for column in flat]
    return Rows(*flat, flagged)


def mark_gaps(rows: Rows, observation: Tensor, next_observation: Tensor, name: str) -> Tensor:
    """Mark steps that do not lead to the next row as the last of their episode, with a warning.

    Data in which most steps do not lead to the next row say nothing about what follows what.

    Returns:
        ``last``, bool ``[N]``.
    """
    inside = ~rows.last[:-1]
    now, reached = observation[1:].flatten(1), next_observation[:-1].flatten(1)
    gap = inside & ~((now == reached) | (now.isnan() & reached.isnan())).all(-1)
    n_gaps = int(gap.sum())
    if not n_gaps or 2 * n_gaps >= int(inside.sum()):
        return rows.last
    warnings.warn(
        f"{name}: {n_gaps} steps do not lead to the observation of the next row, though nothing "
        "stored ends an episode there; they are taken for the last steps of truncated episodes.",
        stacklevel=5,
    )
    last = rows.last.clone()
    last[:-1] |= gap
    return last


def unknown_next(
    observation: Tensor, next_observation: Tensor, terminated: Tensor, last: Tensor
) -> Tensor:
    """Find the last steps of episodes after which no observation is stored.

    TorchRL's readers of D4RL and OpenX fill it with zeros, or with the first observation of the
    next episode. Zeros count if no other row has them. The next episode's observation counts if all
    terminated (or all truncated) steps have it and most of them move further than any other step.

    Returns:
        bool ``[N]``.
    """
    now, reached = observation.flatten(1), next_observation.flatten(1)
    is_zero = (reached == 0).all(-1)
    if (is_zero & ~last).any() or (now == 0).all(-1).any():
        is_zero = torch.zeros_like(last)
    unknown = is_zero & last
    change = torch.maximum(reached, now) - torch.minimum(reached, now)  # of bytes, too
    usual = change[~last]
    if not len(usual):
        return unknown
    is_jump = (change > usual.amax(0)).any(-1)
    same = torch.zeros_like(last)
    same[:-1] = (reached[:-1] == now[1:]).all(-1)
    for kind in (terminated & last, ~terminated & last):
        kind = kind & ~unknown
        kind[-1] = False
        if kind.any() and same[kind].all() and is_jump[kind].float().mean() > 0.5:
            unknown |= kind
    return unknown


def check_numbers(
    entries: Mapping[NestedKey, Tensor], observations: Sequence[NestedKey], name: str
) -> None:
    """Check that what learning reads ``[N, ...]`` is finite and not zero throughout.

    Raises:
        ValueError: if a number is not finite, or every one of the ``observations`` is zero.
    """
    zero = set()
    for key, values in entries.items():
        values = values.flatten(1)
        if values.is_floating_point():
            bad = ~values.isfinite().all(-1)
            if bad.any():
                raise ValueError(
                    f"{name}: {int(bad.sum())} of {len(bad)} rows of {key!r} hold numbers that are "
                    f"not finite in float32, the first is row {int(bad.nonzero()[0])}."
                )
        if not values.any():
            zero.add(key)
    if zero.issuperset(observations):
        raise ValueError(
            f"{name}: every observation is 0. (TorchRL 0.14.1's MinariExperienceReplay leaves such "
            "a folder: give the folder that Minari wrote.)"
        )
    for key in zero.intersection((keys.ACTION, keys.NEXT_REWARD)):
        warnings.warn(f"{name}: every {key!r} is 0.", stacklevel=4)


def fixed_buffer(steps: TensorDictBase) -> TensorDictReplayBuffer:
    """Make a replay buffer ``[N]`` that can be read but not extended."""
    return TensorDictReplayBuffer(storage=TensorStorage(steps), writer=ImmutableDatasetWriter())


def split_episodes(
    buffer: ReplayBuffer, fraction: float = 0.1, *, generator: torch.Generator | None = None
) -> tuple[TensorDictReplayBuffer, TensorDictReplayBuffer]:
    """Split a dataset by whole episodes into one to learn from and one to measure on.

    Args:
        buffer: of :func:`~layeredrl_trl.data.read_dataset`, or another of one dim that stores
            ``episode``, a number that is the same on all steps of an episode and only there.
        fraction: of the episodes that are held out, between 0 and 1; at least one is, and at least
            one is not.
        generator: draws the held-out episodes.

    Returns:
        The buffer to learn from and the held-out buffer, each with rows of its own in their old
        order. Neither can be extended.

    Raises:
        TypeError: if ``buffer`` is no replay buffer of TensorDicts, or ``fraction`` no number.
        KeyError: if no ``episode`` is stored.
        ValueError: if ``fraction`` is not between 0 and 1, or there are fewer than two episodes.

    Example:
        >>> from torchrl.data import LazyTensorStorage
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
        >>> episode = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3])
        >>> _ = buffer.extend(TensorDict(episode=episode, batch_size=[10]))
        >>> train, held_out = split_episodes(buffer, 0.25)
        >>> len(train["episode"].unique()), len(held_out["episode"].unique())
        (3, 1)
    """
    check_finite("fraction", fraction)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")
    if not isinstance(buffer, ReplayBuffer) or not isinstance(buffer.storage, TensorStorage):
        raise TypeError(
            "buffer: expected a replay buffer that stores TensorDicts as tensors, got "
            f"{type(buffer).__name__}."
        )
    data = buffer.storage[:]
    if (ids := data.get(EPISODE, None)) is None or data.ndim != 1:
        raise KeyError(
            f"buffer: expected rows [N] with {EPISODE!r}, got {list(data.batch_size)} with "
            f"{leaf_keys(data)}. read_dataset(buffer).buffer has it."
        )
    ids = ids.reshape(-1)
    episodes = ids.unique()
    if len(episodes) < 2:
        raise ValueError(f"buffer: {len(episodes)} episode cannot be split.")
    n_held = min(max(round(fraction * len(episodes)), 1), len(episodes) - 1)
    drawn = torch.randperm(len(episodes), generator=generator)[:n_held].to(ids.device)
    is_held = torch.isin(ids, episodes[drawn])
    return fixed_buffer(_take(data, ~is_held)), fixed_buffer(_take(data, is_held))


def _take(data: TensorDictBase, rows: Tensor) -> TensorDict:
    index = (rows.nonzero().squeeze(-1),)
    stored = {key: data.get(key) for key in data.keys(True, True)}
    taken = {key: gather(x, index) for key, x in stored.items() if isinstance(x, Tensor)}
    return TensorDict(taken, batch_size=index[0].shape)


def _flag(values: Tensor, shape: torch.Size) -> Tensor:
    if values.numel() != shape.numel():
        raise ValueError(
            f"expected flags of one number per step, {[*shape, 1]}, got {list(values.shape)}."
        )
    return values.reshape(shape).bool()
