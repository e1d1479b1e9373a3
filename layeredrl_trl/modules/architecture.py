"""Do two networks differ in more than the numbers in their tensors?"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

_IGNORED = ("__annotations__", "__dict__", "__doc__", "__weakref__")
"""Entries of a class that do not say what it does, or are made anew with every class."""


def differences(one: nn.Module, other: nn.Module) -> Iterator[str]:
    """Say in what two networks differ: classes, plain numbers, or the layout of tensors.

    Classes that running the same definition twice has made are taken for one.
    """
    parts, others = (dict(net.named_modules(remove_duplicate=False)) for net in (one, other))
    if parts.keys() != others.keys():
        yield f"one has the parts {[*parts]}, another {[*others]}"
        return
    for path, part in parts.items():
        kinds, where = (type(part), type(others[path])), repr(path) if path else "the network"
        names = [kind.__name__ for kind in kinds]
        if not _do_the_same(*kinds):
            yield (
                f"{where} is a {names[0]} in one and a {names[1]} in another"
                if names[0] != names[1]
                else f"every call of make_network makes a new class {names[0]}, and these may not "
                "do the same; define the class once, outside of make_network"
            )
        for name, value in vars(part).items():
            another = vars(others[path]).get(name)
            is_number = isinstance(value, int | float) and isinstance(another, int | float)
            if is_number and repr(value) != repr(another):
                yield f"{name} of {where} is {value} in one and {another} in another"
    layouts = [
        {name: (list(x.shape), x.dtype, x.requires_grad) for name, x in tensors_of(net)}
        for net in (one, other)
    ]
    for name in dict.fromkeys(chain(*layouts)):
        own, another = (layout.get(name, "missing") for layout in layouts)
        if own != another:
            yield (
                f"the tensor {name!r} (shape, dtype, requires_grad) is {own} in one and {another} "
                "in another"
            )


def tensors_of(
    network: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name; tied ones once, unless told otherwise."""
    yield from network.named_parameters(remove_duplicate=remove_duplicate)
    yield from network.named_buffers(remove_duplicate=remove_duplicate)


def _do_the_same(one: type, other: type) -> bool:
    """Tell whether two classes are one, or made by running the same definition twice."""
    if one is other:
        return True
    definitions = [(kind.__module__, kind.__qualname__, kind.__bases__) for kind in (one, other)]
    return definitions[0] == definitions[1] and _contents(one) == _contents(other)


def _contents(kind: type) -> dict[str, Any]:
    """Describe functions of a class by what they do, and everything else by its identity."""
    return {
        name: _function(kind, x) if inspect.isfunction(x) else id(x)
        for name, x in vars(kind).items()
        if name not in _IGNORED
    }


def _function(kind: type, function: Any) -> tuple[Any, ...]:
    """Describe a method by its code, its defaults, and what it closes over but for its class."""
    used = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            used.append(cell.cell_contents)
        except ValueError:  # a name that has no value yet
            used.append(cell)
    return function.__code__, [id(x) for x in used if x is not kind]
