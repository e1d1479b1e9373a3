"""Reading some entries of a replay buffer at given storage positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn.utils import _set_dispatch_td_nn_modules
from torch import Tensor
from torchrl.data import ReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.storages.utils import _collate_id


def check_buffer(buffer: object) -> None:
    """Check that the argument ``buffer`` is a TorchRL replay buffer.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(buffer, ReplayBuffer):
        raise TypeError(
            f"buffer: expected a TorchRL replay buffer, got {type(buffer).__module__}."
            f"{type(buffer).__name__}."
        )


def gather(column: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """Read one stored entry at storage positions.

    Args:
        column: the entry of the whole storage, ``[*N, *F]`` with one dim in ``N`` per tensor of
            ``index``.
        index: one LongTensor ``[*S]`` per storage dim, on the column's device.

    Returns:
        ``[*S, *F]``, a plain tensor even if the column is memory-mapped.
    """
    column = column.as_subclass(torch.Tensor)
    if len(index) > 1:
        return column[index]
    features = column.shape[1:]
    # index_select is faster than advanced indexing: twice on rows of features, three times on flat
    # columns.
    flat = column.reshape(-1) if features.numel() == 1 else column
    return flat.index_select(0, index[0].reshape(-1)).view(index[0].shape + features)


def stack_index(index: tuple[Tensor, ...]) -> Tensor:
    """Stack storage positions, one LongTensor ``[*S]`` per storage dim, to one tensor.

    Returns:
        ``[*S]`` for a storage of one dim, else ``[*S, ndim]``.

    Example:
        >>> stack_index((torch.zeros(3, 2, dtype=torch.long),)).shape
        torch.Size([3, 2])
        >>> stack_index((torch.zeros(3, 2, dtype=torch.long),) * 2).shape
        torch.Size([3, 2, 2])
    """
    return index[0] if len(index) == 1 else torch.stack(index, -1)


def flat_position(index: Sequence[Tensor], lanes: torch.Size) -> Tensor:
    """Compute flat positions ``[*S]`` in the storage's memory, as ``np.ravel_multi_index`` does.

    ``index`` is as for :func:`read_transitions`; ``lanes`` are the sizes of the dims after time.
    """
    position = index[0]
    for i, size in zip(index[1:], lanes, strict=True):
        position = position * size + i
    return position


def leaf_keys(tensordict: TensorDictBase) -> list[NestedKey]:
    """List the keys of a TensorDict's entries in sorted order, for the text of an error."""
    return sorted(tensordict.keys(include_nested=True, leaves_only=True), key=str)


def read_transitions(
    buffer: ReplayBuffer,
    index: tuple[Tensor, ...],
    keys: Sequence[NestedKey],
    optional_keys: Sequence[NestedKey] = (),
) -> TensorDict:
    """Read some entries of a replay buffer at storage positions.

    With a tensor storage and without transforms, only the named entries are gathered. Otherwise
    the steps go as one flat batch through the buffer's collate function and transforms, exactly as
    a batch of ``buffer.sample()`` does, and the named entries are taken from the result. Entries
    of floating-point numbers, float16 and bfloat16 included, are cast to float32.

    Args:
        buffer: the replay buffer.
        index: one LongTensor ``[*S]`` per storage dim (time first, then the env's row), as
            ``TransitionSliceSampler.sample_slices`` returns them; ``[B, T]`` for slices.
        keys: entries that must exist.
        optional_keys: entries that are read if they exist.

    Returns:
        A new TensorDict with batch size ``[*S]``, on the storage's device, or on the device to
        which the transforms move it.

    Raises:
        ValueError: if the buffer is empty, or a transform changed the number of steps.
        KeyError: if an entry of ``keys`` does not exist; names it and the existing ones.
        TypeError: if ``index`` is not a tuple of one LongTensor per storage dim.
        IndexError: if a position lies beyond the stored steps.

    Example:
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
        >>> data = {"observation": torch.rand(10, 3).double(), "action": torch.rand(10, 1)}
        >>> _ = buffer.extend(TensorDict(data, batch_size=[10]))
        >>> index = (torch.tensor([[0, 1], [8, 9]]),)
        >>> read_transitions(buffer, index, ["observation"])["observation"].shape
        torch.Size([2, 2, 3])
    """
    storage = buffer.storage
    if len(storage) == 0:
        raise ValueError(f"Cannot read {list(keys)}: the replay buffer is empty.")
    index = _checked_index(index, storage)
    with buffer._replay_lock, buffer._write_lock:
        plain = has_plain_columns(buffer)
        source = storage._storage if plain else _collate_and_transform(buffer, index)
        columns = {key: source.get(key, None) for key in (*keys, *optional_keys)}
        missing = [key for key in keys if columns[key] is None]
        if missing:
            raise KeyError(
                f"The replay buffer has no entry {', '.join(map(repr, missing))}; "
                f"it has {leaf_keys(source)}."
            )
        n_stored = storage._len_along_dim0 if plain and not storage._is_full else None
        entries = {}
        for key, value in columns.items():
            if value is None:
                continue
            if plain:
                value = value[:n_stored]
                value = gather(value, index) if isinstance(value, Tensor) else value[index]
            entries[key] = _as_float32(value)
    return TensorDict(entries, batch_size=index[0].shape)


def has_plain_columns(buffer: ReplayBuffer) -> bool:
    """Tell whether ``buffer.sample()`` returns the stored entries as they are."""
    storage, transform = buffer.storage, buffer.transform
    return (
        isinstance(storage, TensorStorage)
        and is_tensor_collection(storage._storage)
        and (transform is None or len(transform) == 0)
        and buffer._collate_fn is _collate_id
    )


def _collate_and_transform(buffer: ReplayBuffer, index: tuple[Tensor, ...]) -> TensorDictBase:
    """Do what ``buffer.sample()`` does after its sampler has drawn ``index``, on a flat batch.

    ``buffer[index]`` would not do: for a storage of two dims it reads (and transforms) the whole
    buffer, and expects the index in the order (env, time).
    """
    flat = tuple(position.reshape(-1) for position in index)
    data = buffer._collate_fn(buffer.storage.get(flat))
    if not is_tensor_collection(data):
        raise TypeError(f"Expected the replay buffer to hold TensorDicts, got {type(data)}.")
    transform = buffer.transform
    if transform is not None and len(transform):
        with data.unlock_(), _set_dispatch_td_nn_modules(True):
            data = transform(data)
    if data.batch_size.numel() != flat[0].numel():
        raise ValueError(
            f"The transforms of the replay buffer made a batch of size {list(data.batch_size)} of "
            f"{flat[0].numel()} steps: expected as many steps as before."
        )
    return data.reshape(index[0].shape)


def _checked_index(index: tuple[Tensor, ...], storage: Storage) -> tuple[Tensor, ...]:
    if not (
        isinstance(index, tuple)
        and len(index) == storage.ndim
        and all(isinstance(i, Tensor) and i.dtype == torch.long for i in index)
        and all(i.shape == index[0].shape for i in index)
    ):
        raise TypeError(
            f"index: expected a tuple of {storage.ndim} LongTensor(s) of one shape, one for each "
            f"dim of the storage, got {_describe(index)}."
        )
    device = getattr(storage, "device", None)
    return index if device is None else tuple(i.to(device) for i in index)


def _describe(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {value.dtype}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_describe, value))})"
    return repr(value)


def _as_float32(value):
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return value.apply(_as_float32) if is_tensor_collection(value) else value
