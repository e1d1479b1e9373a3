"""Real environments for the recipe: Gymnasium and dm_control by id, on the CPU, in float32."""

from __future__ import annotations

import contextlib
import difflib
import os
import warnings

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torchrl.envs import (
    Compose,
    DMControlEnv,
    DoubleToFloat,
    DTypeCastTransform,
    EnvBase,
    GymWrapper,
    InitTracker,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)

from layeredrl_trl import keys
from layeredrl_trl.envs import flatten_observation
from layeredrl_trl.recipes.errors import RecipeError, describe, quote
from layeredrl_trl.recipes.registry import find_spec, missing_package

_DM_CONTROL = "dm_control/"
_UNBOUNDED = 1e10  # what MuJoCo gives for no bound; Gymnasium gives infinity
_ACTIONS = (
    "this recipe supports one discrete choice that counts from 0, or a vector of float32 or float64"
)


def make_env(
    env_id: str, *, num_envs: int = 1, seed: int = 0, action_repeat: int = 1
) -> TransformedEnv:
    """Make an environment whose observation is one vector, or several copies of it.

    A copy of its own is made first, tried for two steps and closed.

    Args:
        env_id: id of a registered Gymnasium environment, also ``MODULE:ID``; or
            ``dm_control/DOMAIN-TASK``. Discrete actions are one-hot.
        num_envs: number of copies; one has batch size ``[]``, several have ``[num_envs]``.
        seed: seed of the first copy, from which the others follow.
        action_repeat: simulator steps per action; their rewards are added up.

    Returns:
        An env with the additional entries ``is_init``, ``step_count`` and ``episode_reward``.

    Raises:
        RecipeError: if the id is unknown, the observation or the action space is not supported, or
            the environment fails in its first steps.
    """
    _try_steps(env_id, action_repeat, seed)
    if num_envs > 1:
        # Each copy casts to float32 itself: TorchRL cannot write float64 into a part of the batch.
        env = SerialEnv(num_envs, lambda: _make_one(env_id, action_repeat))
    else:
        env = _make_one(env_id, action_repeat)
    trackers = Compose(InitTracker(), StepCounter(), RewardSum())
    env = TransformedEnv(env, trackers, auto_unwrap=True)
    env.set_seed(seed)
    return env


def max_episode_steps(env_id: str, default: int = 1000) -> int:
    """Return the number of simulator steps after which an episode is truncated, or ``default``.

    Raises:
        RecipeError: if the id is unknown.
    """
    if env_id.startswith(_DM_CONTROL):
        return default
    return find_spec(env_id).max_episode_steps or default


