"""Masking of steps that do not count."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_where_not(mask: Tensor, x: Tensor) -> Tensor:
    """Set ``x`` to 0 where ``mask`` is False.

    The mask, bool ``[...]``, has the leading dims of ``x`` ``[..., *]``. Masked entries may hold
    anything, NaN included. Masking the loss alone would not be enough: in the backward pass, a
    gradient of 0 times NaN is NaN.

    Example:
        >>> zero_where_not(torch.tensor([True, False]), torch.tensor([[1.0], [torch.nan]])).tolist()
        [[1.0], [0.0]]
    """
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return torch.where(mask, x, torch.zeros_like(x))


def rows_with_data(mask: Tensor) -> Tensor:
    """Choose which slice to read: itself or, if it is all padding, another one.

    Takes a mask, bool ``[B, T]``, and returns rows, long ``[B]``.
    """
    real = mask[:, 0]
    return torch.where(real, torch.arange(len(real), device=real.device), real.byte().argmax())
