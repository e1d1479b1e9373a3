"""Where episodes end in a storage, and following stored steps up to there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchrl.data import RoundRobinWriter, TensorDictMaxValueWriter, TensorStorage
from torchrl.data.replay_buffers import WriterEnsemble
from torchrl.data.replay_buffers.storages import Storage

from layeredrl_trl.data.positions import flat_position, gather


class Columns(NamedTuple):
    """The stored entries that tell where an episode ends, each of the whole storage.

    Attributes:
        ends: flags of an episode's last step, to be OR-ed.
        traj: trajectory ids, or ``None``.
        init: flag of an episode's first step, or ``None``.
        mask: False on stored padding, or ``None``.
        device: of the storage.
    """

    ends: list[Tensor]
    traj: Tensor | None
    init: Tensor | None
    mask: Tensor | None
    device: torch.device


def check_writers(storage: Storage) -> None:
    """Check that consecutive rows of a storage may be consecutive steps.

    Raises:
        TypeError: if a writer puts each row in the place of any other.
    """
    for writer in (getattr(x, "_writer", None) for x in storage._attached_entities):
        if isinstance(writer, (TensorDictMaxValueWriter, WriterEnsemble)):
            raise TypeError(
                f"buffer: its {type(writer).__name__} keeps rows of its choice, so that rows that "
                "follow each other are no consecutive steps. Leave the writer out."
            )


def walk(
    storage: TensorStorage, columns: Columns, start: tuple[Tensor, ...], slice_len: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Follow each start for ``T`` steps, up to the first boundary.

    Args:
        storage: of the replay buffer.
        columns: of ``storage``.
        start: one LongTensor ``[B]`` per storage dim (time first).
        slice_len: ``T``.

    Returns:
        The storage positions, one LongTensor ``[B, T]`` per storage dim, and the mask ``[B, T]``,
        True on real steps; past the last of these it repeats.
    """
    if slice_len == 1 and columns.mask is None:  # nothing is followed
        index = tuple(i.unsqueeze(-1) for i in start)
        return index, torch.ones_like(index[0], dtype=torch.bool)
    shape = storage.shape
    rows, lanes = shape[0], shape[1:]
    first, lane = start[0].unsqueeze(-1), [i.unsqueeze(-1) for i in start[1:]]
    offset = torch.arange(slice_len, device=columns.device)
    time = (first + offset) % rows
    position = flat_position((time, *lane), lanes)

    # cut[:, j]: step j + 1 of the window does not continue step j
    cut = torch.zeros_like(time, dtype=torch.bool)
    for row in _last_rows(storage, rows):
        cut |= time == row
    for column in columns.ends:
        cut |= read_flags(column, position, storage.ndim)
    cut = cut[:, :-1]
    if columns.traj is not None:
        ids = _read(columns.traj, position, storage.ndim)
        cut |= _any_feature(ids[:, 1:] != ids[:, :-1])
    if columns.init is not None:
        cut |= read_flags(columns.init, position, storage.ndim)[:, 1:]
    if columns.mask is not None:
        real = read_flags(columns.mask, position, storage.ndim)
        cut |= ~real[:, 1:]

    last = (cut.cumsum(-1) == 0).sum(-1, keepdim=True)
    mask = offset <= last
    if columns.mask is not None:
        mask &= real[:, :1]
    time = (first + torch.minimum(offset, last)) % rows
    return (time, *(i.expand_as(time) for i in lane)), mask


def _read(column: Tensor, position: Tensor, ndim: int) -> Tensor:
    """Read a stored entry at positions ``[B, T]``: ``[B, T, *F]``."""
    return gather(column.flatten(0, ndim - 1), (position,))


def read_flags(column: Tensor, position: Tensor, ndim: int) -> Tensor:
    """Read a stored flag at positions ``[B, T]``: bool, ``[B, T]``."""
    return _any_feature(_read(column, position, ndim)).bool()


def _any_feature(value: Tensor) -> Tensor:
    """Reduce ``[B, T, *F]`` to ``[B, T]``, True where any feature is."""
    if value.ndim == 2:
        return value
    return value.squeeze(-1) if value.shape[2:] == (1,) else value.flatten(2).any(-1)


def _last_rows(storage: TensorStorage, rows: int) -> set[int]:
    """Give the rows along time that nothing stored continues.

    Of a full ring it is the row last written. A storage forgets it when it is loaded from a
    checkpoint, its buffer's writer does not: so both are asked. A full storage that was never
    written (data given at construction) begins at row 0.
    """
    if not storage._is_full:
        return {rows - 1}
    cursor = storage._last_cursor_index
    written = set() if cursor is None else {int(cursor)}
    for buffer in storage._attached_entities:
        writer = getattr(buffer, "_writer", None)
        if isinstance(writer, RoundRobinWriter) and writer._write_count:
            written.add((writer._cursor - 1) % rows)
    return written or {rows - 1}
