"""Kinds of attributes that an environment's objects have, and how each is saved and restored.

A saved attribute is the pair (name of its kind, content). The content is a copy, and made of what
a TorchRL checkpoint holds without pickling. A restored attribute keeps its object where it can,
so that whoever shares the object sees the restored content too.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, MutableMapping, Sequence
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import UninitializedBuffer

from layeredrl_trl.checkpoints.plain_values import is_plain, plain_fault
from layeredrl_trl.checkpoints.simulation_state import (
    check_simulation,
    is_simulation,
    read_simulation,
    write_simulation,
)

Saved = tuple[str, Any]

_SIMPLE_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)


class Kind(abc.ABC):
    """One kind of attribute."""

    @abc.abstractmethod
    def holds(self, value: Any) -> bool:
        """Whether an attribute is of this kind."""

    @abc.abstractmethod
    def read(self, value: Any) -> Any:
        """Copy the content of an attribute."""

    @abc.abstractmethod
    def fault(self, content: Any, examples: Sequence[Any]) -> str | None:
        """Say why a content cannot be written, given what was read in its place; None if it can."""

    @abc.abstractmethod
    def write(self, owner: MutableMapping[str, Any], name: str, content: Any) -> None:
        """Write a content that has no fault to an attribute, which may be None or missing."""


class _Plain(Kind):
    """Numbers, strings, None, arrays and containers of these."""

    def holds(self, value: Any) -> bool:
        return is_plain(value)

    def read(self, value: Any) -> Any:
        return copy.deepcopy(value)

    def fault(self, content: Any, examples: Sequence[Any]) -> str | None:
        return plain_fault(content, examples)

    def write(self, owner: MutableMapping[str, Any], name: str, content: Any) -> None:
        old = owner.get(name)
        is_same = isinstance(old, np.ndarray) and isinstance(content, np.ndarray)
        if is_same and old.shape == content.shape and old.dtype == content.dtype:
            old[...] = content
        else:
            owner[name] = copy.deepcopy(content)


class _NumpyGenerator(Kind):
    """A numpy generator of Gymnasium's kind, PCG64, whose state is two integers of 128 bits."""

    def holds(self, value: Any) -> bool:
        is_generator = type(value) is np.random.Generator
        return is_generator and type(value.bit_generator) is np.random.PCG64

    def read(self, value: Any) -> Any:
        return copy.deepcopy(value.bit_generator.state)

    def fault(self, content: Any, examples: Sequence[Any]) -> str | None:
        return _generator_fault(content)

    def write(self, owner: MutableMapping[str, Any], name: str, content: Any) -> None:
        if owner.get(name) is None:
            owner[name] = np.random.Generator(np.random.PCG64(0))
        owner[name].bit_generator.state = content


class _TorchGenerator(Kind):
    """A torch generator."""

    def holds(self, value: Any) -> bool:
        return type(value) is torch.Generator

    def read(self, value: Any) -> Any:
        return value.get_state().clone()

    def fault(self, content: Any, examples: Sequence[Any]) -> str | None:
        if not examples:
            return "there is no generator to write to"
        fault = _tensor_fault(content, examples)
        if fault is None and content.shape == torch.Generator().get_state().shape:
            try:
                torch.Generator().set_state(content.cpu())
            except RuntimeError as error:
                return str(error).splitlines()[0]
        return fault

    def write(self, owner: MutableMapping[str, Any], name: str, content: Any) -> None:
        owner[name].set_state(content.cpu())


class _OneTensor(Kind):
    """A tensor, a buffer or a parameter."""

    def holds(self, value: Any) -> bool:
        return type(value) in (Tensor, Parameter) and value.layout == torch.strided

    def read(self, value: Any) -> Any:
        return value.detach().clone()

    def fault(self, content: Any, examples: Sequence[Any]) -> str | None:
        return _tensor_fault(content, examples)

    def write(self, owner: MutableMapping[str, Any], name: str, content: Any) -> None:
        old = owner.get(name)
        if self.holds(old) and old.shape == content.shape and old.dtype == content.dtype:
            with torch.no_grad():
                old.copy_(content)
        else:
            owner[name] = content.clone()


