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
    """Set steps of ``x`` ``[B, k, ...]`` to 0 where ``mask`` ``[B, k(, 1)]`` is False.

    What does not count may hold anything. Masking the loss alone would not do: backward, a
    gradient of 0 times NaN is NaN.
    """
    return torch.where(mask.reshape(*mask.shape[:2], *(1,) * (x.ndim - 2)), x, torch.zeros_like(x))


def check_per_step(key: NestedKey, x: Tensor, batch: torch.Size) -> None:
    """Refuse an entry that is not ``[*batch, 1]``: it would broadcast into nonsense.

    Raises:
        ValueError: naming ``key`` and both shapes.
    """
    if x.shape != (*batch, 1):
        raise ValueError(
            f"{key}: expected shape {[*batch, 1]} (a trailing dim of 1), got {list(x.shape)}."
        )
