"""Where numbers may be read from tensors, to decide on the host what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_IS_FORBIDDEN: ContextVar[bool] = ContextVar("_IS_FORBIDDEN", default=False)


def can_read(x: Tensor) -> bool:
    """Say whether a number can be read from ``x`` for nothing, to decide what to do.

    A GPU would have to be waited for, a graph that is being compiled would break, and one that is
    recorded (:func:`without_reading`) would do forever what was decided once.
    """
    return not (x.is_cuda or torch.compiler.is_compiling() or _IS_FORBIDDEN.get())


def known_to_hold(flags: Tensor) -> bool:
    """Say whether all of ``flags`` are True; where that cannot be read for nothing, False.

    Example:
        >>> known_to_hold(torch.tensor([True, True])), known_to_hold(torch.tensor([True, False]))
        (True, False)
    """
    return can_read(flags) and bool(flags.all())


@contextmanager
def without_reading() -> Iterator[None]:
    """Let :func:`can_read` say no for a while, on a CPU too.

    Example:
        >>> with without_reading():
        ...     known_to_hold(torch.tensor([True, True]))
        False
    """
    token = _IS_FORBIDDEN.set(True)
    try:
        yield
    finally:
        _IS_FORBIDDEN.reset(token)
