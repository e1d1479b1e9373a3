"""Training or evaluation mode for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a module and all of its parts into one mode; afterwards each is in its own again."""
    before, modes = module.training, [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        module.train(before)  # it may pass the mode on to more than its parts
        for part, mode in modes:
            part.training = mode


def in_training_mode(method: Callable[P, R]) -> Callable[P, R]:
    """Let a module and all of its parts be in training mode during a method.

    Parts are shared: an environment or a planner that is put into evaluation mode takes them along.
    """

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with in_mode(args[0], True):
            return method(*args, **kwargs)

    return wrapped
