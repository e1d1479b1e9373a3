"""The one form that offline data are brought to, and what of it is checked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection, unravel_key
from torch import Tensor
from torchrl.data import Composite, TensorDictReplayBuffer, TensorSpec, Unbounded

from layeredrl_trl import keys
from layeredrl_trl.data.dataset_spaces import (
    Source,
    Space,
    action_and_spec,
    is_image,
    space_entries,
    to_vector,
)
from layeredrl_trl.data.episodes import (
    EPISODE,
    SPLIT_MASK,
    Rows,
    check_numbers,
    fixed_buffer,
    mark_gaps,
    to_rows,
    unknown_next,
)
from layeredrl_trl.data.positions import leaf_keys

_ENDS = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)
# At the root they say nothing of a step, or nothing any more.
_LEFT_OUT = (*_ENDS, keys.REWARD, keys.INDEX, keys.MASK, SPLIT_MASK)


@dataclass(frozen=True)
class Dataset:
    """A dataset that was read, and what one needs to build a predictor for it.

    Attributes:
        buffer: rows ``[N]``, which cannot be extended; see :func:`read_dataset`.
        observation_spec: of ``observation``, without bounds: shape ``[O]``, or that of an image; a
            ``Composite`` of the entries if these were not joined.
        action_spec: of ``action``, shape ``[A]``.
        env_id: of the Gymnasium env that the dataset comes from, where its files tell.
        num_episodes: episodes, whole or cut off.
        num_steps: ``N``.
        layout: the dims of each entry in ``observation``, as
            :func:`~layeredrl_trl.envs.observation_layout` gives them; empty if the entries were not
            joined, or ``observation`` is no vector.
    """

    buffer: TensorDictReplayBuffer
    observation_spec: TensorSpec
    action_spec: TensorSpec
    env_id: str | None
    num_episodes: int
    num_steps: int
    layout: dict[NestedKey, range]


class Observations(NamedTuple):
    """The observations before and after each step, by their keys (without ``"next"``)."""

    now: dict[NestedKey, Tensor]
    reached: dict[NestedKey, Tensor]
    layout: dict[NestedKey, range]
    read: set[NestedKey]


def to_dataset(
    source: Source, action_spec: TensorSpec | None, join: bool | Sequence[NestedKey]
) -> Dataset:
    """Bring steps to the form that ``read_dataset`` promises, and check them.

    Raises:
        ValueError: as ``read_dataset``.
    """
    name = source.name
    rows = _rows(source)
    n = len(rows.last)
    observations = _observations(rows.data, source, join)
    action, action_spec = action_and_spec(
        rows.data.get(keys.ACTION), source.action_space, action_spec, name
    )
    reward = rows.data.get(keys.NEXT_REWARD).reshape(n, 1).to(torch.float32)
    numbers = {**observations.now, keys.ACTION: action, keys.NEXT_REWARD: reward}
    reached = {_next(key): x for key, x in observations.reached.items()}
    check_numbers(numbers | reached, list(observations.now), name)
    last, drop = rows.last, torch.zeros_like(rows.last)
    if not source.complete:
        last, drop, mended = _mend_ends(rows, observations, name)
        reached = {_next(key): x for key, x in mended.items()}
    truncated = rows.truncated | (last & ~rows.terminated)
    flags = {
        keys.NEXT_TERMINATED: rows.terminated.reshape(n, 1),
        keys.NEXT_TRUNCATED: truncated.reshape(n, 1),
        keys.NEXT_DONE: (truncated | rows.terminated).reshape(n, 1),
    }
    others = _others(rows.data, observations.read)
    data = TensorDict({**others, **numbers, **reached, **flags}, batch_size=[n])
    if drop.any():
        data, last = data[~drop], last[~drop]
    if not len(data):
        raise ValueError(f"{name}: no step is left whose next observation is stored.")
    data[EPISODE] = last.cumsum(0) - last.long()
    specs = {key: Unbounded(x.shape[1:], dtype=x.dtype) for key, x in observations.now.items()}
    is_one = list(specs) == [keys.OBSERVATION]
    return Dataset(
        buffer=fixed_buffer(data),
        observation_spec=specs[keys.OBSERVATION] if is_one else Composite(specs),
        action_spec=action_spec,
        env_id=source.env_id,
        num_episodes=int(last.sum()),
        num_steps=len(data),
        layout=observations.layout,
    )


def _rows(source: Source) -> Rows:
    """Check that the entries that are needed are there, and find the episodes."""
    data, name = source.data, source.name
    if data.ndim not in (1, 2) or not data.numel():
        raise ValueError(
            f"{name}: expected steps of batch size [N] or [episodes, T], got "
            f"{list(data.batch_size)}."
        )
    if missing := [k for k in (keys.ACTION, keys.NEXT_REWARD) if data.get(k, None) is None]:
        raise ValueError(f"{name}: expected the entries {missing}, there are {leaf_keys(data)}.")
    try:
        rows = to_rows(data)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error
    if not rows.flagged:
        raise ValueError(
            f"{name}: nothing tells where episodes end: expected one of {list(_ENDS)} under "
            "'next', or an id as ('collector', 'traj_ids') or 'episode'; there are "
            f"{leaf_keys(data)}."
        )
    reward = rows.data.get(keys.NEXT_REWARD)
    if not len(rows.last) or reward.numel() != len(rows.last):
        raise ValueError(
            f"{name}: expected one reward for each of {len(rows.last)} steps, got "
            f"{list(reward.shape)}."
        )
    return rows


def _mend_ends(
    rows: Rows, observations: Observations, name: str
) -> tuple[Tensor, Tensor, dict[NestedKey, Tensor]]:
    """End episodes where rows do not follow each other, and treat unknown next observations.

    Returns:
        Which steps are the last of an episode, and which ones are to be left out, bool ``[N]``; and
        the next observations.
    """
    flat = [_as_one(side) for side in (observations.now, observations.reached)]
    last = mark_gaps(rows, *flat, name)
    unknown = unknown_next(*flat, rows.terminated, last)
    drop = unknown & ~rows.terminated
    if not unknown.any():
        return last, drop, observations.reached
    warnings.warn(
        f"{name}: what {int(unknown.sum())} last steps of episodes lead to is not stored: "
        f"{int(drop.sum())} that are truncated are left out, {int((unknown & ~drop).sum())} "
        "that are terminated keep their observation.",
        stacklevel=4,
    )
    last = last.clone()
    last[:-1] |= drop[1:]

    def mend(now: Tensor, reached: Tensor) -> Tensor:
        return torch.where(unknown.reshape(-1, *(1,) * (now.ndim - 1)), now, reached)

    now = observations.now
    return last, drop, {key: mend(now[key], x) for key, x in observations.reached.items()}


def _observations(
    data: TensorDictBase, source: Source, join: bool | Sequence[NestedKey]
) -> Observations:
    """Read the entries of the observation before and after each step, and join them."""
    spaces = _entries(data, source, join)
    for key in spaces:
        for stored in (key, _next(key)):
            if not isinstance(data.get(stored, None), Tensor):
                raise ValueError(
                    f"{source.name}: expected the observation entry {stored!r}, there are "
                    f"{leaf_keys(data)}. join_observations=[...] names others."
                )
    sides = []
    for at in (lambda key: key, _next):
        sides.append({key: _values(data.get(at(key)), s, source.name) for key, s in spaces.items()})
    read = {unravel_key(at(key)) for at in (lambda key: key, _next) for key in spaces}
    now, reached = sides
    if join is False and len(spaces) > 1:
        return Observations(now, reached, {}, read)
    if len(spaces) == 1:
        (now,), (reached,) = now.values(), reached.values()
    else:
        if images := [key for key, x in now.items() if x.ndim > 2]:
            raise ValueError(
                f"{source.name}: the entries {images} are images and cannot be joined to a vector; "
                "pass join_observations=False, or the keys of vectors to join."
            )
        now, reached = (torch.cat(list(side.values()), -1) for side in sides)
    layout: dict[NestedKey, range] = {}
    if now.ndim == 2:
        sizes = [x.shape[-1] for x in sides[0].values()]
        names = [_entry_name(key) for key in spaces]
        ends = accumulate(sizes)
        layout = {k: range(e - s, e) for k, e, s in zip(names, ends, sizes, strict=True)}
    joined = ({keys.OBSERVATION: side} for side in (now, reached))
    return Observations(*joined, layout, read)


def _entries(
    data: TensorDictBase, source: Source, join: bool | Sequence[NestedKey]
) -> dict[NestedKey, Space | None]:
    """List the entries of the observation in their order, each with its space if it is known."""
    if not isinstance(join, bool):
        return dict.fromkeys(map(unravel_key, join))
    space, stored = source.observation_space, data.get(keys.OBSERVATION, None)
    if not is_tensor_collection(stored):
        has_entries = space is None or "subspaces" in space
        return {keys.OBSERVATION: None if has_entries else space}
    if space is None or "subspaces" not in space:
        return {unravel_key((keys.OBSERVATION, k)): None for k in stored.keys(True, True)}
    return {(keys.OBSERVATION, *path): inner for path, inner in space_entries(space).items()}


def _values(values: Tensor, space: Space | None, name: str) -> Tensor:
    """Turn an entry into vectors ``[N, K]``; images stay as they are."""
    is_array = values.ndim > 2 if space is None else is_image(space)
    if not is_array:
        return to_vector(values, space, f"{name}: observation")
    return values.to(torch.float32) if values.dtype is torch.float64 else values


def _as_one(entries: dict[NestedKey, Tensor]) -> Tensor:
    """Join entries to ``[N, K]``; a single one is not copied."""
    flat = [x.flatten(1) for x in entries.values()]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


def _others(data: TensorDictBase, read: set[NestedKey]) -> dict[NestedKey, Tensor]:
    """Take what else is stored, with numbers of float64 in float32."""
    kept = {}
    for key in data.keys(True, True):
        path = (key,) if isinstance(key, str) else key
        of = path[1] if path[0] == "next" and len(path) > 1 else path[0]
        value = data.get(key)
        is_read = of in (keys.OBSERVATION, keys.ACTION) or key in read
        if is_read or key in _LEFT_OUT or not isinstance(value, Tensor):
            continue
        kept[key] = value.to(torch.float32) if value.dtype is torch.float64 else value
    return kept


def _entry_name(key: NestedKey) -> NestedKey:
    """Name an entry of the observation without ``"observation"``, if it lies under that."""
    if isinstance(key, tuple) and key[0] == keys.OBSERVATION:
        return unravel_key(key[1:])
    return key


def _next(key: NestedKey) -> NestedKey:
    return unravel_key(("next", key))
