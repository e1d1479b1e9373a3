"""Checks of plain numbers that a user hands in; an error names the argument and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check a whole number.

    Args:
        name: of the argument.
        value: what came.
        least: smallest legal value.

    Raises:
        TypeError: if it is no integer; ``True`` and ``2.0`` are none.
        ValueError: if it is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_counts(**counts: Any) -> None:
    """Check whole numbers of at least 1, by name; see :func:`check_count`."""
    for name, value in counts.items():
        check_count(name, value)


def check_sizes(name: str, sizes: Any) -> None:
    """Check a sequence of whole numbers of at least 1, such as the widths of layers.

    Raises:
        TypeError: if it is no sequence, or one of its elements no integer.
        ValueError: if one of them is below 1.
    """
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(
            f"{name} must be a sequence of integers, as in ({sizes},), got {sizes!r} "
            f"({type(sizes).__name__})."
        )
    for i, size in enumerate(sizes):
        check_count(f"{name}[{i}]", size)


def check_finite(name: str, value: Any, *, above: float = -math.inf) -> None:
    """Check a finite number.

    Args:
        name: of the argument.
        value: what came.
        above: it must be larger than that.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is infinite, NaN or not above ``above``.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    if not value > above:
        bound = "positive" if above == 0 else f"above {above}"
        raise ValueError(f"{name} must be {bound}, got {value}.")
