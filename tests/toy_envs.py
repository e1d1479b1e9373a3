"""Gymnasium envs for tests, made so that it is seen which entry a number comes from."""

from collections import OrderedDict

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

SORTED = ("achieved_goal", "desired_goal", "observation")
UNSORTED = ("observation", "desired_goal", "achieved_goal")


class GoalEnv(gymnasium.Env):
    """Goal-based; the entries of its observation have 2, 2 and 4 dims (or other sizes)."""

    def __init__(self, order=UNSORTED, goal_dim=2, obs_shape=(4,), episode_length=5):
        shapes = {
            "achieved_goal": (goal_dim,),
            "desired_goal": (goal_dim,),
            "observation": obs_shape,
        }
        self.observation_space = Dict(
            OrderedDict((key, Box(-np.inf, np.inf, shapes[key], np.float64)) for key in order)
        )
        self.action_space = Box(-1.0, 1.0, (goal_dim,), np.float32)
        self.episode_length = episode_length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        self.goal = self.np_random.normal(size=self.action_space.shape)
        self.position = self.np_random.normal(size=self.action_space.shape)
        return self._observation(), {}

    def step(self, action):
        self.count += 1
        self.position = self.position + 0.1 * np.asarray(action)
        reward = -float(np.linalg.norm(self.position - self.goal))
        return self._observation(), reward, False, self.count >= self.episode_length, {}

    def _observation(self):
        every = {
            "achieved_goal": self.position,
            "desired_goal": self.goal,
            "observation": self.np_random.normal(size=self.observation_space["observation"].shape),
        }
        # On purpose not in the order of the space, as in gymnasium-robotics.
        return {key: every[key] for key in reversed(self.observation_space.spaces)}