def _try_steps(env_id: str, action_repeat: int, seed: int) -> None:
    """Take two steps in a copy of the environment, and leave torch's random numbers alone."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what is wrong is said once, in an error
        try:
            with contextlib.closing(_make_one(env_id, action_repeat)) as env:
                _check_specs(env_id, env)
                env.set_seed(seed)
                steps = env.rollout(2)
        except RecipeError:
            raise
        except Exception as error:
            raise RecipeError(
                f"env: {quote(env_id)} fails in its first steps ({describe(error)}); mend it."
            ) from error
    for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION, keys.NEXT_REWARD):
        if not steps.get(key).isfinite().all():
            raise RecipeError(
                f"env: {quote(env_id)} gives a number that is not finite (in float32) as {key} in "
                "its first steps; mend it."
            )


def _make_one(env_id: str, action_repeat: int) -> TransformedEnv:
    make = _make_dm_control_env if env_id.startswith(_DM_CONTROL) else _make_gym_env
    shown = quote(env_id)
    try:
        env = make(env_id, action_repeat)
    except RecipeError:
        raise
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise missing_package(env_id, error) from error
    except Exception as error:
        raise RecipeError(
            f"env: {shown} cannot be made ({describe(error)}); see whether it works without "
            "layeredrl_trl."
        ) from error
    try:
        flatten = flatten_observation(env)
        return TransformedEnv(env, Compose(*_to_one_dtype(env), flatten, DoubleToFloat()))
    except ValueError as error:
        entries = {key: list(spec.shape) for key, spec in env.observation_spec.items()}
        env.close()
        raise RecipeError(
            f"env: {shown} has no observation made of vectors, but the entries {entries}; this "
            "recipe does not support it."
        ) from error


def _to_one_dtype(env: EnvBase) -> list[DTypeCastTransform]:
    """Cast entries of several dtypes to float32: a joint vector has only one."""
    dtypes = {key: spec.dtype for key, spec in env.observation_spec.items()}
    if len(set(dtypes.values())) < 2:
        return []
    return [
        DTypeCastTransform(dtype, torch.float32, in_keys=[key])
        for key, dtype in dtypes.items()
        if dtype != torch.float32
    ]


def _make_gym_env(env_id: str, action_repeat: int) -> GymWrapper:
    spec = find_spec(env_id)
    with warnings.catch_warnings():  # of versions that are not the newest
        warnings.simplefilter("ignore")
        env = gymnasium.make(spec, disable_env_checker=True)
    try:
        _check_action_space(env_id, env.action_space)
        _check_observation_space(env_id, env.observation_space)
        return GymWrapper(env, frame_skip=action_repeat)
    except Exception:
        env.close()
        raise


def _make_dm_control_env(env_id: str, action_repeat: int) -> DMControlEnv:
    os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is drawn, and GLFW needs a display
    domain, _, task = env_id.removeprefix(_DM_CONTROL).rpartition("-")
    suite = DMControlEnv.available_envs
    known = sorted(f"{name}-{task}" for name, tasks in suite for task in tasks)
    # without dm_control nothing is known, and the constructor says that it is missing
    if known and f"{domain}-{task}" not in known:
        similar = difflib.get_close_matches(f"{domain}-{task}", known, n=3)
        hint = f"its domains are {', '.join(sorted({name for name, _ in suite}))}"
        if similar:
            hint = f"similar: {', '.join(f'{_DM_CONTROL}{name}' for name in similar)}"
        raise RecipeError(f"env: dm_control has no task {quote(env_id)}; {hint}.")
    return DMControlEnv(domain, task, frame_skip=action_repeat)


def _check_action_space(env_id: str, space: spaces.Space) -> None:
    """Refuse the action spaces that TorchRL converts to something else or not at all."""
    if isinstance(space, spaces.Discrete):
        legal = space.start == 0
    else:
        legal = isinstance(space, spaces.Box) and space.dtype in (np.float32, np.float64)
        legal = legal and len(space.shape) == 1
    if not legal:
        raise RecipeError(f"env: {quote(env_id)} has the action space {space}; {_ACTIONS}.")


def _check_observation_space(env_id: str, space: spaces.Space) -> None:
    """Refuse the observation spaces that TorchRL converts to something else or not at all."""
    entries = space.values() if isinstance(space, spaces.Dict) else [space]
    for entry in entries:
        legal = isinstance(entry, spaces.Box | spaces.MultiBinary)
        if isinstance(entry, spaces.Discrete | spaces.MultiDiscrete):
            legal = not np.any(entry.start)
        if not legal:
            raise RecipeError(
                f"env: {quote(env_id)} has no observation made of vectors, but the observation "
                f"space {space}; this recipe supports vectors and choices that count from 0, and "
                "a dictionary of these."
            )


def _check_specs(env_id: str, env: EnvBase) -> None:
    """Refuse actions that cannot be explored, and observations without a number."""
    action = env.action_spec
    if action.ndim != 1 or not action.shape[0] or action.domain not in ("continuous", "discrete"):
        raise RecipeError(
            f"env: {quote(env_id)} has the action space {type(action).__name__} of shape "
            f"{list(action.shape)}; {_ACTIONS}."
        )
    if action.domain == "continuous":
        width = action.space.high - action.space.low
        if not (width < _UNBOUNDED).all():
            raise RecipeError(
                f"env: {quote(env_id)} has unbounded actions, which cannot be explored; bound them."
            )
    if not env.observation_spec[keys.OBSERVATION].shape[-1]:
        raise RecipeError(f"env: {quote(env_id)} has an observation without any number.")
