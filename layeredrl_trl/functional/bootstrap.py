"""Bootstrap weights: which member of an ensemble learns from which stored transition."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_32_BITS = 0xFFFFFFFF


def bootstrap_weights(index: Tensor, n_members: int, keep: float = 0.5) -> Tensor:
    r"""Draw the weight of a transition for every member: ``1 / keep`` if it learns from it, else 0.

    ``weight = [hash(index, member) < keep 2^32] / keep``. The weights follow from the storage
    position alone, so nothing has to be stored, and they are the same each time the transition is
    drawn, on every device. A transition that overwrites another one takes over its weights. With
    the default ``keep`` a weight has mean 1 and variance 1, as for draws with replacement. A
    fraction ``(1 - keep)^E`` of the transitions is seen by no member.

    Args:
        index: storage positions, integers ``[...]``; see :func:`fold_index` for a storage of more
            than one dim.
        n_members: ``E``, at least 1.
        keep: probability that a member learns from a transition, in (0, 1]; 1 gives weights of 1.

    Returns:
        float32 ``[..., E]``, mean 1 over many positions.

    Raises:
        TypeError: if ``index`` does not hold integers.
        ValueError: if ``n_members`` or ``keep`` is out of its range.

    Reference:
        Osband et al. 2016, arXiv:1602.04621, section 3 (a mask of the data for every head).
        Deviation: the mask is hashed instead of stored, and scaled to mean 1 ("double or
        nothing", Owen & Eckles 2012, arXiv:1106.2125).

    Example:
        >>> bootstrap_weights(torch.arange(10_000), n_members=3).mean(0)
        tensor([1.0, 1.0, 1.0])
    """
    _check_index(index)
    if n_members < 1:
        raise ValueError(f"bootstrap_weights: n_members must be at least 1, got {n_members}.")
    if not 0 < keep <= 1:
        raise ValueError(f"bootstrap_weights: keep must be in (0, 1], got {keep}.")
    # The offset is larger than every position: without it, member i at position e would get the
    # weight of member e at position i.
    member = 0x9E3779B9 + torch.arange(n_members, device=index.device)
    hashed = _mix(_mix(_fold(index)).unsqueeze(-1) ^ _mix(member))
    return (hashed < int(keep * 2**32)).to(torch.float32) / keep


def fold_index(index: Tensor) -> Tensor:
    """Hash positions in a storage of several dims, integers ``[..., ndim]``, to one number each.

    Returns:
        long ``[...]``, from 0 to ``2^32 - 1``; two positions rarely share a number.

    Raises:
        TypeError: if ``index`` does not hold integers.
    """
    _check_index(index)
    folded = _fold(index[..., 0])
    for coordinate in index[..., 1:].unbind(-1):
        folded = _mix(folded) ^ _fold(coordinate)
    return folded


def _check_index(index: Tensor) -> None:
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"index: expected integers, got {index.dtype}.")


def _fold(index: Tensor) -> Tensor:
    """Fold integers to numbers below 2^32."""
    index = index.long()
    return (index ^ (index >> 32)) & _LOW_32_BITS


def _mix(x: Tensor) -> Tensor:
    """Scramble numbers below 2^32, one to one.

    The shifts and products modulo 2^32 are like the last steps of MurmurHash3. The factors are odd,
    and below 2^31 so that no product overflows int64, where devices differ.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x31848BAB), (17, 0x21F0AAAD)):
        x = ((x ^ (x >> shift)) * factor) & _LOW_32_BITS
    return x ^ (x >> 16)
