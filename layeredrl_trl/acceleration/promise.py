"""Fast interfaces that a class promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def promised(owner: object, name: str) -> Callable[..., Any] | None:
    """Return a method that the class of ``owner`` itself defines, else ``None``.

    A fast path computes what the plain methods of its class compute. A subclass may change these,
    so it does not inherit the promise: it takes the plain path until it defines ``name`` too (say
    by ``fast_rollout = ProbabilisticEnsemble.fast_rollout``).

    Args:
        owner: a model or an environment.
        name: of the method, for example ``"fast_rollout"``.

    Example:
        >>> class Model:
        ...     def fast_rollout(self):
        ...         return "fast"
        >>> class Changed(Model):
        ...     pass
        >>> promised(Model(), "fast_rollout")(), promised(Changed(), "fast_rollout")
        ('fast', None)
    """
    return getattr(owner, name) if name in vars(type(owner)) else None
