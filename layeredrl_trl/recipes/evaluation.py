"""Acting without exploring or learning, in copies of the real environment side by side."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from layeredrl_trl import keys
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.agent import make_policy
from layeredrl_trl.recipes.config import TrainConfig
from layeredrl_trl.recipes.environments import make_env, max_episode_steps


def run_episodes(
    config: TrainConfig, predictor: RewardPredictor, *, episodes: int, seed: int
) -> TensorDictBase:
    """Act by planning, one episode in each of ``episodes`` envs.

    Args:
        config: of the run that trained ``predictor``.
        predictor: to plan with.
        episodes: number of episodes.
        seed: of environments and planner.

    Returns:
        The rollout, ``[episodes, T]`` with ``T`` the length of the longest, and
        ``("collector", "mask")`` False behind the end of each episode.
    """
    env = make_env(config.env, num_envs=episodes, seed=seed)
    policy, planner = make_policy(config, predictor, env.action_spec_unbatched)
    env.append_transform(planner.make_tensordict_primer())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        rollout = env.rollout(max_episode_steps(config.env), policy, break_when_all_done=True)
    env.close()
    rollout = rollout.reshape(episodes, -1)
    done = rollout.get(keys.NEXT_DONE)
    rollout.set(keys.MASK, done.cumsum(1) <= done)
    return rollout


def episode_returns(rollout: TensorDictBase) -> Tensor:
    """Sum the rewards of each episode of :func:`run_episodes`; ``[episodes]``."""
    reward = torch.where(rollout.get(keys.MASK), rollout.get(keys.NEXT_REWARD), 0.0)
    return reward.sum((1, 2))
