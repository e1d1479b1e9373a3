"""Detect changes of a module, other than numbers in tensors, between replays of a CUDA graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable
from typing import Any

from tensordict.nn import TensorDictParams
from torch import Tensor, nn

_PLAIN = {bool, int, float, str, type(None)}

_CONTAINERS = {dict, OrderedDict, list, tuple, set}

_LONGEST = 16
"""Maximum size of a container whose elements are described; of longer ones only the length is."""


def fingerprint(modules: Iterable[nn.Module]) -> tuple[Hashable, list[object]]:
    """Describe everything about modules whose change a replay would not see.

    The description holds the plain attributes (numbers, strings, flags) of each submodule, the
    identity of submodules and other attributes, the elements of short containers (hooks among
    them), and the address, shape and ``requires_grad`` of parameters and buffers. It misses changes
    inside other objects. The class attribute ``fingerprint_ignores`` of a module names plain
    attributes to leave out.

    Returns:
        the description, equal if only numbers in tensors have changed; and the objects described by
        their address, which the caller must keep alive for the address to stay theirs.
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
        # TensorDictParams also cache their last operations
        attributes = {} if isinstance(part, TensorDictParams) else part.__dict__
        for name, x in attributes.items():
            kind = type(x)  # faster than isinstance, and runs often
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
