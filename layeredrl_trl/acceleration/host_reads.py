"""Read numbers from tensors on the host only where this is cheap: on a CPU, in eager code.

On a GPU the host would wait, compilation would break the graph, and a CUDA graph would always
repeat the decision made at its recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_IS_FORBIDDEN: ContextVar[bool] = ContextVar("_IS_FORBIDDEN", default=False)


def can_read(x: Tensor) -> bool:
    """Return whether the host may read numbers from ``x``."""
    return not (x.is_cuda or torch.compiler.is_compiling() or _IS_FORBIDDEN.get())


def check_values(is_right: Tensor, error: Callable[[], Exception]) -> None:
    """Raise ``error()`` if ``is_right``, bool of any shape, is False anywhere.

    The check is left out on a GPU, in compiled code and in a CUDA graph.

    Example:
        >>> check_values(torch.tensor([True]), lambda: ValueError("never seen"))
    """
    if can_read(is_right) and not is_right.all():
        raise error()


def is_surely_none(flags: Tensor) -> bool:
    """Return True if the host may read ``flags``, bool of any shape, and none of them is True.

    Work that is needed where a flag is True is then left out; else it is done in any case.

    Example:
        >>> is_surely_none(torch.tensor([False])), is_surely_none(torch.tensor([False, True]))
        (True, False)
    """
    return can_read(flags) and not flags.any()


def peek(x: Tensor, otherwise: float) -> float:
    """Return the number of a scalar tensor, or ``otherwise`` where the host must not read it.

    Example:
        >>> peek(torch.tensor(2.0), otherwise=0.0)
        2.0
    """
    return x.item() if can_read(x) else otherwise


@contextmanager
def without_reading() -> Iterator[None]:
    """Forbid reading values, also on a CPU, because the work will be recorded."""
    token = _IS_FORBIDDEN.set(True)
    try:
        yield
    finally:
        _IS_FORBIDDEN.reset(token)
