"""Reading numbers from tensors on the host, where that costs nothing.

A GPU would have to be waited for, code that is being compiled would break in two, and a CUDA graph
would repeat for ever what was decided once. So values are read only on a CPU, in eager code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_IS_FORBIDDEN: ContextVar[bool] = ContextVar("_IS_FORBIDDEN", default=False)


def can_read(x: Tensor) -> bool:
    """Return whether the host may read numbers from ``x`` without waiting for anything."""
    return not (x.is_cuda or torch.compiler.is_compiling() or _IS_FORBIDDEN.get())


def check_values(is_right: Tensor, error: Callable[[], Exception]) -> None:
    """Raise an error where a condition on values does not hold, if it can be read for nothing.

    A check for the user's sake: on a GPU, in compiled code and in a CUDA graph it is left out.

    Args:
        is_right: bool, any shape.
        error: makes the error.

    Raises:
        Exception: what ``error`` returns, if ``is_right`` is False anywhere.

    Example:
        >>> check_values(torch.tensor([True]), lambda: ValueError("never seen"))
    """
    if can_read(is_right) and not is_right.all():
        raise error()


@contextmanager
def without_reading() -> Iterator[None]:
    """Let no value be read inside, on a CPU either: what is done will be recorded."""
    token = _IS_FORBIDDEN.set(True)
    try:
        yield
    finally:
        _IS_FORBIDDEN.reset(token)
