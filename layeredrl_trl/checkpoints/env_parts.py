"""The objects that a TorchRL environment of this process is made of, and what of them to save.

An object's attributes are its state. An object is taken apart only if all of its attributes are
known to be constant or are of a kind that can be saved; what is not proven to be is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from multiprocessing.synchronize import Lock
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import wrappers
from gymnasium.envs.registration import EnvSpec
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import (
    Compose,
    EnvBase,
    FinancialRegimeEnv,
    GymEnv,
    GymWrapper,
    PendulumEnv,
    SerialEnv,
    TicTacToeEnv,
    Transform,
    TransformedEnv,
)
from torchrl.envs.gym_like import default_info_dict_reader

from layeredrl_trl.checkpoints.attribute_kinds import Saved, kind_of, read_attribute
from layeredrl_trl.checkpoints.plain_values import mutable_parts
from layeredrl_trl.checkpoints.simulation_state import is_model, reasons_against

try:
    from gymnasium.envs.mujoco import MujocoEnv
except (ImportError, gym.error.DependencyNotInstalled):  # without MuJoCo there are none of these
    MujocoEnv = None

# Environments of Gymnasium whose whole state is in their attributes.
_TOY_TEXT = "gymnasium.envs.toy_text."
_GYMNASIUM_MODULES = ("gymnasium.envs.classic_control.", _TOY_TEXT)

# Environments of TorchRL that keep all of their state in the TensorDict, except these attributes.
_NATIVE: dict[type, frozenset[str]] = {
    PendulumEnv: frozenset({"rng"}),
    FinancialRegimeEnv: frozenset({"rng"}),
    TicTacToeEnv: frozenset(),
}

# Wrappers of Gymnasium that make their function `func` themselves, without state.
_OWN_FUNCTION = (
    wrappers.ClipAction,
    wrappers.ClipReward,
    wrappers.DtypeObservation,
    wrappers.FilterObservation,
    wrappers.FlattenObservation,
    wrappers.RescaleAction,
    wrappers.RescaleObservation,
    wrappers.ReshapeObservation,
)

# What an object is linked with or was made from, and how it is shown. None of it changes a step.
# A map of toy text, `desc`, is an array of characters; its table of transitions is saved instead.
_CONSTANT_TYPES = (EnvSpec, Lock, TensorSpec, torch.Size, torch.device, torch.dtype)
_GYMNASIUM_CONSTANTS = frozenset(
    {"_ezpickle_args", "_ezpickle_kwargs", "_saved_kwargs", "env", "fullpath", "render_mode"}
)
_RENDERER_MODULE = "gymnasium.envs.mujoco.mujoco_rendering"
_PICTURES = frozenset({"clock", "screen", "surf", "window", "window_surface"})
_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_container", "_parent"}


@dataclass(frozen=True)
class Part:
    """One object of an environment.

    Attributes:
        path: where it is in the environment, unique in it.
        owner: the object.
        attributes: its attributes by name.
        only: the names of those that are looked at; None for all that are not constant.
    """

    path: str
    owner: Any
    attributes: MutableMapping[str, Any]
    only: frozenset[str] | None = None

    @property
    def class_name(self) -> str:
        """The full name of the object's class."""
        return f"{type(self.owner).__module__}.{type(self.owner).__qualname__}"

    def names(self) -> list[str]:
        """The names of the attributes to save."""
        if self.only is not None:
            return [name for name in self.attributes if name in self.only]
        return [
            name for name, value in self.attributes.items() if not self._is_constant(name, value)
        ]

    def read(self) -> dict[str, Saved]:
        """Copy the attributes to save."""
        return {name: read_attribute(self.attributes[name]) for name in self.names()}

    def reasons(self) -> list[str]:
        """Say which attributes cannot be saved."""
        return [
            f"{self.path}.{name} is a {type(self.attributes[name]).__name__}"
            for name in self.names()
            if kind_of(self.attributes[name]) is None
        ]

    def can_add(self, name: str) -> bool:
        """Whether a plain attribute of a name that was never seen would shadow nothing."""
        return self.only is None and not hasattr(self.owner, name)

    def _is_constant(self, name: str, value: Any) -> bool:
        if isinstance(value, _CONSTANT_TYPES) or is_model(value):
            return True
        if not isinstance(self.owner, gym.Env):
            return name in _MODULE_INTERNALS
        module = type(value).__module__
        if module == _RENDERER_MODULE or name in _GYMNASIUM_CONSTANTS:
            return True
        if name in _PICTURES:
            return value is None or module.startswith("pygame")
        is_map = name == "desc" and type(self.owner).__module__.startswith(_TOY_TEXT)
        return is_map or (name == "func" and type(self.owner) in _OWN_FUNCTION)