class _EmptyBuffer(Kind):
    """A buffer that has no shape yet."""

    def holds(self, value: Any) -> bool:
        return type(value) is UninitializedBuffer

    def read(self, value: Any) -> Any:
        return None

    def fault(self, content: Any, examples: Sequence[Any]) -> str | None:
        return None if content is None and examples else "expected a buffer without a shape"

    def write(self, owner: MutableMapping[str, Any], name: str, content: Any) -> None:
        old = owner[name]
        if not self.holds(old):
            owner[name] = UninitializedBuffer(device=old.device, dtype=old.dtype)


class _TensorTree(Kind):
    """A TensorDict of tensors."""

    def holds(self, value: Any) -> bool:
        leaves = value.values(True, True) if type(value) is TensorDict else [None]
        return all(isinstance(leaf, Tensor) for leaf in leaves)

    def read(self, value: Any) -> Any:
        leaves = {key: leaf.detach().clone() for key, leaf in value.items(True, True)}
        return {"batch_size": tuple(value.batch_size), "leaves": leaves}

    def fault(self, content: Any, examples: Sequence[Any]) -> str | None:
        if not isinstance(content, Mapping) or content.keys() != {"batch_size", "leaves"}:
            return "expected a TensorDict"
        if not examples:
            return None
        known = examples[-1]
        if content["batch_size"] != known["batch_size"]:
            return f"expected the batch size {known['batch_size']}, got {content['batch_size']}"
        leaves, expected = content["leaves"], known["leaves"]
        if not isinstance(leaves, Mapping) or leaves.keys() != expected.keys():
            return f"expected the entries {sorted(map(str, expected))}"
        faults = (_tensor_fault(leaves[key], [expected[key]]) for key in expected)
        return next(filter(None, faults), None)

    def write(self, owner: MutableMapping[str, Any], name: str, content: Any) -> None:
        if type(owner.get(name)) is not TensorDict:
            owner[name] = TensorDict({}, batch_size=content["batch_size"])
        leaves = owner[name]
        for key, saved in content["leaves"].items():
            if key in leaves.keys(True, True):
                leaves.get(key).copy_(saved)
            else:
                leaves.set(key, saved.clone())


class _SharedNumber(Kind):
    """A number in shared memory, as TorchRL's ``TrajCounter`` counts with."""

    def holds(self, value: Any) -> bool:
        return type(value) is Synchronized

    def read(self, value: Any) -> Any:
        return value.value

    def fault(self, content: Any, examples: Sequence[Any]) -> str | None:
        if not examples:
            return "there is no shared number to write to"
        return plain_fault(content, examples)

    def write(self, owner: MutableMapping[str, Any], name: str, content: Any) -> None:
        owner[name].value = content


class _Space(Kind):
    """A Gymnasium space, of which only the random numbers it draws from change."""

    def holds(self, value: Any) -> bool:
        if type(value) in (spaces.Tuple, spaces.Dict):
            children = value.spaces.values() if type(value) is spaces.Dict else value.spaces
            return all(map(self.holds, children)) and self._is_readable(value)
        return type(value) in _SIMPLE_SPACES and self._is_readable(value)

    def read(self, value: Any) -> Any:
        own = value._np_random
        children = getattr(value, "spaces", {})
        items = children.items() if isinstance(children, Mapping) else enumerate(children)
        return {
            "generator": None if own is None else _NUMPY.read(own),
            "spaces": {str(key): self.read(child) for key, child in items},
        }

    def fault(self, content: Any, examples: Sequence[Any]) -> str | None:
        if not isinstance(content, Mapping) or content.keys() != {"generator", "spaces"}:
            return "expected the generators of a space"
        if not examples or content["spaces"].keys() != examples[0]["spaces"].keys():
            return "expected another space"
        fault = None if content["generator"] is None else _generator_fault(content["generator"])
        inner = (
            self.fault(child, [example["spaces"][key] for example in examples])
            for key, child in content["spaces"].items()
        )
        return fault or next(filter(None, inner), None)

    def write(self, owner: MutableMapping[str, Any], name: str, content: Any) -> None:
        self._restore(owner[name], content)

    def _restore(self, space: Any, content: Any) -> None:
        if content["generator"] is None:
            space._np_random = None
        else:
            _NUMPY.write(vars(space), "_np_random", content["generator"])
        children = getattr(space, "spaces", {})
        items = children.items() if isinstance(children, Mapping) else enumerate(children)
        for key, child in items:
            self._restore(child, content["spaces"][str(key)])

    @staticmethod
    def _is_readable(space: Any) -> bool:
        return space._np_random is None or _NUMPY.holds(space._np_random)


