"""Offline data: what others left on disk, as a replay buffer to learn from.

Read as they lie there are Minari's datasets, the folders of TorchRL's dataset classes, plain
memory-mapped TensorDicts, and what ``buffer.dumps`` saved. Each reader gives a ``Source``, which
``dataset_form`` brings to one form and checks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tensordict import NestedKey, TensorDictBase, is_tensor_collection
from torchrl.data import ReplayBuffer, TensorSpec, TensorStorage

from layeredrl_trl.checks import check_keys
from layeredrl_trl.data.dataset_form import Dataset, to_dataset
from layeredrl_trl.data.dataset_spaces import Source, checked_space
from layeredrl_trl.data.memmap_folder import META, read_json, read_memmap
from layeredrl_trl.data.minari_folder import FILE, METADATA, env_id_of, read_minari

_TORCHRL_METADATA = "env_metadata.json"
_LOOKED_FOR = (
    f"data/{FILE} (Minari), {META} (a memory-mapped TensorDict, or a dataset of TorchRL) or "
    f"storage/{META} (buffer.dumps)"
)


def read_dataset(
    source: str | os.PathLike | ReplayBuffer,
    *,
    action_spec: TensorSpec | None = None,
    join_observations: bool | Sequence[NestedKey] = True,
) -> Dataset:
    """Read offline data into a replay buffer, and check what was read.

    Every episode of the buffer ends with a flag, so that no slice crosses its end: a last step that
    is stored as neither terminated nor truncated is truncated. The order of the rows stays.

    Where what follows the last step of an episode is not stored (TorchRL's readers of D4RL and
    OpenX write zeros or the next episode's first observation), there is a warning: a truncated step
    is left out, and the step before it is truncated; a terminated one keeps its observation as its
    next observation, so that termination is learned.

    Numbers become float32. Large entries of TensorDict folders that need no change stay on disk,
    mapped so that no write reaches the files. Nothing is unpickled and no env is made.

    Args:
        source: the folder of a dataset of Minari (or its id in Minari's local storage), of a
            dataset class of TorchRL, of a TensorDict saved by ``memmap`` or ``save`` with batch
            size ``[N]`` or ``[episodes, T]``, or of ``buffer.dumps``; or a replay buffer, whose
            transforms are applied.
        action_spec: of ``action``, where the files do not tell or tell it wrongly. Otherwise a
            guess: one-hot rows or integers ``[N]`` are one choice (of as many as there are);
            numbers are bounded by -1 and 1 if all lie there, else by the least and the largest of
            each dim.
        join_observations: whether observations of several entries become one vector
            ``observation``, in the order of Gymnasium's ``FlattenObservation``; or the keys to
            join, in this order, as for a ``CatTensors``. False keeps them as
            ``("observation", entry)``.

    Returns:
        The :class:`Dataset`. Its buffer stores ``observation`` ``[N, O]``, ``action`` ``[N, A]``,
        under ``"next"`` ``observation`` ``[N, O]``, ``reward``, ``terminated``, ``truncated`` and
        ``done`` (each ``[N, 1]``), ``episode`` ``[N]`` (counted from 0), and what else was stored.

    Raises:
        TypeError: if ``source`` or ``action_spec`` is of another kind, or a buffer stores no
            TensorDicts as tensors.
        ValueError: if there is nothing known at ``source``; if it is damaged, lacks an entry or
            would have to be unpickled; if nothing tells where episodes end, a number is not finite,
            or all observations are 0.
        ImportError: if h5py is missing, for a Minari dataset.

    Example:
        >>> import tempfile
        >>> from tensordict import TensorDict
        >>> steps = {"observation": torch.rand(6, 3), "action": torch.rand(6, 1)}
        >>> done = torch.tensor([0, 0, 1, 0, 0, 1]).bool().unsqueeze(-1)
        >>> next_steps = {"observation": torch.rand(6, 3), "reward": torch.rand(6, 1), "done": done}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = TensorDict({**steps, "next": next_steps}, batch_size=[6]).memmap(folder)
        ...     dataset = read_dataset(folder)
        >>> dataset.num_episodes, dataset.observation_spec.shape, dataset.action_spec.shape
        (2, torch.Size([3]), torch.Size([1]))
    """
    if action_spec is not None and not isinstance(action_spec, TensorSpec):
        raise TypeError(f"action_spec: expected a TensorSpec, got {type(action_spec).__name__}.")
    if not isinstance(join_observations, bool):
        check_keys("join_observations", join_observations)
    if isinstance(source, ReplayBuffer):
        found = _from_buffer(source)
    elif isinstance(source, str | os.PathLike):
        found = _from_disk(source)
    else:
        raise TypeError(
            "source: expected the path of a dataset, the id of a Minari dataset or a replay "
            f"buffer, got {type(source).__module__}.{type(source).__name__}."
        )
    return to_dataset(found, action_spec, join_observations)


def _from_disk(source: str | os.PathLike) -> Source:
    """Find out what lies at a path, and read it."""
    folder = Path(source)
    if not folder.exists() and isinstance(source, str):
        local = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
        if not (folder := Path(local) / source).exists():
            raise ValueError(
                f"source: there is nothing at {source!r}, and no Minari dataset of this id in "
                f"{local} (`minari download ID` puts it there)."
            )
    for place in (folder / "data", folder.parent if folder.name == FILE else folder):
        if (place / FILE).is_file():
            return read_minari(place)
    if (folder / "data" / METADATA).is_file():
        kind = read_json(folder / "data" / METADATA).get("data_format")
        raise ValueError(
            f"{folder} is a Minari dataset in the format {kind!r}; only 'hdf5' is read. Write it "
            "anew with data_format='hdf5'."
        )
    if (folder / "storage" / META).is_file():
        return Source(_dumped(folder), str(folder))
    if (folder / META).is_file():
        of_whole = folder.with_name(folder.name.removesuffix("_split"))  # as TorchRL names them
        return _with_spaces(read_memmap(folder), str(folder), of_whole / _TORCHRL_METADATA)
    raise ValueError(f"source: {folder} holds no dataset: looked for {_LOOKED_FOR}.")


def _with_spaces(data: TensorDictBase, name: str, file: Path) -> Source:
    """Add what TorchRL's reader of Minari datasets noted of the spaces, if it is there."""
    if not file.is_file():
        return Source(data, name)
    metadata = read_json(file)
    stored = {key: metadata.get(key) for key in ("observation_space", "action_space")}
    spaces = {
        key: None if space is None else checked_space(space, f"{file}: {key}")
        for key, space in stored.items()
    }
    return Source(data, name, **spaces, env_id=env_id_of(metadata))


def _dumped(folder: Path) -> TensorDictBase:
    """Read what ``buffer.dumps`` saved, the oldest step first."""
    data = read_memmap(folder / "storage")
    length = read_json(folder / "storage" / "storage_metadata.json").get("len")
    writer = folder / "writer" / METADATA  # a writer that does not write leaves none
    cursor = read_json(writer).get("cursor", 0) if writer.is_file() else 0
    rows = data.batch_size[0] if data.ndim else 0
    if type(length) is not int or type(cursor) is not int or not 0 <= cursor <= rows:
        raise ValueError(f"{folder}: its storage has {rows} rows, len={length}, cursor={cursor}.")
    if data.ndim == 2 and (length != rows or cursor % rows):
        # a storage of two dims, time first, which counts the steps of all envs
        return _oldest_first(data, length // data.batch_size[1], cursor).transpose(0, 1)
    return _oldest_first(data, length, cursor)


def _oldest_first(data: TensorDictBase, length: int, cursor: int, dim: int = 0) -> TensorDictBase:
    """Cut off what was not written, and turn a ring so that it begins behind its last row."""
    rows = data.batch_size[dim]
    before = (slice(None),) * dim
    if length < rows:
        return data[(*before, slice(length))]
    return data[(*before, torch.arange(rows).roll(-cursor))] if cursor % rows else data


def _from_buffer(buffer: ReplayBuffer) -> Source:
    storage, name = buffer.storage, type(buffer).__name__
    if not isinstance(storage, TensorStorage) or not is_tensor_collection(storage._storage):
        raise TypeError(
            f"source: expected a buffer that stores TensorDicts as tensors, got a {name} with a "
            f"{type(storage).__name__}, or nothing in it."
        )
    data = buffer[:].cpu()
    is_time_first = storage.ndim > 1 and not buffer.dim_extend
    time_dim = 1 if storage.ndim > 1 and not is_time_first else 0
    cursor = getattr(buffer._writer, "_cursor", 0) if storage._is_full else 0
    data = _oldest_first(data, data.batch_size[time_dim], int(cursor), time_dim)
    data = data.transpose(0, 1) if is_time_first else data
    file = getattr(buffer, "metadata_path", Path())  # of a MinariExperienceReplay
    return _with_spaces(data, f"source: {name}", file)
