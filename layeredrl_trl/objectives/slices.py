"""Reading masked slices so that nothing behind the mask is ever looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

Reader = Callable[[Sequence[NestedKey], Tensor], TensorDictBase]
"""Reads the named entries at steps ``[B, J]`` of ``B`` slices, as a TensorDict ``[B, J]``."""


def rows_with_data(mask: Tensor) -> Tensor:
    """Say which slice to read for each: itself, or where it is nothing but padding one that is not.

    It stays masked, but nothing that it holds (NaN, for all one knows) is ever looked at.

    Args:
        mask: bool ``[B, T]``.

    Returns:
        long ``[B]``.
    """
    real = mask[:, 0]
    return torch.where(real, torch.arange(len(real), device=real.device), real.byte().argmax())


def read_steps(
    slices: TensorDictBase, row: Tensor, names: Sequence[NestedKey], steps: Tensor
) -> TensorDictBase:
    """Read ``slices`` ``[N, T]`` at ``row`` ``[B]`` and ``steps`` ``[B, J]``, where there."""
    return slices.select(*names, strict=False)[row[:, None], steps]


def zero_where_not(mask: Tensor, x: Tensor) -> Tensor:
    """Set ``x`` to 0 where ``mask`` is False; ``mask`` has the leading dims of ``x``.

    What does not count may hold anything. Masking the loss alone would not do: backward, a
    gradient of 0 times NaN is NaN.
    """
    mask = mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))
    return torch.where(mask, x, torch.zeros_like(x))


def per_step(
    tensordict: TensorDictBase, key: NestedKey, batch: torch.Size, *, flag: bool = False
) -> Tensor:
    """Get an entry ``[*batch, 1]`` and refuse any other shape: it would broadcast into nonsense.

    Args:
        tensordict: holds the entry.
        key: of the entry.
        batch: its shape but for the trailing 1.
        flag: return it as bool; ``~`` of a flag stored as a number would be something else.

    Raises:
        KeyError: if the entry is missing; names it and those that are there.
        ValueError: naming ``key`` and both shapes.
    """
    x = tensordict.get(key, default=None)
    if x is None:
        there = sorted(str(name) for name in tensordict.keys(True, True))
        raise KeyError(f"The batch has no {key!r}; it has {there}.")
    if x.shape != (*batch, 1):
        raise ValueError(
            f"{key}: expected shape {[*batch, 1]} (a trailing dim of 1), got {list(x.shape)}."
        )
    return x != 0 if flag and x.dtype is not torch.bool else x
