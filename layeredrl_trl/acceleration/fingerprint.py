"""What of a module can change between two replays of a CUDA graph, besides numbers in tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable
from typing import Any

from tensordict.nn import TensorDictParams
from torch import Tensor, nn

_PLAIN = {bool, int, float, str, type(None)}

_CONTAINERS = {dict, OrderedDict, list, tuple, set}

_LONGEST = 16
"""Most elements of a container that are looked at; of a longer one only its length is."""


def fingerprint(modules: Iterable[nn.Module]) -> tuple[Hashable, list[object]]:
    """Describe everything about modules that a replay would not see change.

    That is: the plain attributes (numbers, strings, flags) of each part, the identity of every
    other attribute, the elements of short lists and dictionaries (hooks among them), the parts
    themselves, and of parameters and buffers the address, shape and whether they learn. A change
    inside of another object is missed. A module may list attributes that replays do not depend on
    in a class attribute ``fingerprint_ignores``.

    Args:
        modules: described with all of their parts.

    Returns:
        the description, equal if nothing but numbers in tensors has changed; and the objects that
        it knows by their address, which is theirs only as long as somebody holds them.
    """
    seen: list[Hashable] = []
    objects: list[object] = []
    parts, done = list(modules), set[int]()
    while parts:
        part = parts.pop()
        if id(part) in done:
            continue
        done.add(id(part))
        seen.append(id(part))
        objects.append(part)
        ignored = getattr(type(part), "fingerprint_ignores", ())
        # TensorDictParams also cache what was last done with them
        attributes = {} if isinstance(part, TensorDictParams) else part.__dict__
        for name, x in attributes.items():
            kind = type(x)  # faster than isinstance, and asked for often
            if kind in _PLAIN:
                if name not in ignored:
                    seen.append(x)
            elif kind in _CONTAINERS:
                if x and name not in ("_parameters", "_buffers", "_modules"):
                    _add_container(x, seen, objects)
                else:
                    seen.append(len(x))
            elif isinstance(x, Tensor):
                _add_tensor(x, seen)
            else:
                seen.append(id(x))
                objects.append(x)
        for tensors in (part._parameters, part._buffers):
            for x in tensors.values():
                if x is not None:
                    _add_tensor(x, seen)
        parts += [x for x in part._modules.values() if x is not None]
    return tuple(seen), objects


def _add_tensor(x: Tensor, seen: list[Hashable]) -> None:
    seen += (x.data_ptr(), x.shape, x.stride(), x.dtype, x.requires_grad)


def _add_container(x: Collection[Any], seen: list[Hashable], objects: list[object]) -> None:
    seen.append(len(x))
    if len(x) > _LONGEST:
        return
    for one in (*x, *x.values()) if isinstance(x, dict) else x:
        if isinstance(one, Tensor):
            _add_tensor(one, seen)
        elif type(one) in _PLAIN:
            seen.append(one)
        else:
            seen.append(id(one))
            objects.append(one)