class _Simulation(Kind):
    """The data of a MuJoCo simulation."""

    def holds(self, value: Any) -> bool:
        return is_simulation(value)

    def read(self, value: Any) -> Any:
        return read_simulation(value)

    def fault(self, content: Any, examples: Sequence[Any]) -> str | None:
        if not examples:
            return "there is no simulation to write to"
        return check_simulation(content, examples[0])

    def write(self, owner: MutableMapping[str, Any], name: str, content: Any) -> None:
        write_simulation(owner[name], content)


_NUMPY = _NumpyGenerator()


# All kinds by the name that a checkpoint holds.
KINDS: dict[str, Kind] = {
    "plain": _Plain(),
    "numpy_generator": _NUMPY,
    "torch_generator": _TorchGenerator(),
    "tensor": _OneTensor(),
    "empty_buffer": _EmptyBuffer(),
    "tensordict": _TensorTree(),
    "shared_number": _SharedNumber(),
    "space": _Space(),
    "simulation": _Simulation(),
}


def kind_of(value: Any) -> str | None:
    """The name of the kind of an attribute, None if it is of none."""
    return next((name for name, kind in KINDS.items() if kind.holds(value)), None)


def read_attribute(value: Any) -> Saved:
    """Copy an attribute that is of one of the kinds."""
    kind = kind_of(value)
    if kind is None:
        raise TypeError(f"{type(value).__name__} is of no kind that can be saved.")
    return kind, KINDS[kind].read(value)


def attribute_fault(saved: Any, examples: Sequence[Saved], *, is_all: bool) -> str | None:
    """Say why a saved attribute cannot take the place of the examples, None if it can.

    Args:
        saved: the saved attribute, as it came from a checkpoint.
        examples: what was read in its place; none for an attribute that was never seen.
        is_all: whether the examples are all there is to see. If not, an example of None, which
            says nothing on what it may become, allows only None.
    """
    if not isinstance(saved, tuple) or len(saved) != 2 or not isinstance(saved[0], str):
        return "is not a saved attribute"
    kind, content = saved
    if kind not in KINDS:
        return f"{kind!r} is not a kind of attribute"
    if not examples and kind != "plain":
        return f"a {kind} was never seen here"
    alike = [example for other, example in examples if other == kind]
    seen = [other for other, example in examples if example is not None]
    if content is None or seen:
        possible = alike if content is None else seen.count(kind)
        if not possible and examples:
            return f"expected a {examples[-1][0]}, got {'None' if content is None else kind}"
    elif not is_all:
        return "there is nothing to compare it with"
    elif any(other == "empty_buffer" for other, _ in examples) and kind != "tensor":
        return f"expected a tensor, got a {kind}"
    if content is None and all(isinstance(example, tuple) for _, example in examples):
        return None  # Gymnasium's checker forgets its data after the second step
    return KINDS[kind].fault(content, alike)


def write_attribute(owner: MutableMapping[str, Any], name: str, saved: Saved) -> None:
    """Write a saved attribute that has no fault."""
    kind, content = saved
    KINDS[kind].write(owner, name, content)


def _generator_fault(content: Any) -> str | None:
    try:
        np.random.PCG64(0).state = content
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        return f"is not the state of a PCG64 generator ({error})"
    return None


def _tensor_fault(content: Any, examples: Sequence[Tensor]) -> str | None:
    """Compare with the newest example: shape, dtype, and finite if it is."""
    if not isinstance(content, Tensor):
        return f"expected a tensor, got {type(content).__name__}"
    for example in examples[-1:]:
        if content.shape != example.shape or content.dtype != example.dtype:
            expected = f"{example.dtype} of shape {tuple(example.shape)}"
            return f"expected {expected}, got {content.dtype} of shape {tuple(content.shape)}"
        if not content.isfinite().all() and example.isfinite().all():
            return "is not finite"
    return None
