"""Environments whose state may be somewhere that cannot be seen are refused, with the reason."""

import functools
import threading

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from torchrl.envs import (
    DMControlEnv,
    GymEnv,
    GymWrapper,
    ParallelEnv,
    PendulumEnv,
    SerialEnv,
    Transform,
    TransformedEnv,
)

from layeredrl_trl.checkpoints.env_state import EnvState
from tests.checkpoints.resumed_envs import CountingHopper, make_env
from tests.extras import needs_dm_control, needs_gymnasium_robotics


class Unknown(gym.Env):
    """Somebody's environment, whose state may be anywhere."""

    observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


class Watched(CountingHopper):
    """An environment that keeps state in an object."""

    def __init__(self):
        super().__init__()
        self.watcher = threading.Event()


class TwoNames(CountingHopper):
    """An environment with one array under two names."""

    def __init__(self):
        super().__init__()
        self.last = self.first = np.zeros(2)


class View(CountingHopper):
    """An environment with a view of the simulation's memory."""

    def __init__(self):
        super().__init__()
        self.position = self.data.qpos[:2]


class TwoGenerators(CountingHopper):
    """An environment that draws from one generator under two names."""

    def reset_model(self):
        self.noise = self.np_random
        return super().reset_model()


class Learned(Transform):
    """A transform that holds a module."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)


REFUSED = [
    pytest.param(
        lambda: ParallelEnv(2, functools.partial(GymEnv, "Pendulum-v1")),
        "env is a ParallelEnv",
        id="other-processes",
    ),
    pytest.param(lambda: GymEnv("CartPole-v1", num_envs=2), "is a AsyncVectorEnv", id="vectorised"),
    pytest.param(lambda: GymWrapper(Unknown()), "env._env is a Unknown", id="third-party"),
    pytest.param(
        lambda: type("Mine", (PendulumEnv,), {})(), "env is a Mine", id="subclass-of-a-torchrl-env"
    ),
    pytest.param(lambda: GymWrapper(Watched()), "env._env.watcher is a Event", id="object"),
    pytest.param(
        lambda: GymWrapper(TwoNames()), "env._env.first and env._env.last share", id="two-names"
    ),
    pytest.param(lambda: GymWrapper(View()), "env._env.position is a view", id="view"),
    pytest.param(lambda: GymWrapper(TwoGenerators()), "share memory", id="two-generators"),
    pytest.param(
        lambda: GymWrapper(gym.wrappers.TransformReward(gym.make("Pendulum-v1"), abs)),
        "env._env.func is a builtin_function_or_method",
        id="wrapper-with-a-function",
    ),
    pytest.param(
        lambda: GymWrapper(gym.wrappers.RecordEpisodeStatistics(gym.make("Pendulum-v1"))),
        "env._env.time_queue is a deque",
        id="wrapper-with-a-queue",
    ),
    pytest.param(
        lambda: GymWrapper(gym.wrappers.StickyAction(gym.make("Pendulum-v1"), 0.3)),
        "env._env.last_action is a view",
        id="wrapper-with-the-tensor-of-the-action",
    ),
    pytest.param(
        lambda: TransformedEnv(GymEnv("Pendulum-v1"), Learned()),
        "env.transform, a Learned, holds modules",
        id="transform-with-a-module",
    ),
    pytest.param(
        lambda: SerialEnv(2, [lambda: GymWrapper(CountingHopper()), lambda: GymWrapper(Watched())]),
        r"env\[1\]._env.watcher",
        id="one-of-several",
    ),
    pytest.param(
        lambda: DMControlEnv("cartpole", "balance"),
        "env is a DMControlEnv",
        id="dm_control",
        marks=needs_dm_control,
    ),
    pytest.param(
        lambda: GymEnv("gymnasium_robotics:PointMaze_UMaze-v3"),
        "is a PointMazeEnv",
        id="maze",
        marks=needs_gymnasium_robotics,
    ),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_env_of_unknown_state_is_refused(make, reason):
    env = make()
    state = EnvState(env)
    assert not state.can_be_saved
    if not isinstance(env, ParallelEnv):  # it would start processes
        env.rand_step(env.reset())
    with pytest.raises(ValueError, match=rf"cannot be saved: .*{reason}"):
        state.state_dict()
    with pytest.raises(ValueError, match="cannot be saved"):
        state.load_state_dict({})
    env.close(raise_if_closed=False)


def test_changed_model_is_refused():
    env = make_env("Hopper-v5")
    state = EnvState(env)
    env._env.unwrapped.model.body_mass[1] *= 1.1
    assert not state.can_be_saved
    with pytest.raises(ValueError, match="model has been changed"):
        state.state_dict()


def test_sleeping_islands_are_refused():
    env = make_env("Hopper-v5")
    env._env.unwrapped.model.opt.enableflags |= mujoco.mjtEnableBit.mjENBL_SLEEP
    with pytest.raises(ValueError, match="sleeping islands"):
        EnvState(env).state_dict()
