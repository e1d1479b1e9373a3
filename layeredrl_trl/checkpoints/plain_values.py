"""Plain values: numbers, strings, None, numpy arrays and containers of these.

A plain value is all there is to it: its copy behaves as it does, and a checkpoint can hold it
without naming any code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_NUMBERS = (bool, int, float)
_SCALARS = (*_NUMBERS, str, type(None))

# The kinds of numpy types that a checkpoint can hold bit for bit, see `np.dtype.kind`.
_NUMPY_NUMBERS = "biuf"


def is_plain(value: Any) -> bool:
    """Whether a value is plain. Subclasses are not: what they add is unknown."""
    if type(value) in _SCALARS:
        return True
    if isinstance(value, np.generic):
        return value.dtype.kind == "U" or _is_plain_dtype(value.dtype)
    if type(value) is np.ndarray:
        return _is_plain_dtype(value.dtype)
    if type(value) in (tuple, list):
        return all(map(is_plain, value))
    return type(value) is dict and all(map(is_plain, [*value.keys(), *value.values()]))


def is_of_names(value: Any) -> bool:
    """Whether a value is made of strings only, as keys of TensorDict entries are, or is None."""
    if isinstance(value, (tuple, list)):
        return all(map(is_of_names, value))
    return value is None or type(value) is str


def mutable_parts(value: Any) -> Iterator[Any]:
    """Yield the arrays, lists and dictionaries that a plain value is made of."""
    if isinstance(value, (np.ndarray, list, dict)):
        yield value
    if isinstance(value, dict):
        value = value.values()
    if not isinstance(value, (np.ndarray, str)) and hasattr(value, "__iter__"):
        for part in value:
            yield from mutable_parts(part)


def plain_fault(value: Any, examples: Sequence[Any]) -> str | None:
    """Say why a value cannot take the place of the examples, None if it can.

    It can if it is plain and like one of them: a number for a number, an array of the same shape
    and dtype, a tuple of alike elements. It is infinite or NaN only where an example is.

    Args:
        value: the value.
        examples: plain values that were seen in its place. Where there is none but None,
            anything plain is taken that is not NaN.
    """
    if not is_plain(value):
        return f"{type(value).__name__} is not a plain value"
    known = [example for example in examples if example is not None]
    if value is None and len(known) < len(examples):
        return None
    if not known:
        return "is NaN" if _has_nan(value) else None
    faults = [_unlike(value, example) for example in known]
    return None if None in faults else faults[-1]


def _unlike(value: Any, example: Any) -> str | None:
    """Say how a plain value differs in kind from an example of it."""
    if isinstance(example, np.ndarray):
        if not isinstance(value, np.ndarray) or value.dtype != example.dtype:
            return f"expected an array of {example.dtype}, got {_kind(value)}"
        if value.shape != example.shape:
            return f"expected an array of shape {example.shape}, got {value.shape}"
        is_finite = np.isfinite(value).all() or not np.isfinite(example).all()
        return None if is_finite else "is not finite"
    if _is_number(example):
        if not _is_number(value):
            return f"expected a number, got {_kind(value)}"
        return None if math.isfinite(value) or not math.isfinite(example) else "is not finite"
    if isinstance(example, str):
        return None if isinstance(value, str) else f"expected a string, got {_kind(value)}"
    if type(value) is not type(example):
        return f"expected a {type(example).__name__}, got {_kind(value)}"
    return _unlike_container(value, example)


def _unlike_container(value: Any, example: Any) -> str | None:
    """Compare elements. Lists and dictionaries may grow, a tuple keeps its length."""
    if isinstance(example, dict):
        pairs = [(value[key], example[key]) for key in value.keys() & example.keys()]
    elif isinstance(example, tuple):
        if len(value) != len(example):
            return f"expected {len(example)} elements, got {len(value)}"
        pairs = list(zip(value, example, strict=True))
    else:
        pairs = [(element, example[0]) for element in value if example]
    faults = (plain_fault(element, [old]) for element, old in pairs)
    return next(filter(None, faults), None)


def _has_nan(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(np.isnan(value).any()) if value.dtype.kind == "f" else False
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return any(map(_has_nan, value))
    return _is_number(value) and math.isnan(value)


def _is_number(value: Any) -> bool:
    is_numpy = isinstance(value, np.generic) and value.dtype.kind in _NUMPY_NUMBERS
    return is_numpy or type(value) in _NUMBERS


def _is_plain_dtype(dtype: np.dtype) -> bool:
    return dtype.kind in _NUMPY_NUMBERS and dtype.itemsize <= 8 and dtype.isnative


def _kind(value: Any) -> str:
    dtype = f" of {value.dtype}" if isinstance(value, np.ndarray) else ""
    return type(value).__name__ + dtype
