"""Keeping what does not count from counting."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_where_not(mask: Tensor, x: Tensor) -> Tensor:
    """Set ``x`` to 0 where ``mask`` is False.

    What does not count may hold anything. Masking the loss alone would not do: backward, a
    gradient of 0 times NaN is NaN.

    Args:
        mask: bool ``[...]``, the leading dims of ``x``.
        x: ``[..., *]``.

    Returns:
        As ``x``, of its dtype.

    Example:
        >>> zero_where_not(torch.tensor([True, False]), torch.tensor([[1.0], [torch.nan]])).tolist()
        [[1.0], [0.0]]
    """
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return torch.where(mask, x, torch.zeros_like(x))


def can_read(x: Tensor) -> bool:
    """Say whether a number can be read from ``x`` for nothing, to decide what to do.

    A GPU would have to be waited for, and a graph that is being compiled would break.
    """
    return not (x.is_cuda or torch.compiler.is_compiling())


def known_to_hold(flags: Tensor) -> bool:
    """Say whether all of ``flags`` are True; where that cannot be read for nothing, False.

    Example:
        >>> known_to_hold(torch.tensor([True, True])), known_to_hold(torch.tensor([True, False]))
        (True, False)
    """
    return can_read(flags) and bool(flags.all())
