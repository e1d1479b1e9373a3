"""What a module is but for the numbers in its tensors, as far as Python can tell."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable
from typing import Any

from tensordict.nn import TensorDictModule, TensorDictParams
from torch import Tensor, nn

_PLAIN = {bool, int, float, str, type(None)}

_CONTAINERS = {dict, OrderedDict, list, tuple, set}

_LONGEST = 16
"""Of longer containers only the length is looked at."""

_LIBRARIES = {"torch", "tensordict", "torchrl", "layeredrl_trl"}


def fingerprint(modules: Iterable[nn.Module]) -> tuple[Hashable, list[object]]:
    """Describe all that a replay cannot see changing, of modules and their parts.

    These are their plain attributes (numbers, strings, flags), which object any other attribute is,
    what is in short lists and dictionaries, hooks among them, their parts, and of parameters and
    buffers where in memory they lie, in which shape, and whether they learn. What changes inside
    of another object is missed. A module may name attributes in ``unprinted`` that replays do not
    depend on.

    Args:
        modules: asked with all their parts.

    Returns:
        the description, equal if nothing was changed but numbers in tensors; and the objects that
        it knows by their place in memory, which is theirs only as long as somebody holds them.
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
        unprinted = getattr(type(part), "unprinted", ())
        # what else these hold is notes of what was last done with them
        attributes = {} if isinstance(part, TensorDictParams) else part.__dict__
        for name, x in attributes.items():
            kind = type(x)  # asked for often: isinstance takes longer
            if kind in _PLAIN:
                if name not in unprinted:
                    seen.append(x)
            elif kind in _CONTAINERS:
                if x and name not in ("_parameters", "_buffers", "_modules"):
                    _print_container(x, seen, objects)
                else:
                    seen.append(len(x))
            elif isinstance(x, Tensor):
                _print_tensor(x, seen)
            else:
                seen.append(id(x))
                objects.append(x)
        for tensors in (part._parameters, part._buffers):
            for x in tensors.values():
                if x is not None:
                    _print_tensor(x, seen)
        parts += [x for x in part._modules.values() if x is not None]
    return tuple(seen), objects


def _print_tensor(x: Tensor, seen: list[Hashable]) -> None:
    seen += (x.data_ptr(), x.shape, x.stride(), x.dtype, x.requires_grad)


def _print_container(x: Collection[Any], seen: list[Hashable], objects: list[object]) -> None:
    seen.append(len(x))
    if len(x) > _LONGEST:
        return
    for one in (*x, *x.values()) if isinstance(x, dict) else x:
        if isinstance(one, Tensor):
            _print_tensor(one, seen)
        elif type(one) in _PLAIN:
            seen.append(one)
        else:
            seen.append(id(one))
            objects.append(one)


def is_known(module: nn.Module) -> bool:
    """Say whether a module and its parts are made of nothing but what its libraries define.

    Of anybody's own code it cannot be told whether it can be replayed: it may read a clock or a
    list, and it is not called again in a replay.

    Args:
        module: is asked with its parts, their hooks and those of parameters.
    """
    for part in module.modules():
        called: list[Any] = [type(part), *part._forward_hooks.values()]
        called += part._forward_pre_hooks.values()
        called += [*part._backward_hooks.values(), *part._backward_pre_hooks.values()]
        called += [part.__dict__[name] for name in ("forward", "__call__") if name in part.__dict__]
        if isinstance(part, TensorDictModule) and not isinstance(part.module, nn.Module):
            called.append(part.module)
        for p in part._parameters.values():
            if p is not None:
                called += [*(p._backward_hooks or {}).values()]
                called += [*(getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()]
        for x in called:
            if str(getattr(x, "__module__", None)).partition(".")[0] not in _LIBRARIES:
                return False
    return True
