"""Taking the entries of a foreign ``state_dict`` one by one, each checked and none forgotten."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_SHOWN = 5
"""Number of entries that an error names."""


class Entries:
    """The entries of a ``state_dict`` that have not been taken yet.

    Args:
        owner: function that was given the state, for the errors.
        state: the state; it is not changed.

    Raises:
        TypeError: if it is no mapping, or an entry no tensor.
        ValueError: if an entry holds a number that is not finite.
    """

    def __init__(self, owner: str, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{owner}: state_dict: expected a mapping of names to tensors, got "
                f"{type(state).__name__}."
            )
        for name, x in state.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"{owner}: {name}: expected a tensor, got {type(x).__name__}.")
            if x.is_floating_point() and not x.isfinite().all():
                raise ValueError(f"{owner}: {name}: expected finite numbers.")
        self.owner = owner
        self._left = {name: x.detach() for name, x in state.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def has(self, prefix: str) -> bool:
        """Tell whether an entry's name begins with ``prefix``."""
        return any(name.startswith(prefix) for name in self._left)

    def count(self, prefix: str) -> int:
        """Return how many numbers ``0, 1, ...`` follow ``prefix`` in names of entries."""
        numbers = {
            int(match[1])
            for name in self._left
            if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))
        }
        return max(numbers, default=-1) + 1

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Return the shape of an entry of ``ndim`` dims, without taking it."""
        shape = tuple(self._find(name).shape)
        if len(shape) != ndim:
            self.refuse(name, f"expected {ndim} dims, got shape {[*shape]}")
        return shape

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """Take an entry of a known shape, in float32 unless it holds bools or integers."""
        x = self._find(name)
        if x.shape != tuple(shape):
            self.refuse(name, f"expected shape {[*shape]}, got {[*x.shape]}")
        del self._left[name]
        return x.to(torch.float32) if x.is_floating_point() else x

    def drop(self, *names: str) -> None:
        """Take entries that have no counterpart and are not missed."""
        for name in names:
            self._left.pop(name, None)

    def refuse(self, name: str, reason: str) -> None:
        """Raise the error that an entry cannot be mapped."""
        raise ValueError(f"{self.owner}: {name}: {reason}.")

    def check_empty(self) -> None:
        """Raise a ValueError if an entry is left that nothing has asked for."""
        if self._left:
            names = [*self._left]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ValueError(
                f"{self.owner}: {', '.join(names[:_SHOWN])}{more}: there is no counterpart of "
                "this. The names must be those of one predictor of LayeredRL, without a prefix."
            )

    def _find(self, name: str) -> Tensor:
        if name not in self._left:
            names = ", ".join([*self._left][:_SHOWN]) or "nothing"
            raise KeyError(f"{self.owner}: {name} is missing; the state begins with {names}.")
        return self._left[name]
