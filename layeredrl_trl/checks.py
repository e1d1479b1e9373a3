"""Checks of a user's plain arguments; the error names the argument, what was expected, what came.

Each function takes the name and the value of the argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check that an argument is an integer of at least ``least``.

    Raises:
        TypeError: if ``value`` is not an integer; ``True`` and ``2.0`` are not.
        ValueError: if ``value`` is below ``least``.
    """
    check_integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_integer(name: str, value: Any) -> None:
    """Check that an argument is an integer.

    Raises:
        TypeError: if it is not; ``True`` and ``2.0`` are not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")


def check_number(name: str, value: Any) -> None:
    """Check that an argument is a number.

    Raises:
        TypeError: if it is not; ``True`` and a tensor are not.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")


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


def check_fraction(name: str, value: Any) -> None:
    """Check that an argument is a number in [0, 1].

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not in [0, 1].
    """
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}.")


def check_finite(name: str, value: Any, *, above: float = -math.inf) -> None:
    """Check that an argument is a finite number above ``above``.

    Raises:
        TypeError: if ``value`` is not a number.
        ValueError: if ``value`` is infinite, NaN or not above ``above``.
    """
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    if not value > above:
        bound = "positive" if above == 0 else f"above {above}"
        raise ValueError(f"{name} must be {bound}, got {value}.")


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Check that an argument is True or False, or None if it is ``optional``.

    Raises:
        TypeError: if ``value`` is something else; 1 and ``"no"`` are.
    """
    if isinstance(value, (bool, np.bool_)) or (optional and value is None):
        return
    expected = "True, False or None" if optional else "True or False"
    raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__}).")


def check_flags(**flags: Any) -> None:
    """Check that each argument, given by name, is True or False."""
    for name, flag in flags.items():
        check_flag(name, flag)


def check_key(name: str, value: Any) -> None:
    """Check that an argument is the key of one TensorDict entry.

    Raises:
        TypeError: if ``value`` is neither a string nor a tuple of one or more strings.
    """
    if not _is_key(value):
        raise TypeError(
            f"{name} must be a string or a tuple of strings, got {value!r} "
            f"({type(value).__name__})."
        )


def check_keys(name: str, value: Any, count: int | None = None) -> None:
    """Check that an argument is a sequence of keys of TensorDict entries.

    A string is not taken for the sequence of its letters. A tuple of strings is a sequence of
    keys, as everywhere in TorchRL; a sequence of one nested key is ``[("next", "reward")]``.

    Args:
        name: the argument's name.
        value: the argument.
        count: how many keys there must be; None for any number.

    Raises:
        TypeError: if ``value`` is not a sequence or an element is not a key.
        ValueError: if there are not ``count`` keys.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        like = repr([value] if _is_key(value) else ["x"])
        raise TypeError(
            f"{name} must be a sequence of keys, as in {like}, got {value!r} "
            f"({type(value).__name__})."
        )
    for i, key in enumerate(value):
        check_key(f"{name}[{i}]", key)
    if count is not None and len(value) != count:
        raise ValueError(f"{name} must hold {count} key(s), got {len(value)}: {list(value)}.")


def check_device(name: str, value: Any) -> None:
    """Check that an argument names a device, by a string or a number; None leaves the device.

    Raises:
        TypeError: if ``value`` is of another kind.
        ValueError: if it is a string that names none.
    """
    is_number = isinstance(value, Integral) and not isinstance(value, bool)
    if value is None or is_number or isinstance(value, torch.device):
        return
    expected = f"{name} must be a torch.device or a string like 'cpu' or 'cuda:0'"
    if not isinstance(value, str):
        raise TypeError(f"{expected}, got {value!r} ({type(value).__name__}).")
    try:
        torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{expected}, got {value!r}.") from error


def check_precision(owner: str, fn: Callable[[Tensor], Tensor]) -> None:
    """Check that what ``nn.Module._apply`` does to the tensors of ``owner`` loses no precision.

    Moving to a device, ``float()``, ``double()`` and ``share_memory()`` do not; ``half()``,
    ``bfloat16()`` and ``type(dtype)``, which converts integers too, do.

    Raises:
        TypeError: if it does.
    """
    for dtype in (torch.float32, torch.int64, torch.bool):
        converted = fn(torch.empty(0, dtype=dtype)).dtype
        is_wider = dtype is torch.float32 and converted is torch.float64
        if converted is not dtype and not is_wider:
            raise TypeError(
                f"{owner} computes in float32: its tensors of {dtype} cannot be converted to "
                f"{converted}. Inputs of any dtype are cast; for lower precision use "
                "torch.autocast."
            )


def _is_key(value: Any) -> bool:
    """Whether a value is a NestedKey: a string or a tuple of one or more strings."""
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(part, str) for part in value)
    return isinstance(value, str)
