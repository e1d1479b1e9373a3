"""Evaluation episodes: acting without exploring or learning, in copies of the real environment."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl import keys
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.agent import make_policy
from layeredrl_trl.recipes.config import TrainConfig
from layeredrl_trl.recipes.environments import make_env, max_episode_steps


def run_episodes(
    config: TrainConfig, predictor: RewardPredictor, *, episodes: int, seed: int
) -> TensorDictBase:
    """Act by planning, one episode in each of ``episodes`` envs.

    ``config`` holds the options of the run that trained the predictor; envs and planner are seeded.

    Returns:
        The rollout ``[episodes, T]``, where ``T`` is the length of the longest episode;
        ``("collector", "mask")`` is False after the end of each episode.
    """
    repeat = config.action_repeat
    env = make_env(config.env, num_envs=episodes, seed=seed, action_repeat=repeat)
    policy, planner = make_policy(config, predictor, env.action_spec_unbatched)
    env.append_transform(planner.make_tensordict_primer())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        max_steps = -(-max_episode_steps(config.env) // repeat)
        rollout = env.rollout(max_steps, policy, break_when_all_done=True)
    env.close()
    rollout = rollout.reshape(episodes, -1)
    done = rollout.get(keys.NEXT_DONE)
    rollout.set(keys.MASK, done.cumsum(1) <= done)
    return rollout


def episode_returns(rollout: TensorDictBase) -> Tensor:
    """Sum the rewards of each episode of :func:`run_episodes`, ``[episodes]``."""
    reward = torch.where(rollout.get(keys.MASK), rollout.get(keys.NEXT_REWARD), 0.0)
    return reward.sum((1, 2))


def as_buffer(rollout: TensorDictBase) -> TensorDictReplayBuffer:
    """Put the real steps of :func:`run_episodes` into a replay buffer, episode after episode."""
    done = rollout.get(keys.NEXT_DONE).clone()
    done[:, -1] = True  # an episode without a time limit may not have ended
    rollout = rollout.clone(recurse=False).set(keys.NEXT_DONE, done)
    steps = rollout[rollout.get(keys.MASK).squeeze(-1)].exclude(keys.MASK, keys.TRAJ_IDS)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(steps)))
    buffer.extend(steps)
    return buffer
