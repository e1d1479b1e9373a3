"""Steps of imagination and of learning in code from ``torch.compile``.

Compiling a single step instead of a rollout takes seconds instead of half a minute, and serves all
horizons.
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

_OPTIONS = {
    "recompile_limit": 64,  # of one function: torch's 8 are too few for many kinds of models
    "skip_nnmodule_hook_guards": False,  # hooks may be registered after the code was made
}

_LEAST_SECONDS = 1.0
"""A call that takes longer is taken to have compiled."""


class CompiledStep(Generic[T]):
    """Call compiled code in place of a function that moves particles by one step.

    With gradients enabled and inside other compiled code, it calls the function itself. The
    compiled code draws the same random numbers, from the same generator. The function takes
    positional arguments only, and is defined in a module, so that it can be pickled.
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

    The first two calls are plain: they initialise running statistics and mixture modes.
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
    """Detach tensors, alone or in a named tuple: another base of a view would recompile."""
    if isinstance(x, Tensor):
        return x.detach()
    return type(x)(*map(_detached, x)) if hasattr(x, "_fields") else x


@cache
def _compile(function: Callable[..., T]) -> Callable[..., T]:
    """Compile a function once per process."""
    return torch.compile(function, options={"fallback_random": True})


def _report(what: str, start: float, has_reported: bool) -> bool:
    """Log once how long compiling took; return whether it has been logged."""
    seconds = time.perf_counter() - start
    if has_reported or seconds < _LEAST_SECONDS:
        return has_reported
    torchrl_logger.info(f"{what} was compiled in {seconds:.1f} s")
    return True
