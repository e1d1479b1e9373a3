"""The state of a MuJoCo simulation, complete enough to go on from it to the last bit."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

try:
    import mujoco
except ImportError:  # an environment that simulates nothing does not need it
    mujoco = None

# Stored in mjData itself rather than in its buffer.
_INLINE_ARRAYS = ("energy",)


def is_simulation(value: Any) -> bool:
    """Whether a value is a ``mujoco.MjData``."""
    return mujoco is not None and type(value) is mujoco.MjData


def is_model(value: Any) -> bool:
    """Whether a value is a ``mujoco.MjModel``."""
    return mujoco is not None and type(value) is mujoco.MjModel


def read_simulation(data: Any) -> dict[str, Any]:
    """Copy the state of a simulation.

    The integration state alone is not enough: an environment reads quantities such as ``xpos``
    and ``cfrc_ext`` before it steps, as they were *before* the last integration, so they cannot
    be computed from the state. Contacts and constraint forces (``ncon``, ``efc_*``) are left out:
    MuJoCo makes them anew in every step, out of its arena. So are arrays of integers: these are
    indices that each step makes anew, and one from a damaged file would point outside of memory.

    Args:
        data: the ``mujoco.MjData``.

    Returns:
        ``state``, MuJoCo's integration state; ``layout``, the shape of every array of numbers by
        its name; and ``numbers``, the content of all of them in one float64 array.
    """
    arrays = _arrays(data)
    return {
        "state": _integration_state(data),
        "layout": {name: array.shape for name, array in arrays.items()},
        "numbers": np.concatenate([array.ravel() for array in arrays.values()]),
    }


def write_simulation(data: Any, saved: dict[str, Any]) -> None:
    """Put a simulation into a state of ``read_simulation`` that has been checked."""
    mujoco.mj_setState(data.model, data, saved["state"], _signature())
    arrays = _arrays(data).values()
    ends = np.cumsum([array.size for array in arrays])
    for array, content in zip(arrays, np.split(saved["numbers"], ends[:-1]), strict=True):
        array[...] = content.reshape(array.shape)


def check_simulation(saved: Any, example: dict[str, Any]) -> str | None:
    """Say what is wrong with a state of ``read_simulation``, None if nothing is.

    Args:
        saved: the state to check.
        example: a state of the simulation that it is meant for.
    """
    if not isinstance(saved, dict) or saved.keys() != example.keys():
        return f"expected {sorted(example)}"
    if saved["layout"] != example["layout"]:
        return "expected a simulation of other arrays"
    for name in ("state", "numbers"):
        array, expected = saved[name], example[name]
        if type(array) is not np.ndarray or array.dtype != expected.dtype:
            return f"{name} must be an array of {expected.dtype}"
        if array.shape != expected.shape:
            return f"{name} must have the shape {expected.shape}, got {array.shape}"
        if not np.isfinite(array).all():
            return f"{name} is not finite"
    return None


def reasons_against(model: Any) -> list[str]:
    """Say which features of a MuJoCo model keep state that ``read_simulation`` does not see."""
    sleeping = int(getattr(mujoco.mjtEnableBit, "mjENBL_SLEEP", 0))
    features = {
        "plugins": model.nplugin > 0,
        "flexes": getattr(model, "nflex", 0) > 0,
        "sleeping islands": bool(model.opt.enableflags & sleeping),
    }
    return [f"its MuJoCo model has {feature}" for feature, present in features.items() if present]


def digest(model: Any) -> str:
    """Hash a MuJoCo model, to see whether it has been changed since."""
    content = np.empty(mujoco.mj_sizeModel(model), dtype=np.uint8)
    mujoco.mj_saveModel(model, None, content)
    return hashlib.sha256(content).hexdigest()


def _signature() -> int:
    return int(mujoco.mjtState.mjSTATE_INTEGRATION)


def _integration_state(data: Any) -> np.ndarray:
    state = np.empty(mujoco.mj_stateSize(data.model, _signature()))
    mujoco.mj_getState(data.model, data, state, _signature())
    return state


def _arrays(data: Any) -> dict[str, np.ndarray]:
    """Every array of numbers whose size does not change from step to step.

    These lie in one block, of which ``qpos`` is the first. Everything outside of it is in the
    arena, where an array may have a size but no memory yet.
    """
    start = _address(data.qpos)
    arrays = {}
    for name in dir(type(data)):
        value = None if name.startswith("_") else getattr(data, name)
        if not isinstance(value, np.ndarray) or value.dtype != np.float64 or not value.size:
            continue
        if name in _INLINE_ARRAYS or start <= _address(value) < start + data.nbuffer:
            arrays[name] = value
    return arrays


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
