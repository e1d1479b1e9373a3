"""Real environments for the recipe: Gymnasium by id, on the CPU, float32."""

from __future__ import annotations

import difflib

import gymnasium
import torch
from torchrl.data import Composite
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    EnvBase,
    GymEnv,
    InitTracker,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)

from layeredrl_trl import keys
from layeredrl_trl.recipes.config import RecipeError


def make_env(env_id: str, *, num_envs: int = 1, seed: int = 0) -> EnvBase:
    """Make one or several copies of a Gymnasium environment.

    Args:
        env_id: as registered with Gymnasium.
        num_envs: copies; one has batch size ``[]``, several ``[num_envs]``.
        seed: of the first copy; the others follow.

    Returns:
        An env with ``is_init``, ``step_count`` and ``episode_reward`` entries.

    Raises:
        RecipeError: if the id is unknown, or the observation or the action space is not supported.
    """
    probe = _make_gym_env(env_id)
    _check_spaces(env_id, probe)
    base = probe
    if num_envs > 1:
        probe.close()
        base = SerialEnv(num_envs, lambda: _make_gym_env(env_id))
    env = TransformedEnv(
        base,
        Compose(DoubleToFloat(), InitTracker(), StepCounter(), RewardSum()),
    )
    env.set_seed(seed)
    return env


def max_episode_steps(env_id: str, default: int = 1000) -> int:
    """Return after how many steps Gymnasium truncates an episode; ``default`` if it does not."""
    return gymnasium.spec(env_id).max_episode_steps or default


def _make_gym_env(env_id: str) -> GymEnv:
    try:
        return GymEnv(env_id)
    except gymnasium.error.UnregisteredEnv as error:
        similar = difflib.get_close_matches(env_id, gymnasium.registry, n=3)
        hint = f"similar: {', '.join(similar)}" if similar else "see `gymnasium.pprint_registry()`"
        raise RecipeError(
            f"env: Gymnasium has no environment {env_id!r} ({str(error).rstrip('.')}); {hint}."
        ) from error
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise RecipeError(
            f"env: {env_id!r} needs a package that is not installed: {error} "
            "(pip install 'layeredrl_trl[mujoco]' or '[robotics]')."
        ) from error


def _check_spaces(env_id: str, env: EnvBase) -> None:
    observation, action = env.observation_spec.get(keys.OBSERVATION, None), env.action_spec
    if observation is None or isinstance(observation, Composite) or observation.ndim != 1:
        raise RecipeError(
            f"env: {env_id!r} has no flat 'observation' vector, but the entries "
            f"{dict((k, list(v.shape)) for k, v in env.observation_spec.items())}; "
            "this recipe does not support it yet."
        )
    if not action.dtype.is_floating_point or action.ndim != 1:
        raise RecipeError(
            f"env: {env_id!r} has the action space {type(action).__name__} of shape "
            f"{list(action.shape)}; this recipe supports continuous action vectors only."
        )
    bounds = torch.stack([action.space.low, action.space.high])
    if not bounds.isfinite().all():
        raise RecipeError(f"env: {env_id!r} has unbounded actions, which cannot be explored.")
