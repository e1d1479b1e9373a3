"""Find the fast interfaces that a class promises, that is, defines itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def promised(owner: object, name: str) -> Callable[..., Any] | None:
    """Return a method that the class of ``owner`` itself defines, else ``None``.

    By defining a fast method, a class promises that it agrees with the plain ones. A subclass may
    override these, so it does not inherit the promise and takes the plain path until it defines
    ``name`` too, for example by ``fast_rollout = ProbabilisticEnsemble.fast_rollout``.

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
