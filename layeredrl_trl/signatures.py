"""The arguments of a class, as ``inspect.signature`` and ``help`` show them."""

from __future__ import annotations

import inspect
from inspect import Parameter, Signature

_SEVERAL = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


class OwnSignature:
    """A ``__signature__`` that is made from the constructors, also those of subclasses.

    Without one, Python shows ``(*args, **kwargs)`` where a metaclass makes the instances, as those
    of TorchRL do, and ``**options`` where a class passes options on to its base class. With it,
    options passed on are those of the base classes, up to the class that has this attribute.

    Args:
        *others: classes that the last of these constructors passes its ``**options`` on to.

    Example:
        >>> class Planner:
        ...     __signature__ = OwnSignature()
        ...
        ...     def __init__(self, env, *, horizon, gamma=1.0): ...
        >>> class Search(Planner):
        ...     def __init__(self, env, *, rounds=3, **options): ...
        >>> inspect.signature(Search)
        <Signature (env, *, rounds=3, horizon, gamma=1.0)>
    """

    def __init__(self, *others: type) -> None:
        self.others = others

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner = owner

    def __get__(self, instance: object, cls: type) -> Signature:
        if instance is not None:  # an instance may be callable, with other arguments
            raise AttributeError("__signature__")
        above = cls.__mro__[: cls.__mro__.index(self.owner) + 1]
        constructors = [base for base in (*above, *self.others) if "__init__" in vars(base)]
        found: dict[str, Parameter] = {}
        by_name = False
        for base in constructors:
            own = list(inspect.signature(base.__init__).parameters.values())[1:]
            for x in own:
                if x.kind not in _SEVERAL and x.name not in found:
                    found[x.name] = x.replace(kind=Parameter.KEYWORD_ONLY) if by_name else x
            kinds = {x.kind for x in own}
            if Parameter.VAR_KEYWORD not in kinds:
                break
            has_positions = any(x.kind is not Parameter.KEYWORD_ONLY for x in found.values())
            by_name = by_name or has_positions or Parameter.VAR_POSITIONAL not in kinds
        return Signature(sorted(found.values(), key=lambda x: x.kind))