def find_parts(env: EnvBase) -> tuple[list[Part], list[str]]:
    """Take an environment apart.

    Args:
        env: the environment. A ``SerialEnv`` that has not been started is started.

    Returns:
        its parts, and the reasons why its state cannot be saved, of which there is none if it can.
    """
    parts: list[Part] = []
    reasons: list[str] = []
    for found in _walk(env, "env"):
        if isinstance(found, Part):
            parts.append(found)
            reasons.extend(found.reasons())
        else:
            reasons.append(found)
    return parts, reasons or _shared_memory(parts)


def _walk(env: Any, path: str) -> Iterator[Part | str]:
    """Yield the parts of an environment, and why it cannot be saved."""
    if type(env) is TransformedEnv:
        yield from _walk(env.base_env, f"{path}.base_env")
        yield from _walk_transform(env.transform, f"{path}.transform")
    elif type(env) is SerialEnv:
        if env.is_closed:
            env.start()
        for i, worker in enumerate(env._envs):
            yield from _walk(worker, f"{path}[{i}]")
    elif type(env) in _NATIVE:
        yield Part(path, env, vars(env), _NATIVE[type(env)])
    elif type(env) in (GymEnv, GymWrapper):
        yield Part(path, env, vars(env), frozenset({"frame_skip", "wrapper_frame_skip"}))
        readers = env.info_dict_reader
        if any(type(reader) is not default_info_dict_reader for reader in readers):
            yield f"{path} has an info_dict_reader that is not TorchRL's default one"
        yield from _walk_gymnasium(env._env, f"{path}._env")
    else:
        yield f"{path} is a {type(env).__name__}"


def _walk_gymnasium(env: Any, path: str) -> Iterator[Part | str]:
    while isinstance(env, gym.Wrapper):
        yield Part(path, env, vars(env))
        env, path = env.env, f"{path}.env"
    if not _is_known(env):
        yield f"{path} is a {type(env).__name__}"
        return
    yield Part(path, env, vars(env))
    for value in vars(env).values():
        if is_model(value):
            yield from reasons_against(value)


def _is_known(env: Any) -> bool:
    """Whether an environment without wrappers is of Gymnasium's classic control, MuJoCo, toys."""
    if not isinstance(env, gym.Env):
        return False
    if MujocoEnv is not None and isinstance(env, MujocoEnv):
        return True
    return any(base.__module__.startswith(_GYMNASIUM_MODULES) for base in type(env).__mro__)


def _walk_transform(transform: Transform, path: str) -> Iterator[Part | str]:
    yield Part(path, transform, vars(transform))
    yield Part(f"{path}.buffers", transform, transform._buffers)
    yield Part(f"{path}.parameters", transform, transform._parameters)
    if isinstance(transform, Compose):
        for i, inner in enumerate(transform.transforms):
            yield from _walk_transform(inner, f"{path}[{i}]")
    elif transform._modules:
        yield f"{path}, a {type(transform).__name__}, holds modules: {list(transform._modules)}"


def _shared_memory(parts: list[Part]) -> list[str]:
    """Say which attributes share a value that changes, since their copies would not share it."""
    owners: dict[int, str] = {}
    reasons = []
    for part in parts:
        for name in part.names():
            own = f"{part.path}.{name}"
            for value in _mutable_parts(part.attributes[name]):
                root = _root(value)
                if isinstance(value, np.ndarray) and not isinstance(root, np.ndarray):
                    reasons.append(f"{own} is a view of memory of something else")
                elif owners.setdefault(id(root), own) != own:
                    reasons.append(f"{own} and {owners[id(root)]} share memory")
    return reasons


def _mutable_parts(value: Any) -> list[Any]:
    if kind_of(value) == "numpy_generator":
        return [value]
    return list(mutable_parts(value)) if kind_of(value) == "plain" else []


def _root(value: Any) -> Any:
    """The object that owns the memory of an array, or a list or dictionary itself."""
    while isinstance(value, np.ndarray) and value.base is not None:
        value = value.base
    return value
