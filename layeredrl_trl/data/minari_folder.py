"""A dataset as Minari keeps it on disk: one HDF5 file of episodes, and its spaces in JSON.

It is read without Minari, which would make the env, and so run code, where the spaces are missing.
TorchRL 0.14.1's own reader of local Minari datasets returns zeros: so sums over what was read are
compared with sums over the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from layeredrl_trl import keys
from layeredrl_trl.data.dataset_spaces import (
    Source,
    Space,
    checked_space,
    is_image,
    space_entries,
)
from layeredrl_trl.data.memmap_folder import read_json

try:
    import h5py
except ImportError:  # an extra
    h5py = None

FILE = "main_data.hdf5"
METADATA = "metadata.json"
_FLAGS = {"terminations": keys.NEXT_TERMINATED, "truncations": keys.NEXT_TRUNCATED}
_TOLERANCE = 1e-5  # of sums over float32 numbers, relative


def read_minari(folder: Path) -> Source:
    """Read a folder that Minari wrote, with ``main_data.hdf5`` and ``metadata.json``.

    Infos are left out.

    Raises:
        ImportError: if h5py is not installed.
        ValueError: if a file is missing or damaged, says something else than the other one, or
            holds what cannot be read (images as JPEG, texts).
    """
    if h5py is None:
        raise ImportError(
            "read_dataset needs h5py for a Minari dataset: pip install layeredrl_trl[offline]"
        )
    metadata = read_json(folder / METADATA)
    name = str(metadata.get("dataset_id", folder))
    observation_space, action_space = (
        _space(metadata, key, folder) for key in ("observation_space", "action_space")
    )
    _refuse_unreadable(observation_space, metadata, name)
    try:
        with h5py.File(folder / FILE, "r") as file:
            data = _read_episodes(file, observation_space, action_space, metadata, name)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder / FILE} cannot be read as HDF5: {error}") from error
    return Source(data, name, observation_space, action_space, env_id_of(metadata), True)


def _space(metadata: Mapping[str, Any], key: str, folder: Path) -> Space:
    where = f"{folder / METADATA}: {key}"
    try:
        space = json.loads(metadata[key])
    except (KeyError, TypeError, ValueError) as error:
        got = repr(metadata.get(key))[:80]
        raise ValueError(
            f"{where}: expected a space in JSON, as Minari writes it since version 0.4, got {got}."
        ) from error
    return checked_space(space, where)


def env_id_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the id of the Gymnasium env that metadata name; nothing of it is imported or made."""
    try:
        spec = metadata["env_spec"]
        return str((json.loads(spec) if isinstance(spec, str) else spec)["id"])
    except (KeyError, TypeError, ValueError):
        return None


def _refuse_unreadable(space: Space, metadata: Mapping[str, Any], name: str) -> None:
    for path, entry in space_entries(space).items():
        where = f"{name}: observation {'/'.join(path)}".rstrip()
        if is_image(entry) and metadata.get("jpeg_encoding", True):
            raise ValueError(
                f"{where} is images stored as JPEG, which are not decoded here. Save the dataset "
                "with jpeg_encoding=False, or its decoded episodes as a TensorDict."
            )
        if entry["type"] not in ("Box", "Discrete", "MultiDiscrete", "MultiBinary"):
            raise ValueError(f"{where} is of type {entry['type']!r}, which is no vector.")


