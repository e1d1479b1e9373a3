"""Environments whose state is saved and restored, and how a run of one goes on."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.checkpoint import Checkpoint
from torchrl.envs import (
    CatFrames,
    Compose,
    DoubleToFloat,
    EnvBase,
    FinancialRegimeEnv,
    GymEnv,
    GymWrapper,
    InitTracker,
    ObservationNorm,
    PendulumEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TicTacToeEnv,
    TrajCounter,
    TransformedEnv,
    VecNormV2,
)

from layeredrl_trl.checkpoints.env_state import EnvState

GYMNASIUM = (
    "Pendulum-v1",
    "CartPole-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Acrobot-v1",
    "FrozenLake-v1",
)
MUJOCO = (
    "InvertedPendulum-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Ant-v5",
    "Walker2d-v5",
    "Swimmer-v5",
    "Reacher-v5",
    "Pusher-v5",
)
OTHERS = (
    "frame skip",
    "wrappers",
    "transforms",
    "normalised",
    "serial",
    "serial without buffers",
    "serial ants",
    "torchrl pendulum",
    "torchrl regimes",
    "torchrl tic-tac-toe",
    "own",
)


class CountingHopper(HopperEnv):
    """A user's MuJoCo environment with attributes of its own, some of which come to be late."""

    def __init__(self, **options):
        self.best = -np.inf
        self.noise = np.random.default_rng(3)
        super().__init__(**options)

    def reset_model(self):
        self.target = self.np_random.uniform(size=2)
        self.history = []
        return super().reset_model()

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        self.last_action = np.array(action)
        self.history.append(float(reward))
        self.best = max(self.best, reward)
        reward += self.target.sum() + self.best + sum(self.history) + self.noise.normal()
        reward += self.data.time
        return observation, reward, terminated, truncated, info


def make_env(name: str) -> EnvBase:
    """An environment that was never reset, and whose episodes are at most 40 steps long."""
    match name:
        case "frame skip":
            return GymEnv("Pendulum-v1", frame_skip=3, max_episode_steps=40)
        case "wrappers":
            env = gym.make("Pendulum-v1", max_episode_steps=40, disable_env_checker=False)
            env = gym.wrappers.StickyAction(env, 0.3)
            return GymWrapper(gym.wrappers.RescaleAction(env, -np.float32(1), np.float32(1)))
        case "transforms":
            inner = Compose(StepCounter(33), RewardSum())
            outer = Compose(
                InitTracker(),
                DoubleToFloat(),
                ObservationNorm(0.1, 0.3, in_keys=["observation"]),
                CatFrames(3, dim=-1, in_keys=["observation"]),
                TrajCounter(),
            )
            env = TransformedEnv(make_env("Hopper-v5"), inner)
            return TransformedEnv(env, outer, auto_unwrap=False)
        case "normalised":
            norm = VecNormV2(in_keys=["observation", "reward"])
            return TransformedEnv(make_env("InvertedPendulum-v5"), norm)
        case "serial":
            return SerialEnv(3, [lambda: make_env("CartPole-v1")] * 3)
        case "serial without buffers":
            make = [lambda: make_env("CartPole-v1")] * 3
            return TransformedEnv(SerialEnv(3, make, use_buffers=False), StepCounter())
        case "serial ants":
            return SerialEnv(2, lambda: make_env("Ant-v5"))
        case "torchrl pendulum":
            return TransformedEnv(PendulumEnv(), StepCounter(20))
        case "torchrl regimes":
            return TransformedEnv(FinancialRegimeEnv(), StepCounter(20))
        case "torchrl tic-tac-toe":
            return TicTacToeEnv()
        case "own":
            return GymWrapper(gym.wrappers.TimeLimit(CountingHopper(), 40))
    return GymEnv(name, max_episode_steps=40)


def run(env: EnvBase, n_steps: int, seed: int) -> TensorDictBase:
    """Take random steps from a reset, and return what goes into the next step."""
    torch.manual_seed(seed)
    env.set_seed(seed)
    tensordict = env.reset()
    for _ in range(n_steps):
        _, tensordict = env.step_and_maybe_reset(env.rand_action(tensordict))
    return tensordict.clone()


def random_actions(env: EnvBase, tensordict: TensorDictBase, n_steps: int) -> Tensor:
    """Draw actions without stepping."""
    drawn = [env.rand_action(tensordict.clone())["action"] for _ in range(n_steps)]
    return torch.stack(drawn)


def go_on(env: EnvBase, tensordict: TensorDictBase, actions: Tensor) -> TensorDictBase:
    """Take steps of the given actions, resetting where an episode ends.

    Returns:
        the steps, `[time, ...]`, each with the observation that the next one starts from.
    """
    steps, tensordict = [], tensordict.clone()
    for action in actions:
        step, tensordict = env.step_and_maybe_reset(tensordict.set("action", action.clone()))
        steps.append(step.clone().set("after", tensordict.clone()))
    return TensorDict.stack(steps)


def assert_same_bits(got: TensorDictBase, expected: TensorDictBase) -> None:
    """Check that two TensorDicts have the same entries, bit for bit."""
    assert frozen(got.to_dict()) == frozen(expected.to_dict())


def frozen(value: object) -> object:
    """A copy of a state that compares equal to another only if all of its bits are the same."""
    if isinstance(value, Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: frozen(content) for key, content in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, (tuple, list)) else value


def main(*arguments: str) -> None:
    """Go on from the checkpoint in each folder, given pairs of a folder and an environment."""
    for place, name in zip(arguments[::2], arguments[1::2], strict=True):
        folder, env = Path(place), make_env(name)
        Checkpoint(env=EnvState(env)).load(folder / "checkpoint")
        carried = TensorDict.load_memmap(folder / "carried")
        torch.manual_seed(0)
        go_on(env, carried, torch.load(folder / "actions.pt")).memmap(folder / "steps")
