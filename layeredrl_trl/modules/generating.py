"""Steps of imagination in code that ``torch.compile`` makes of them.

A step is compiled, not a rollout: in seconds instead of half a minute, and once for all horizons.
:class:`Generating` asks for it, far above; :func:`generated` gives it, deep inside.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import TorchDynamoException
from torchrl import logger as torchrl_logger

T = TypeVar("T")

_MOST_VARIANTS = 64
"""Of one function, in one process: torch's 8 are few for models of several kinds and sizes."""

_IS_WANTED: ContextVar[bool] = ContextVar("_IS_WANTED", default=False)


@contextmanager
def generating() -> Iterator[None]:
    """Let :func:`generated` give generated code for a while."""
    token = _IS_WANTED.set(True)
    try:
        # hooks may come after the code: torch would not look whether there are any
        options = {"recompile_limit": _MOST_VARIANTS, "skip_nnmodule_hook_guards": False}
        with dynamo_config.patch(options):
            yield
    finally:
        _IS_WANTED.reset(token)


def is_generating() -> bool:
    """Say whether generated code is asked for; inside of it, it is not again."""
    return not torch.compiler.is_compiling() and _IS_WANTED.get()


def generated(function: Callable[..., T]) -> Callable[..., T]:
    """Give the generated code of a function, or where none is asked for the function itself.

    The code takes arguments by their places only, and draws the random numbers that the function
    draws. There is no gradient.

    Example:
        >>> def double(x):
        ...     return 2 * x
        >>> generated(double) is double
        True
        >>> with generating():
        ...     generated(double) is double
        False
    """
    return _compiled(function) if is_generating() else function


@cache
def _compiled(function: Callable[..., T]) -> Callable[..., T]:
    compiled = torch.compile(function, options={"fallback_random": True})

    def call(*arguments: Any) -> T:
        # of a view torch would also look at what it is a view of, and compile anew for that
        return compiled(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))

    return call


class Generating:
    """Do work whose steps are in generated code, where no gradient is asked for.

    What took over a second was compiled; how long it took is said once, by TorchRL's logger.

    Args:
        what: the steps of the work, for messages.
        compile: ``None``: on CUDA; where code cannot be made, that is warned of once, and from then
            on the work is done without. True: on any device, and raise where it cannot be made.
            False: never.
    """

    def __init__(self, what: str, compile: bool | None) -> None:
        self.what = what
        self.compile = compile
        self._has_failed = False
        self._has_reported = False

    def __call__(self, work: Callable[..., T], *tensors: Tensor | None, **options: object) -> T:
        """Do ``work``.

        Args:
            work: what to do.
            *tensors: for it, at least one.
            **options: for it.

        Raises:
            TorchDynamoException: if code must be made, but cannot.
        """
        is_wanted = self.compile or (self.compile is None and tensors[0].is_cuda)
        if not is_wanted or self._has_failed or torch.is_grad_enabled():
            return work(*tensors, **options)
        start = time.perf_counter()
        try:
            with generating():
                done = work(*tensors, **options)
        except TorchDynamoException as error:
            if self.compile:
                raise
            self._has_failed = True
            warnings.warn(
                f"{self.what} cannot be compiled and is taken without, more slowly "
                f"(compile_imagine=False asks for that): {type(error).__name__}: "
                f"{(str(error) or 'no text').splitlines()[0]}",
                stacklevel=4,
            )
            return work(*tensors, **options)
        seconds = time.perf_counter() - start
        if seconds > 1.0 and not self._has_reported:
            self._has_reported = True
            torchrl_logger.info(f"{self.what} was compiled in {seconds:.1f} s")
        return done

    def __getstate__(self) -> dict[str, Any]:
        """Where a copy goes, code may be made."""
        return self.__dict__ | {"_has_failed": False}
