"""The data of a tianshou buffer as a replay buffer of TorchRL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl import keys
from layeredrl_trl.checks import check_count

_REQUIRED = ("obs", "act", "rew", "terminated", "truncated")
_OPTIONAL = ("done", "obs_next")
_IGNORED = ("info", "policy")

_RESERVED = (keys.ACTION, keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE, keys.WEIGHT)
_RESERVED = (*_RESERVED, "next", "collector")
"""Names that an entry of a Dict observation cannot have."""

Observation = np.ndarray | dict[str, Any]


class _SubBuffer(NamedTuple):
    """Rows ``start`` to ``start + length - 1``; ``last`` was written last."""

    start: int
    length: int
    last: int


def from_tianshou(
    buffer_arrays: Mapping[str, Any],
    *,
    sizes: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    last_index: Sequence[int] | None = None,
    capacity: int | None = None,
) -> TensorDictReplayBuffer:
    """Make a replay buffer of the arrays of a tianshou ``ReplayBuffer`` or ``VectorReplayBuffer``.

    The rows come in the order in which they were recorded, one sub-buffer after the other, with
    TorchRL's entries. The last step of each sub-buffer is marked as truncated unless an episode
    ends there, and every episode has an id of its own, so no slice joins steps that do not follow
    each other. Floating-point numbers become float32; images and discrete actions keep their dtype.

    Without ``obs_next`` (``ignore_obs_next=True``) the next observation is that of the following
    row. The last step of an episode has none. Where it terminates, it is kept, with its own
    observation in that place and ``weight`` 0: reward and value learn from it, the dynamics do not,
    so they do not learn of terminations. Where it does not, it is left out, and the step before it
    is the last one, marked as truncated.

    Args:
        buffer_arrays: ``obs``, ``act``, ``rew``, ``terminated``, ``truncated`` and, if stored,
            ``obs_next``, each ``[N, ...]`` with all rows of the buffer, also those not filled yet;
            ``done`` is compared, ``info`` and ``policy`` are ignored. Observations may be mappings
            of arrays.
        sizes: rows of each sub-buffer, filled or not, ``N`` in total; ``None``: there is one.
        lengths: filled rows of each sub-buffer; ``None``: all of them.
        last_index: row of each sub-buffer that was written last, counted from the first row of all;
            ``None``: the last filled one of each, as in a buffer that has not begun to overwrite.
        capacity: rows of the new buffer; ``None``: as many as there are steps.

    Returns:
        A buffer with a storage of one dim that holds ``observation`` ``[..., O]`` (of a mapping:
        its own names), ``action`` (``[..., A]``, or integers ``[...]``), ``("next", ...)`` with the
        next observation and ``reward``, ``terminated``, ``truncated``, ``done`` ``[..., 1]``,
        ``("collector", "traj_ids")`` ``[...]`` and, without ``obs_next``, ``weight`` ``[..., 1]``.

    Raises:
        KeyError: if an array is missing; the text names it.
        TypeError: if ``buffer_arrays`` is no mapping, an array is of objects, or a number no
            integer.
        ValueError: if an array is of another length or shape, flags are not 0 or 1 or contradict
            each other, numbers of rows do not fit, or no step is left.

    Reference:
        Weng et al. 2022, JMLR 23(267); tianshou 0.5 to 2.0.

    Example:
        >>> arrays = {"obs": np.arange(4.0)[:, None], "act": np.zeros((4, 2)), "rew": np.ones(4)}
        >>> arrays |= {"terminated": np.array([0, 0, 1, 0]), "truncated": np.zeros(4)}
        >>> buffer = from_tianshou(arrays | {"obs_next": arrays["obs"] + 1}, last_index=[0])
        >>> buffer[:]["observation"].flatten().tolist()
        [1.0, 2.0, 3.0, 0.0]
        >>> buffer[:]["next", "done"].flatten().tolist()
        [False, True, False, True]
    """
    arrays = _checked(buffer_arrays)
    n_rows = len(arrays["rew"])
    subs = _sub_buffers(n_rows, sizes, lengths, last_index)
    row = np.concatenate([_in_order(sub) for sub in subs])
    if capacity is not None:
        check_count("from_tianshou: capacity", capacity, least=max(len(row), 1))
    terminated, truncated = _flags(arrays, row)
    is_last = np.concatenate([np.arange(sub.length) == sub.length - 1 for sub in subs])
    ends = terminated | truncated | is_last
    keep, weight = np.ones(len(row), bool), None
    if "obs_next" in arrays:
        following, next_obs = row, arrays["obs_next"]
    else:
        following, next_obs = np.where(ends, row, np.roll(row, -1)), arrays["obs"]
        keep = ~ends | terminated
        ends = ends | ~np.roll(keep, -1)  # also the step before one that is left out
        weight = ~terminated
    if not keep.any():
        raise ValueError(
            f"from_tianshou: no step is left of {len(row)}; without obs_next one needs a following "
            "one, or terminates."
        )
    truncated = truncated | (ends & ~terminated)
    flags = {keys.TERMINATED: terminated, keys.TRUNCATED: truncated, keys.DONE: ends}
    row, following, ends = row[keep], following[keep], ends[keep]
    of_next = {key: torch.from_numpy(flag[keep, None]) for key, flag in flags.items()}
    entries: dict[str, Any] = {
        **_observation(arrays["obs"], row),
        keys.ACTION: _tensor(arrays["act"][row]),
        "next": {
            **_observation(next_obs, following),
            keys.REWARD: _tensor(arrays["rew"][row].reshape(-1, 1).astype(np.float32)),
            **of_next,
        },
        "collector": {"traj_ids": torch.from_numpy(np.cumsum(ends) - ends)},
    }
    if weight is not None:
        entries[keys.WEIGHT] = _tensor(weight[keep, None].astype(np.float32))
    storage = LazyTensorStorage(len(row) if capacity is None else capacity)
    buffer = TensorDictReplayBuffer(storage=storage)
    buffer.extend(TensorDict(entries, batch_size=[len(row)]))
    return buffer


def _checked(buffer_arrays: Any) -> dict[str, Any]:
    """Return the arrays that are read, all of one length."""
    if not isinstance(buffer_arrays, Mapping):
        raise TypeError(
            "from_tianshou: buffer_arrays: expected a mapping of names to arrays, got "
            f"{type(buffer_arrays).__name__}."
        )
    for name in _REQUIRED:
        if name not in buffer_arrays:
            raise KeyError(f"from_tianshou: {name} is missing; there is {[*buffer_arrays]}.")
    known = (*_REQUIRED, *_OPTIONAL, *_IGNORED)
    if unknown := [name for name in buffer_arrays if name not in known]:
        raise ValueError(f"from_tianshou: unknown entries {unknown}; known are {[*known]}.")
    read = [name for name in known if name in buffer_arrays and name not in _IGNORED]
    arrays = {name: _array(name, buffer_arrays[name]) for name in read}
    for name in ("act", "rew", "terminated", "truncated"):
        if isinstance(arrays[name], dict):
            raise TypeError(f"from_tianshou: {name}: expected an array, got a mapping.")
    n_rows = len(arrays["rew"])
    shapes = {name: _shapes(name, x) for name, x in arrays.items()}
    for shape in shapes.values():
        for name, x in shape.items():
            if x[0] != n_rows:
                raise ValueError(
                    f"from_tianshou: {name}: expected {n_rows} rows, as in rew, got {x[0]}."
                )
    for name in ("rew", "terminated", "truncated", "done"):
        if name in arrays and arrays[name].size != n_rows:
            raise ValueError(
                f"from_tianshou: {name}: expected shape [{n_rows}], got {[*arrays[name].shape]}."
            )
    if "obs_next" in arrays:
        own = {name.removeprefix("obs"): x for name, x in shapes["obs"].items()}
        of_next = {name.removeprefix("obs_next"): x for name, x in shapes["obs_next"].items()}
        if own != of_next:
            raise ValueError(
                f"from_tianshou: obs_next: expected the shapes of obs, {own}, got {of_next}."
            )
    reserved = [name for name in arrays["obs"] if name in _RESERVED] if _is_dict(arrays) else []
    if reserved:
        raise ValueError(f"from_tianshou: obs cannot have entries named {reserved}.")
    return arrays


def _is_dict(arrays: dict[str, Any]) -> bool:
    return isinstance(arrays["obs"], dict)


def _array(name: str, value: Any) -> Observation:
    """Return a value as an array of numbers, or a mapping as a dictionary of such."""
    if isinstance(value, Mapping):
        return {key: _array(f"{name}.{key}", x) for key, x in value.items()}
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"from_tianshou: {name}: expected an array of numbers, got {array.dtype} of a "
            f"{type(value).__name__}; of a Batch pass its items() as a dict."
        )
    if array.ndim == 0:
        raise ValueError(f"from_tianshou: {name}: expected an array with a row for each step.")
    return array


def _shapes(name: str, value: Observation) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, dict):
        return {name: value.shape}
    return {
        key: shape
        for inner, x in value.items()
        for key, shape in _shapes(f"{name}.{inner}", x).items()
    }


def _sub_buffers(
    n_rows: int,
    sizes: Sequence[int] | None,
    lengths: Sequence[int] | None,
    last_index: Sequence[int] | None,
) -> list[_SubBuffer]:
    """Check the numbers of rows, and say where each sub-buffer is."""
    sizes = _counts("sizes", [n_rows] if sizes is None else sizes, None)
    lengths = _counts("lengths", sizes if lengths is None else lengths, len(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ends = [start + max(length, 1) - 1 for start, length in zip(starts, lengths, strict=True)]
    last = _counts("last_index", ends if last_index is None else last_index, len(sizes))
    if sum(sizes) != n_rows:
        raise ValueError(f"from_tianshou: sizes: expected {n_rows} rows in total, got {sizes}.")
    subs = []
    for start, size, length, end, index in zip(starts, sizes, lengths, ends, last, strict=True):
        if length > size:
            raise ValueError(f"from_tianshou: lengths: a sub-buffer of {size} rows has {length}.")
        is_ring = length == size
        if length and not (start <= index <= end if is_ring else index == end):
            expected = f"{start} to {end}" if is_ring else f"{end}, as it is not full"
            raise ValueError(
                f"from_tianshou: last_index: expected {expected}, for the sub-buffer from row "
                f"{start} on, got {index}."
            )
        subs.append(_SubBuffer(start, length, index))
    return subs


def _counts(name: str, values: Any, count: int | None) -> list[int]:
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        raise TypeError(
            f"from_tianshou: {name}: expected a sequence of integers, got {type(values).__name__}."
        )
    for i, value in enumerate(values):
        check_count(f"from_tianshou: {name}[{i}]", value, least=0)
    if count is not None and len(values) != count:
        raise ValueError(
            f"from_tianshou: {name}: expected {count}, one for each sub-buffer, got {len(values)}."
        )
    return [int(value) for value in values]


def _in_order(sub: _SubBuffer) -> np.ndarray:
    """Return the rows of a sub-buffer, the oldest first."""
    oldest = sub.last + 1 - sub.start
    return sub.start + (oldest + np.arange(sub.length)) % max(sub.length, 1)


def _flags(arrays: dict[str, Any], row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``terminated`` and ``truncated`` of rows, bool."""
    flags = {}
    for name in ("terminated", "truncated", "done"):
        if name in arrays:
            numbers = arrays[name].reshape(-1)[row]
            flags[name] = numbers.astype(bool)
            if not (numbers == flags[name]).all():
                raise ValueError(f"from_tianshou: {name}: expected only 0 and 1.")
    ends = flags["terminated"] | flags["truncated"]
    differs = row[flags.get("done", ends) != ends]
    if len(differs):
        raise ValueError(
            "from_tianshou: done: expected terminated or truncated, not so in "
            f"{len(differs)} row(s), the first of them {differs[0]}."
        )
    return flags["terminated"], flags["truncated"]


def _observation(observation: Observation, row: np.ndarray) -> dict[str, Any]:
    """Return rows of the observation by TorchRL's names."""
    if not isinstance(observation, dict):
        return {keys.OBSERVATION: _tensor(observation[row])}
    return {
        name: _observation(x, row) if isinstance(x, dict) else _tensor(x[row])
        for name, x in observation.items()
    }


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor, of numbers in float32 ``[N, ...]`` with at least one dim of features."""
    if array.dtype.kind != "f":
        return torch.from_numpy(array)
    array = array.astype(np.float32)
    return torch.from_numpy(array[:, None] if array.ndim == 1 else array)
