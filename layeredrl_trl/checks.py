"""Checks of a user's plain numbers; the error names the argument, what was expected, what came.

Each function takes the name and the value of the argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check that an argument is an integer of at least ``least``.

    Raises:
        TypeError: if ``value`` is not an integer; ``True`` and ``2.0`` are not.
        ValueError: if ``value`` is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_counts(**counts: Any) -> None:
    """Check that each argument, given by name, is an integer of at least 1."""
    for name, value in counts.items():
        check_count(name, value)


def check_sizes(name: str, sizes: Any) -> None:
    """Check that an argument is a sequence of integers of at least 1, such as widths of layers.

    Raises:
        TypeError: if ``sizes`` is not a sequence or an element is not an integer.
        ValueError: if an element is below 1.
    """
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(
            f"{name} must be a sequence of integers, as in ({sizes},), got {sizes!r} "
            f"({type(sizes).__name__})."
        )
    for i, size in enumerate(sizes):
        check_count(f"{name}[{i}]", size)


def check_finite(name: str, value: Any, *, above: float = -math.inf) -> None:
    """Check that an argument is a finite number above ``above``.

    Raises:
        TypeError: if ``value`` is not a number.
        ValueError: if ``value`` is infinite, NaN or not above ``above``.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    if not value > above:
        bound = "positive" if above == 0 else f"above {above}"
        raise ValueError(f"{name} must be {bound}, got {value}.")
