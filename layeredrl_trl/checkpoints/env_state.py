"""The state of a real environment in a checkpoint, so that a run goes on as if never stopped."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase

from layeredrl_trl.checkpoints.attribute_kinds import Saved, attribute_fault, write_attribute
from layeredrl_trl.checkpoints.env_parts import Part, find_parts
from layeredrl_trl.checkpoints.plain_values import is_of_names
from layeredrl_trl.checkpoints.simulation_state import digest, is_model

Values = dict[str, dict[str, Saved]]


class EnvState:
    """Save and restore what an environment keeps outside of the TensorDict.

    After ``load_state_dict`` every further step, end of an episode and reset of the environment
    gives the observations, rewards and flags that the saved one would have given, bit for bit on
    the same machine. It registers with ``torchrl.checkpoint.Checkpoint`` as it is. The TensorDict
    that goes into the next step is not part of it.

    Can be saved: ``GymEnv`` and ``GymWrapper`` over Gymnasium's classic control, toy text and
    MuJoCo environments and subclasses of these, if all attributes of the environment and of its
    wrappers are numbers, strings, None, numpy arrays, numpy generators, or tuples, lists and
    dictionaries of these; TorchRL's ``PendulumEnv``, ``FinancialRegimeEnv`` and ``TicTacToeEnv``;
    ``TransformedEnv`` of transforms without modules and ``SerialEnv`` over all of these.
    Everything else is refused, among it all environments in other processes.

    Attributes that never change, such as weights of the reward, are restored too: the saved ones
    count. A MuJoCo model is not saved; one that is changed after the construction of this object
    is refused. Contacts are not saved either, see ``read_simulation``: an environment that reads
    them before it simulates its step does not go on exactly. The state of an environment that was
    never reset fits only one that was not either.

    Args:
        env: the environment, in this process. A ``SerialEnv`` is started.

    Raises:
        TypeError: if ``env`` is not an ``EnvBase``.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> env, other = GymEnv("Pendulum-v1"), GymEnv("Pendulum-v1")
        >>> _ = env.set_seed(0)
        >>> EnvState(other).load_state_dict(EnvState(env).state_dict())
        >>> bool((env.reset()["observation"] == other.reset()["observation"]).all())
        True
    """

    def __init__(self, env: EnvBase):
        if not isinstance(env, EnvBase):
            raise TypeError(f"env must be a TorchRL environment, got {type(env).__name__}.")
        self.env = env
        self._models = _digests(find_parts(env)[0])
        self._was_tried_out = False

    @property
    def can_be_saved(self) -> bool:
        """Whether the state of the environment can be saved and restored.

        Some attributes come to be in the first reset or step only. So that the answer holds for
        the whole run, the first call resets the environment and steps it once, and undoes both.
        """
        parts, reasons = self._find()
        if not reasons and not self._was_tried_out:
            reasons = [reason for found, _ in self._try_out(parts) for reason in found]
            self._was_tried_out = not reasons
        return not reasons

    def state_dict(self) -> dict[str, Any]:
        """Copy the state of the environment.

        Returns:
            a dictionary of what ``torchrl.checkpoint`` stores without pickling.

        Raises:
            ValueError: if it cannot be saved, with the reasons.
        """
        parts = self._parts()
        classes = {part.path: part.class_name for part in parts}
        return {"classes": classes, "values": _read(parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the environment into a state of ``state_dict``.

        Everything is checked before anything is changed. To see what the attributes of a new
        environment look like once it runs, it may be reset and stepped once; random numbers that
        are drawn meanwhile are given back.

        Raises:
            ValueError: if this environment cannot be saved, or the state is not that of an
                environment of the same classes, attributes, shapes and dtypes, or is not finite
                where this environment is.
        """
        parts = self._parts()
        _check_layout(state, parts)
        present, values = _read(parts), state["values"]
        if _fault(values, parts, [present], is_all=False) is not None:
            seen = self._try_out(parts)
            _refuse([reason for reasons, _ in seen for reason in reasons])
            fault = _fault(values, parts, [present, *(found for _, found in seen)], is_all=True)
            if fault is not None:
                raise ValueError(f"The state does not fit this environment: {fault}.")
        _write(parts, values)

    def _parts(self) -> list[Part]:
        parts, reasons = self._find()
        _refuse(reasons)
        return parts

    def _find(self) -> tuple[list[Part], list[str]]:
        parts, reasons = find_parts(self.env)
        if not reasons and _digests(parts) != self._models:
            reasons = ["its MuJoCo model has been changed, and a model is not saved"]
        return parts, reasons

    def _try_out(self, parts: list[Part]) -> list[tuple[list[str], Values]]:
        """Look at the environment after a reset and after a step, and undo both.

        Returns:
            for each of the two, why the state cannot be saved, and the state if it can.
        """
        present, objects = _read(parts), [dict(part.attributes) for part in parts]
        seen = []
        try:
            with _global_random_numbers_kept(self.env):
                tensordict = self.env.reset()
                seen.append(self._look())
                self.env.rand_step(tensordict)
                seen.append(self._look())
        finally:
            for part, before in zip(parts, objects, strict=True):
                for name in part.names():
                    if name not in before:
                        del part.attributes[name]
                part.attributes.update(before)
            _write(parts, present)
        return seen

    def _look(self) -> tuple[list[str], Values]:
        parts, reasons = self._find()
        return reasons, {} if reasons else _read(parts)


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError(f"The state of this environment cannot be saved: {'; '.join(reasons)}.")


