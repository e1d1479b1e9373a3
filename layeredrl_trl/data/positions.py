"""Positions in a storage: one LongTensor per storage dim, time first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor


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
