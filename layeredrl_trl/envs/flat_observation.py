"""Observations of several entries as one vector, and the dims of that vector for each entry.

The entries are in the order of Gymnasium's ``FlattenObservation``, which is the order of the keys
of the env's ``Dict`` space. (A ``Dict`` space made from a plain dictionary sorts its keys; one made
from an ``OrderedDict``, from pairs, or with ``sort_keys=False`` does not.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import accumulate
from typing import Any

import gymnasium
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv, VectorWrapper
from tensordict import NestedKey
from torchrl.data import Composite
from torchrl.envs import CatTensors, EnvBase, GymLikeEnv, ParallelEnv, SerialEnv, TransformedEnv

from layeredrl_trl import keys


def observation_layout(env: Any) -> dict[NestedKey, range]:
    """Tell which dims of the flattened observation each entry takes.

    Args:
        env: a Gymnasium env or vector env, flattened by ``FlattenObservation`` or not; or a TorchRL
            env. The order of a TorchRL env is that of the ``CatTensors`` that writes
            ``observation``. Without one it is the order of the Gymnasium env inside, or without
            that (dm_control) of the observation spec.

    Returns:
        The dims of each entry by its key, in order. An observation without entries counts as one
        entry called ``observation``.

    Raises:
        TypeError: if ``env`` is none of these.
        ValueError: if the observation of a wrapped env with entries is not these entries flattened.

    Example:
        >>> observation_layout(gymnasium.make("CartPole-v1"))
        {'observation': range(0, 4)}
    """
    if isinstance(env, EnvBase):
        sizes = _torchrl_sizes(env)
    elif isinstance(env, gymnasium.Env | VectorEnv):
        sizes = _gymnasium_sizes(env)
    else:
        raise TypeError(
            "env: expected a gymnasium Env or VectorEnv or a torchrl EnvBase, "
            f"got {type(env).__module__}.{type(env).__name__}."
        )
    ends = accumulate(sizes.values())
    return {key: range(end - sizes[key], end) for key, end in zip(sizes, ends, strict=True)}


def flatten_observation(env: EnvBase, *, del_keys: bool = True) -> CatTensors:
    """Make the transform that joins all entries of an observation to one vector ``observation``.

    The result is that of Gymnasium's ``FlattenObservation``. The transform is needed because
    TorchRL's ``GymEnv`` puts the entries of a goal-based observation at the root, in float64;
    ``observation`` is then only one of them.

    Args:
        env: a TorchRL env without this transform.
        del_keys: whether to remove the entries afterwards.

    Returns:
        A ``CatTensors`` to append to the env; append ``DoubleToFloat`` after it for float32.

    Raises:
        TypeError: if ``env`` is not a TorchRL env.
        ValueError: if an entry is not a vector; apply ``FlattenObservation`` to the Gymnasium env
            instead.

    Example:
        >>> from torchrl.envs import Compose, DoubleToFloat, GymEnv
        >>> env = GymEnv("Pendulum-v1")
        >>> env = TransformedEnv(env, Compose(flatten_observation(env), DoubleToFloat()))
        >>> env.observation_spec["observation"].shape
        torch.Size([3])
    """
    if not isinstance(env, EnvBase):
        raise TypeError(
            f"env: expected a torchrl EnvBase, got {type(env).__name__}; flatten Gymnasium envs by "
            "gymnasium.wrappers.FlattenObservation."
        )
    layout, spec = observation_layout(env), env.observation_spec_unbatched
    for key, dims in layout.items():
        entry = spec.get(key, None)
        if entry is None or isinstance(entry, Composite) or entry.shape != (len(dims),):
            got = "nothing" if entry is None else f"shape {list(entry.shape)}"
            raise ValueError(
                f"env: expected a vector of {len(dims)} dims as observation entry {key!r}, "
                f"got {got}; apply gymnasium.wrappers.FlattenObservation to the Gymnasium env."
            )
    return CatTensors(list(layout), keys.OBSERVATION, sort=False, del_keys=del_keys)


def _torchrl_sizes(env: EnvBase) -> dict[NestedKey, int]:
    """Return the number of dims of each entry of a TorchRL env's observation."""
    while isinstance(env, TransformedEnv):
        _ = env.observation_spec  # a CatTensors without in_keys sets them when specs are made
        transforms = env.transform if hasattr(env.transform, "__iter__") else [env.transform]
        for transform in reversed(list(transforms)):
            if isinstance(transform, CatTensors) and keys.OBSERVATION in transform.out_keys:
                spec = transform.parent.observation_spec_unbatched
                return {key: spec[key].shape[-1] for key in transform.in_keys}
        env = env.base_env
    if isinstance(env, GymLikeEnv) and isinstance(env._env, gymnasium.Env | VectorEnv):
        return _gymnasium_sizes(env._env)
    if isinstance(env, SerialEnv | ParallelEnv):
        with closing(env.create_env_fn[0](**env.create_env_kwargs[0])) as copy:
            return _torchrl_sizes(copy)
    return {
        key: entry.shape.numel() for key, entry in env.observation_spec_unbatched.items(True, True)
    }


def _gymnasium_sizes(env: gymnasium.Env | VectorEnv) -> dict[NestedKey, int]:
    """Return the number of dims of each entry of a Gymnasium env's observation."""
    wrapped = list(_observation_spaces(env))
    outermost = wrapped[0]
    entries = next((space for space in wrapped if isinstance(space, spaces.Dict)), None)
    if entries is None:
        return {keys.OBSERVATION: spaces.flatdim(outermost)}
    sizes: dict[NestedKey, int] = {
        key: spaces.flatdim(space) for key, space in entries.spaces.items()
    }
    total = sum(sizes.values())
    if outermost is not entries and outermost.shape != (total,):
        raise ValueError(
            f"env: expected an observation that is the entries {sizes} (dims by key) flattened, "
            f"of shape [{total}], got {outermost}."
        )
    return sizes


def _observation_spaces(env: Any) -> Iterator[spaces.Space]:
    """Yield the spaces of one env's observation, from the outermost wrapper to the env inside."""
    yield env.single_observation_space if isinstance(env, VectorEnv) else env.observation_space
    if isinstance(env, gymnasium.Wrapper | VectorWrapper):
        yield from _observation_spaces(env.env)
    elif isinstance(env, SyncVectorEnv):
        yield from _observation_spaces(env.envs[0])
    elif isinstance(env, AsyncVectorEnv):
        with closing(env.env_fns[0]()) as copy:  # the envs themselves live in other processes
            yield from _observation_spaces(copy)