def _read(parts: list[Part]) -> Values:
    return {part.path: part.read() for part in parts}


def _write(parts: list[Part], values: Values) -> None:
    for part in parts:
        for name, attribute in values[part.path].items():
            write_attribute(part.attributes, name, attribute)


def _check_layout(state: Any, parts: list[Part]) -> None:
    """Check that a state is of the same objects of the same classes."""
    if not isinstance(state, dict) or state.keys() != {"classes", "values"}:
        raise ValueError("The state is not that of an environment: expected classes and values.")
    classes = {part.path: part.class_name for part in parts}
    if state["classes"] != classes:
        raise ValueError(
            f"The state is that of another environment: expected {classes}, got {state['classes']}."
        )
    values = state["values"]
    paths = list(classes)
    if not isinstance(values, dict) or sorted(values) != sorted(paths):
        raise ValueError(f"The state does not fit this environment: expected values for {paths}.")
    for path, saved in values.items():
        if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
            raise ValueError(f"The state does not fit this environment: {path} has no attributes.")


def _fault(
    values: Values, parts: list[Part], examples: list[Values], *, is_all: bool
) -> str | None:
    """Say what keeps a state from taking the place of the examples, None if nothing does."""
    for part in parts:
        saved, seen = values[part.path], [example[part.path] for example in examples]
        fault = _name_fault(saved, part, seen)
        if fault is not None:
            return fault
        for name, attribute in saved.items():
            known = [example[name] for example in seen if name in example]
            fault = attribute_fault(attribute, known, is_all=is_all)
            if fault is not None:
                return f"{part.path}.{name}: {fault}"
    return None


def _name_fault(saved: dict[str, Saved], part: Part, seen: list[dict[str, Saved]]) -> str | None:
    """Compare the names of attributes.

    They must be those of one example. An environment that has run for longer may have more than
    any of them, if it has all of theirs too. Names of entries that a transform notes down when it
    first needs them may be missing: it finds them again.
    """
    required = [
        {name for name, (_, content) in example.items() if not is_of_names(content)}
        for example in seen
    ]
    if any(
        names <= saved.keys() <= example.keys()
        for names, example in zip(required, seen, strict=True)
    ):
        return None
    expected = set().union(*required)
    missing = sorted(expected - saved.keys())
    if missing:
        return f"{part.path} lacks {missing}"
    unknown = saved.keys() - set().union(*seen)
    hidden = sorted(name for name in unknown if not part.can_add(name))
    return f"{part.path} has no place for {hidden}" if hidden else None


def _digests(parts: list[Part]) -> dict[str, str]:
    return {
        f"{part.path}.{name}": digest(value)
        for part in parts
        for name, value in part.attributes.items()
        if is_model(value)
    }


@contextmanager
def _global_random_numbers_kept(env: EnvBase) -> Iterator[None]:
    """Undo what happens inside to the generators of torch, numpy and Python."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [env.device] if env.device is not None and env.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
