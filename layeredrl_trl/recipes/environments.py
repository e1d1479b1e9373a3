"""Real environments for the recipe: Gymnasium and dm_control by id, on the CPU, in float32."""

from __future__ import annotations

import difflib
import os

import gymnasium
import torch
from torchrl.envs import (
    Compose,
    DMControlEnv,
    DoubleToFloat,
    EnvBase,
    GymEnv,
    InitTracker,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)

from layeredrl_trl.envs import flatten_observation
from layeredrl_trl.recipes.config import RecipeError

_DM_CONTROL = "dm_control/"


def make_env(
    env_id: str, *, num_envs: int = 1, seed: int = 0, action_repeat: int = 1
) -> TransformedEnv:
    """Make an environment whose observation is one vector, or several copies of it.

    Args:
        env_id: id of a registered Gymnasium environment, or ``dm_control/DOMAIN-TASK``. Discrete
            actions are one-hot.
        num_envs: number of copies; one has batch size ``[]``, several have ``[num_envs]``.
        seed: seed of the first copy, from which the others follow.
        action_repeat: simulator steps per action; their rewards are added up.

    Returns:
        An env with the additional entries ``is_init``, ``step_count`` and ``episode_reward``.

    Raises:
        RecipeError: if the id is unknown, or the observation or the action space is not supported.
    """
    env = _make_one(env_id, action_repeat)
    _check_action(env_id, env)
    if num_envs > 1:
        env.close()
        # Each copy casts to float32 itself: TorchRL cannot write float64 into a part of the batch.
        env = SerialEnv(num_envs, lambda: _make_one(env_id, action_repeat))
    trackers = Compose(InitTracker(), StepCounter(), RewardSum())
    env = TransformedEnv(env, trackers, auto_unwrap=True)
    env.set_seed(seed)
    return env


def max_episode_steps(env_id: str, default: int = 1000) -> int:
    """Return the number of simulator steps after which an episode is truncated, or ``default``."""
    if env_id.startswith(_DM_CONTROL):
        return default
    return gymnasium.spec(env_id).max_episode_steps or default


def _make_one(env_id: str, action_repeat: int) -> TransformedEnv:
    make = _make_dm_control_env if env_id.startswith(_DM_CONTROL) else _make_gym_env
    try:
        env = make(env_id, action_repeat)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise RecipeError(
            f"env: {env_id!r} needs a package that is not installed: {error} "
            "(pip install 'layeredrl_trl[mujoco]', '[robotics]' or '[dm-control]')."
        ) from error
    try:
        return TransformedEnv(env, Compose(flatten_observation(env), DoubleToFloat()))
    except ValueError as error:
        entries = {key: list(spec.shape) for key, spec in env.observation_spec.items()}
        raise RecipeError(
            f"env: {env_id!r} has no observation made of vectors, but the entries {entries}; this "
            "recipe does not support it."
        ) from error


def _make_gym_env(env_id: str, action_repeat: int) -> GymEnv:
    try:
        return GymEnv(env_id, frame_skip=action_repeat)
    except gymnasium.error.UnregisteredEnv as error:
        similar = difflib.get_close_matches(env_id, gymnasium.registry, n=3)
        hint = f"similar: {', '.join(similar)}" if similar else "see `gymnasium.pprint_registry()`"
        raise RecipeError(
            f"env: Gymnasium has no environment {env_id!r} ({str(error).rstrip('.')}); {hint}."
        ) from error


def _make_dm_control_env(env_id: str, action_repeat: int) -> DMControlEnv:
    os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is drawn, and GLFW needs a display
    domain, _, task = env_id.removeprefix(_DM_CONTROL).rpartition("-")
    suite = DMControlEnv.available_envs
    known = sorted(f"{name}-{task}" for name, tasks in suite for task in tasks)
    # without dm_control nothing is known, and the constructor says that it is missing
    if known and f"{domain}-{task}" not in known:
        similar = difflib.get_close_matches(f"{domain}-{task}", known, n=3)
        hint = ", ".join(f"{_DM_CONTROL}{name}" for name in similar or known)
        raise RecipeError(f"env: dm_control has no task {env_id!r}; similar: {hint}.")
    return DMControlEnv(domain, task, frame_skip=action_repeat)


def _check_action(env_id: str, env: EnvBase) -> None:
    action = env.action_spec
    if action.ndim != 1 or action.domain not in ("continuous", "discrete"):
        raise RecipeError(
            f"env: {env_id!r} has the action space {type(action).__name__} of shape "
            f"{list(action.shape)}; this recipe supports one discrete action or a vector only."
        )
    if action.domain == "continuous":
        bounds = torch.stack([action.space.low, action.space.high])
        if not bounds.isfinite().all():
            raise RecipeError(f"env: {env_id!r} has unbounded actions, which cannot be explored.")
