"""Sizes of spaces, and conversion of actions to network inputs.

A space may be given as a number of dims, a Gymnasium space, or a TorchRL spec.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import gymnasium
import torch
from torch import Tensor
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    OneHot,
    Unbounded,
)


def space_dim(space: Any, name: str) -> int:
    """Return the number of network inputs that an element of ``space`` needs.

    Args:
        space: ``None`` (0 dims), a number of dims, a Gymnasium ``Box`` or ``Discrete``, or a
            TorchRL ``Bounded``, ``Unbounded``, ``OneHot`` or ``Categorical`` spec. A discrete space
            of ``n`` elements needs ``n`` inputs (one-hot).
        name: name of the argument, for the error.

    Raises:
        TypeError: if the space is of another kind.
        ValueError: if the number is negative.
    """
    if space is None:
        return 0
    if isinstance(space, Integral) and not isinstance(space, bool):
        if space < 0:
            raise ValueError(f"{name}: expected at least 0 dims, got {space}.")
        return int(space)
    if isinstance(space, gymnasium.spaces.Box):
        return int(torch.Size(space.shape).numel()) if space.shape else 1
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(space.n)
    if isinstance(space, Categorical) and not isinstance(space, Binary | MultiCategorical):
        return int(space.space.n)
    if isinstance(space, OneHot | Bounded | Unbounded):
        return int(space.shape[-1]) if space.shape else 1
    kind = f"{type(space).__module__}.{type(space).__name__}"
    hint = " (pass one of its entries)" if isinstance(space, Composite) else ""
    raise TypeError(
        f"{name}: expected a number of dims, a gymnasium Box or Discrete, or a torchrl Bounded, "
        f"Unbounded, OneHot or Categorical spec, got {kind}{hint}."
    )


def is_continuous(space: Any) -> bool:
    """Tell whether ``space`` is known to hold vectors.

    A bare number of dims does not tell, except 1: a discrete space of one element has no choice.
    """
    is_one = isinstance(space, Integral) and space == 1
    return is_one or isinstance(space, gymnasium.spaces.Box | Bounded | Unbounded)


def action_features(
    action: Tensor, batch_shape: torch.Size, dim: int, *, indices: bool = True
) -> Tensor:
    """Turn actions into network inputs ``[*batch_shape, dim]``.

    Continuous and one-hot actions have the shape ``[*batch_shape, dim]`` and are cast to float32.
    Integers of shape ``[*batch_shape]`` (TorchRL's categorical encoding) or ``[*batch_shape, 1]``
    are indices of ``dim`` actions and become one-hot.

    Raises:
        ValueError: if the shape is none of these, or of indices without ``indices``.
    """
    if are_indices(action, batch_shape, dim, indices=indices):
        index = action.reshape(batch_shape).long()
        return torch.nn.functional.one_hot(index, dim).to(torch.float32)
    return action.to(torch.float32)


def are_indices(action: Tensor, batch_shape: torch.Size, dim: int, *, indices: bool = True) -> bool:
    """Check the shape of actions, and tell indices from vectors ``[*batch_shape, dim]``.

    The arguments and the error are those of :func:`action_features`.
    """
    if action.shape == (*batch_shape, dim):
        return False
    has_index_shape = action.shape in (batch_shape, (*batch_shape, 1))
    if indices and has_index_shape and not action.is_floating_point():
        return True
    or_indices = f" or indices (integers) of shape {list(batch_shape)}" if indices else ""
    raise ValueError(
        f"action: expected shape {[*batch_shape, dim]}{or_indices}, "
        f"got {list(action.shape)} {action.dtype}."
    )