def _read_episodes(
    file: Any, observation_space: Space, action_space: Space, metadata: Mapping, name: str
) -> TensorDict:
    """Read all episodes one after the other, ``[N]`` steps."""
    numbers = sorted(int(m[1]) for m in map(re.compile(r"episode_(\d+)$").match, file) if m)
    groups = [file[f"episode_{number}"] for number in numbers]
    lengths = [len(_array(group, ("rewards",), name)) for group in groups]
    n = sum(lengths)
    for key, found in (("total_episodes", len(groups)), ("total_steps", n)):
        if metadata.get(key, found) != found:
            raise ValueError(
                f"{name}: {METADATA} says {key}={metadata[key]}, the file holds {found}. The "
                "dataset is damaged."
            )
    if not n:
        raise ValueError(f"{name}: no episode has a step.")
    data: dict[Any, Tensor] = {"episode": torch.empty(n, dtype=torch.int64)}
    sums: dict[Any, Any] = {}

    def put(key: Any, values: np.ndarray, row: int) -> None:
        tensor = torch.from_numpy(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))
        if key not in data:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            data[key] = torch.empty((n, *tensor.shape[1:]), dtype=dtype)
        if tensor.shape[1:] != data[key].shape[1:]:
            raise ValueError(f"{name}: {key} changes its shape from episode to episode.")
        data[key][row : row + len(tensor)] = tensor
        total = tensor.double().abs().sum(0)
        sums[key] = sums[key] + total if key in sums else total

    row, returns = 0, {}
    for number, group, length in zip(numbers, groups, lengths, strict=True):
        where = f"{name}: episode {number}"
        if not length:
            continue
        data["episode"][row : row + length] = number
        for path in space_entries(observation_space):
            x = _array(group, ("observations", *path), where, length + 1)
            put((keys.OBSERVATION, *path), x[:-1], row)
            put((*keys.NEXT_OBSERVATION, *path), x[1:], row)
        for path in space_entries(action_space):
            put((keys.ACTION, *path), _array(group, ("actions", *path), where, length), row)
        reward = _array(group, ("rewards",), where, length).reshape(length, -1)
        if reward.shape[1] != 1:
            raise ValueError(f"{where} has rewards of {reward.shape[1]} numbers, expected one.")
        put(keys.NEXT_REWARD, reward, row)
        returns[number] = reward.sum(dtype=np.float64), np.abs(reward).sum(dtype=np.float64)
        for source, key in _FLAGS.items():
            flag = _array(group, (source,), where, length).reshape(length, -1)
            put(key, flag.astype(bool), row)
        row += length
    _compare(data, sums, returns, name)
    return TensorDict(data, batch_size=[n])


def _array(group: Any, path: tuple[str, ...], where: str, rows: int | None = None) -> np.ndarray:
    """Read an array of numbers of an episode."""
    found = group.get("/".join(path)) if isinstance(group, h5py.Group) else None
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{where} has no array {'/'.join(path)!r}. The dataset is damaged.")
    if found.dtype.kind not in "biuf" or not found.shape:
        raise ValueError(f"{where}: {'/'.join(path)!r} is no array of numbers, but {found.dtype}.")
    if rows is not None and found.shape[0] != rows:
        raise ValueError(
            f"{where}: expected {rows} rows of {'/'.join(path)!r}, got {found.shape[0]}. (Minari "
            "stores one observation more than actions, rewards and flags.)"
        )
    return found[()]


def _compare(data: dict, sums: dict, returns: dict[int, tuple[float, float]], name: str) -> None:
    """Compare what was read with the file: sums over all columns, and the return of each episode.

    ``returns`` holds the return of each episode and the sum of its absolute rewards. What is not
    finite is left to later checks.
    """
    for key, total in sums.items():
        read = data[key].double().abs().sum(0)
        if (read.isfinite() & ~torch.isclose(read, total, rtol=_TOLERANCE)).any():
            raise ValueError(
                f"{name}: {key} was read wrongly: it adds up to {read.sum()}, in the file to "
                f"{total.sum()}."
            )
    numbers, rows = data["episode"].unique_consecutive(return_counts=True)
    rewards = data[keys.NEXT_REWARD].double().split(rows.tolist())
    for number, reward in zip(numbers.tolist(), rewards, strict=True):
        expected, scale = returns[number]
        is_equal = np.isclose(reward.sum(), expected, atol=_TOLERANCE * scale)
        if reward.isfinite().all() and not is_equal:
            raise ValueError(
                f"{name}: episode {number} was read wrongly: it has a return of {reward.sum()}, "
                f"in the file of {expected}."
            )
