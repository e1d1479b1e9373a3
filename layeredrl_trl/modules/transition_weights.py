"""How much each transition of a batch counts, for every member or for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_weight(weight: Tensor, batch: Sequence[int], n_models: int) -> None:
    """Check that there is one weight per transition, or one for each of ``E`` members.

    Raises:
        ValueError: if the shape is neither ``[*batch, 1]`` nor ``[*batch, E]``.
    """
    if weight.shape not in ((*batch, 1), (*batch, n_models)):
        raise ValueError(
            f"weight: expected shape {[*batch, 1]} or {[*batch, n_models]}, "
            f"got {list(weight.shape)}."
        )


def multiply_weights(
    factors: Sequence[Tensor], batch: Sequence[int], mask: Tensor | None
) -> Tensor | None:
    """Multiply weights, and set them to 0 where a mask is False, whatever they are there.

    Args:
        factors: weights ``[*batch, 1]`` or ``[*batch, E]``.
        batch: shape of the batch.
        mask: bool ``[*batch, 1]`` or ``[*batch]``.

    Returns:
        ``[*batch, 1]`` or ``[*batch, E]``; ``None`` if there are neither factors nor a mask.

    Raises:
        ValueError: if the shape of the mask does not fit.
    """
    if mask is not None:
        if mask.shape not in (tuple(batch), (*batch, 1)):
            raise ValueError(f"mask: expected shape {[*batch, 1]}, got {list(mask.shape)}.")
        mask = mask.bool().reshape(*batch, 1)
        factors = [torch.where(mask, x, 0.0) for x in factors] or [mask.float()]
    return math.prod(factors[1:], start=factors[0]) if factors else None
