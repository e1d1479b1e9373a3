"""Functions in code that ``torch.compile`` makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException

P = ParamSpec("P")
T = TypeVar("T")


def compiled(
    function: Callable[P, T], *, cudagraphs: bool = False, or_eager: bool = False
) -> Callable[P, T]:
    """Compile a function when it is first called.

    Args:
        function: of tensors.
        cudagraphs: also capture it as CUDA graphs. What it returned before is overwritten by the
            next call.
        or_eager: if it cannot be compiled (no compiler, code that cannot be traced), warn of it
            once and call it as it is from then on, instead of raising.
    """
    mode = "reduce-overhead" if cudagraphs else None
    call: Callable[P, T] = torch.compile(function, mode=mode)

    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal call
        if cudagraphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            return call(*args, **kwargs)
        except TorchDynamoException as error:
            if not or_eager:
                raise
            call = function
            warnings.warn(
                f"{function.__qualname__} cannot be compiled and goes on without, more slowly "
                f"(compile=False asks for that): {type(error).__name__}: "
                f"{str(error).splitlines()[0]}",
                stacklevel=2,
            )
            return function(*args, **kwargs)

    return called
