"""Reading some entries of a replay buffer, at given storage positions or of drawn slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn.utils import _set_dispatch_td_nn_modules
from torch import Tensor
from torchrl.data import ReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.storages.utils import _collate_id

from layeredrl_trl.data.buffers import check_slice_len
from layeredrl_trl.data.positions import gather, leaf_keys, stack_index
from layeredrl_trl.data.slice_sampler import TransitionSliceSampler
from layeredrl_trl.functional import rows_with_data
from layeredrl_trl.keys import INDEX, MASK


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
    names = (*keys, *optional_keys)
    with locked(buffer):
        _check_not_empty(buffer, keys)
        index = _checked_index(index, buffer.storage)
        rows = _stored(buffer, index, names)
        return _entries(buffer, rows, index[0].shape, keys, names)


def read_slices(
    buffer: ReplayBuffer,
    sampler: TransitionSliceSampler,
    num_slices: int,
    slice_len: int,
    keys: Sequence[NestedKey],
    optional_keys: Sequence[NestedKey] = (),
) -> TensorDict:
    """Draw slices and read some of their entries, while nobody writes to the buffer.

    A slice that is all padding is replaced by another one; its mask stays False.

    Args:
        buffer: the replay buffer; its own sampler is not asked.
        sampler: draws the slices.
        num_slices: ``B``.
        slice_len: ``T``.
        keys: entries that must exist.
        optional_keys: entries that are read if they exist.

    Returns:
        A new TensorDict ``[B, T]`` with the entries, ``("collector", "mask")`` ``[B, T, 1]`` and
        ``index``, the storage positions ``[B, T]`` or ``[B, T, ndim]``.

    Raises:
        What :func:`read_transitions` and :class:`~layeredrl_trl.data.TransitionSliceSampler` raise.
    """
    names = (*keys, *optional_keys)
    check_slice_len(buffer, slice_len)
    with locked(buffer):
        _check_not_empty(buffer, keys)
        index, mask = sampler.sample_slices(buffer.storage, num_slices, slice_len)
        row = rows_with_data(mask)
        index = tuple(i[row] for i in index)
        rows = _stored(buffer, index, names)
        # transforms may look at what is stored, as HindsightGoals does
        steps = _entries(buffer, rows, mask.shape, keys, names)
    steps.set(MASK, mask.unsqueeze(-1))
    return steps.set(INDEX, stack_index(index))


@contextmanager
def locked(buffer: ReplayBuffer) -> Iterator[None]:
    """Keep every buffer of this storage from writing to it; not to be nested.

    The locks are those that TorchRL's buffers hold while they sample or extend.
    """
    attached = {id(x): x for x in buffer.storage._attached_entities if hasattr(x, "_replay_lock")}
    attached[id(buffer)] = buffer
    with ExitStack() as locks:
        for _, one in sorted(attached.items()):  # in one order, so that no two wait for each other
            locks.enter_context(one._replay_lock)
            locks.enter_context(one._write_lock)
        yield


def has_plain_columns(buffer: ReplayBuffer) -> bool:
    """Tell whether ``buffer.sample()`` returns the stored entries as they are."""
    storage, transform = buffer.storage, buffer.transform
    return (
        isinstance(storage, TensorStorage)
        and is_tensor_collection(storage._storage)
        and (transform is None or len(transform) == 0)
        and buffer._collate_fn is _collate_id
    )


def _check_not_empty(buffer: ReplayBuffer, keys: Sequence[NestedKey]) -> None:
    if len(buffer.storage) == 0:
        raise ValueError(f"Cannot read {list(keys)}: the replay buffer is empty.")


def _stored(
    buffer: ReplayBuffer, index: tuple[Tensor, ...], names: Sequence[NestedKey]
) -> TensorDictBase | dict[NestedKey, Any]:
    """Read what is stored: the named entries ``[*S]`` of columns, else whole rows, flat.

    Without gradient: imagined steps may have been stored with theirs.

    ``buffer[index]`` would not do: for a storage of two dims it reads (and transforms) the whole
    buffer, and expects the index in the order (env, time).
    """
    storage = buffer.storage
    if not has_plain_columns(buffer):
        rows = storage.get(tuple(position.reshape(-1) for position in index))
        return rows.detach() if is_tensor_collection(rows) else rows
    data = storage._storage
    n_stored = None if storage._is_full else storage._len_along_dim0
    entries: dict[NestedKey, Any] = {}
    for key in names:
        value = data.get(key, None)
        if value is not None:
            value = value[:n_stored]
            value = gather(value, index) if isinstance(value, Tensor) else value[index]
            value = value.detach()
        entries[key] = value
    return entries


def _entries(
    buffer: ReplayBuffer,
    rows: TensorDictBase | dict[NestedKey, Any],
    shape: torch.Size,
    keys: Sequence[NestedKey],
    names: Sequence[NestedKey],
) -> TensorDict:
    """Make a TensorDict ``[*S]`` of what :func:`_stored` read."""
    plain = isinstance(rows, dict)
    source = buffer.storage._storage if plain else transformed(buffer, rows, shape)
    entries = rows if plain else {key: source.get(key, None) for key in names}
    missing = [key for key in keys if entries[key] is None]
    if missing:
        raise KeyError(
            f"The replay buffer has no entry {', '.join(map(repr, missing))}; "
            f"it has {leaf_keys(source)}."
        )
    entries = {key: _as_float32(value) for key, value in entries.items() if value is not None}
    return TensorDict(entries, batch_size=shape)


def transformed(buffer: ReplayBuffer, rows: Any, shape: torch.Size) -> TensorDictBase:
    """Do with rows what ``buffer.sample()`` does with those that its sampler has drawn."""
    data = buffer._collate_fn(rows)
    if not is_tensor_collection(data):
        raise TypeError(f"Expected the replay buffer to hold TensorDicts, got {type(data)}.")
    transform = buffer.transform
    if transform is not None and len(transform):
        try:
            with data.unlock_(), _set_dispatch_td_nn_modules(True):
                data = transform(data)
        except RuntimeError as error:  # NotImplementedError among them
            raise ValueError(
                "The transforms of the replay buffer fail on a batch of slices, as they would in "
                "buffer.sample(). Those that work in an environment only belong there. They say: "
                f"{type(error).__name__}: {error}"
            ) from error
    if data.batch_size.numel() != shape.numel():
        raise ValueError(
            f"The transforms of the replay buffer made a batch of size {list(data.batch_size)} of "
            f"{shape.numel()} steps: expected as many steps as before."
        )
    return data.reshape(shape)


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
