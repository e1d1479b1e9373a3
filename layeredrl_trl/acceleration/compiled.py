"""Code that ``torch.compile`` makes of a step, of imagination or of learning.

A step is compiled, not a rollout: that takes seconds instead of half a minute, and one compilation
serves all horizons.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torchrl import logger as torchrl_logger

T = TypeVar("T")

_MOST_VARIANTS = 64
"""Variants of one function in a process: torch's 8 are few for many kinds and sizes of models."""

_OPTIONS = {
    "recompile_limit": _MOST_VARIANTS,
    "skip_nnmodule_hook_guards": False,  # hooks may be registered after the code was made
}

_LEAST_SECONDS = 1.0
"""A call that took longer was compiled."""


class CompiledStep(Generic[T]):
    """Call compiled code in place of a function that moves particles by one step.

    Where a gradient is asked for, and inside of other compiled code, the function itself is called.
    The code draws the random numbers that the function draws, from the same generator.

    Args:
        function: takes its arguments by position only. A function of a module, which pickling
            finds by its name.
    """

    def __init__(self, function: Callable[..., T]) -> None:
        self.function = function
        self._has_reported = False

    def __call__(self, *arguments: Any) -> T:
        """Call the function, or code compiled from it."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.function(*arguments)
        start = time.perf_counter()
        with dynamo_config.patch(**_OPTIONS):
            out = _compile(self.function)(*map(_detached, arguments))
        self._has_reported = _report("a step of imagination", start, self._has_reported)
        return out


class CompiledLoss(Generic[T]):
    """Call compiled code in place of a loss, from the third call on.

    The first two calls are plain: running statistics and mixture modes start there, by work that
    is never done again.

    Args:
        loss: takes batches, returns loss terms.
    """

    n_plain_calls = 2

    def __init__(self, loss: Callable[..., T]) -> None:
        self.loss = loss
        self._compiled = torch.compile(loss)
        self._n_calls = 0
        self._has_reported = False

    def __call__(self, *batches: Any) -> T:
        """Compute the loss terms."""
        self._n_calls += 1
        if self._n_calls <= self.n_plain_calls:
            return self.loss(*batches)
        start = time.perf_counter()
        out = self._compiled(*batches)
        self._has_reported = _report("a learning step", start, self._has_reported)
        return out


def _detached(x: Any) -> Any:
    """Detach a tensor, or those of a named tuple.

    Of a view, torch also looks at what it is a view of, and would compile anew for that.
    """
    if isinstance(x, Tensor):
        return x.detach()
    return type(x)(*map(_detached, x)) if hasattr(x, "_fields") else x


@cache
def _compile(function: Callable[..., T]) -> Callable[..., T]:
    """Compile a function once in a process; instances that share it share the code."""
    return torch.compile(function, options={"fallback_random": True})


def _report(what: str, start: float, has_reported: bool) -> bool:
    """Log once how long compiling took; returns whether that has been done."""
    seconds = time.perf_counter() - start
    if has_reported or seconds < _LEAST_SECONDS:
        return has_reported
    torchrl_logger.info(f"{what} was compiled in {seconds:.1f} s")
    return True
