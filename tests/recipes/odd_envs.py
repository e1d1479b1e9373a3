"""Gymnasium envs that a user may well come with, registered when this module is imported.

Their ids are ``tests.recipes.odd_envs:NAME-v0``; :func:`odd` makes them. Those of
:data:`ACTIONS`, :data:`NO_VECTORS` and :data:`VECTORS` (spaces of observations) differ in one space
from an env of vectors, those of :data:`FAULTS` in what they do.
"""

import gymnasium
import numpy as np
from gymnasium.spaces import (
    Box,
    Dict,
    Discrete,
    Graph,
    MultiBinary,
    MultiDiscrete,
    OneOf,
    Sequence,
    Text,
    Tuple,
)

VECTOR = Box(-1.0, 1.0, (2,), np.float32)
EPISODE_LENGTH = 12

ACTIONS = {
    "MultiDiscrete": MultiDiscrete([2, 3]),
    "OneMultiDiscrete": MultiDiscrete([4]),
    "MultiBinary": MultiBinary(3),
    "OneMultiBinary": MultiBinary(1),
    "IntBox": Box(0, 5, (2,), np.int64),
    "ByteBox": Box(0, 5, (1,), np.uint8),
    "HalfBox": Box(-1, 1, (2,), np.float16),
    "Matrix": Box(-1, 1, (2, 2)),
    "Scalar": Box(-1, 1, ()),
    "Empty": Box(-1, 1, (0,)),
    "Dict": Dict(a=VECTOR),
    "Tuple": Tuple((VECTOR, VECTOR)),
    "Text": Text(5),
    "Sequence": Sequence(VECTOR),
    "Unbounded": Box(-np.inf, np.inf, (2,)),
    "HalfBounded": Box(np.float32([0, -np.inf]), np.float32([1, 1])),
    "LargestBounds": Box(-3e38, 3e38, (2,)),
    "MujocosBounds": Box(-1e10, 1e10, (2,)),
    "Shifted": Discrete(3, start=-1),
    "Choice": Discrete(3),
    "Doubles": Box(-1, 1, (2,), np.float64),
}
NO_VECTORS = {
    "Text": Text(5),
    "Tuple": Tuple((VECTOR, VECTOR)),
    "Sequence": Sequence(VECTOR),
    "Graph": Graph(VECTOR, VECTOR),
    "OneOf": OneOf((VECTOR, VECTOR)),
    "Matrix": Box(-1, 1, (2, 2)),
    "Image": Box(0, 255, (4, 4, 3), np.uint8),
    "Empty": Box(-1, 1, (0,)),
    "Shifted": Discrete(3, start=2),
    "ShiftedInDict": Dict(a=VECTOR, b=Discrete(3, start=2)),
    "NestedDict": Dict(a=Dict(b=VECTOR)),
    "RewardInDict": Dict(a=VECTOR, reward=VECTOR),
}
VECTORS = {
    "Choice": Discrete(3),
    "Bits": MultiBinary(3),
    "Bytes": Box(0, 255, (2,), np.uint8),
    "ChoiceInDict": Dict(a=VECTOR, b=Discrete(3)),
    "IntsInDict": Dict(a=Box(0, 5, (2,), np.int64), b=VECTOR),
    "DoublesInDict": Dict(a=Box(-1, 1, (2,), np.float64), b=VECTOR, c=MultiBinary(2)),
}
FAULTS = {
    "NanReward": {"reward": float("nan")},
    "HugeReward": {"reward": 1e300},
    "VectorReward": {"reward": np.ones(2)},
    "TextReward": {"reward": "1"},
    "BadReset": {"fails_at": 0},
    "BadStep": {"fails_at": 1},
    "BadStepLater": {"fails_at": 9},
}


class OddEnv(gymnasium.Env):
    """Draws observations from its space; step ``fails_at`` of an episode (0: reset) raises."""

    def __init__(self, observation=VECTOR, action=VECTOR, reward=1.0, fails_at=None):
        self.observation_space = observation
        self.action_space = action
        self.reward = reward
        self.fails_at = fails_at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.count = 0
        self._fail()
        return self.observation_space.sample(), {}

    def step(self, action):
        self.count += 1
        self._fail()
        assert self.action_space.contains(action)
        return self.observation_space.sample(), self.reward, False, False, {}

    def _fail(self):
        if self.count == self.fails_at:
            raise RuntimeError("two\nlines")


class OldEnv(OddEnv):
    """Has the interface that Gym had before 0.26."""

    def reset(self):
        return super().reset()[0]

    def step(self, action):
        return super().step(action)[:4]


class SeedlessEnv(OddEnv):
    """Cannot be seeded."""

    def reset(self, *, options=None):
        return super().reset()


class ShapelessEnv(OddEnv):
    """Gives observations of another shape than its space."""

    def reset(self, *, seed=None, options=None):
        return np.zeros(5, np.float32), super().reset(seed=seed)[1]


def odd(name):
    return f"{__name__}:{name}-v0"


def make_nothing():
    raise ValueError("two\nlines")


def _register():
    options = {"Good": {}, **FAULTS}
    observations = NO_VECTORS | VECTORS
    options |= {f"{name}Action": {"action": space} for name, space in ACTIONS.items()}
    options |= {
        f"{name}Observation": {"observation": space} for name, space in observations.items()
    }
    for name, kwargs in options.items():
        gymnasium.register(f"{name}-v0", OddEnv, max_episode_steps=EPISODE_LENGTH, kwargs=kwargs)
    gymnasium.register("odd/Good-v3", OddEnv, max_episode_steps=EPISODE_LENGTH)
    gymnasium.register("Old-v0", OldEnv)
    gymnasium.register("Seedless-v0", SeedlessEnv)
    gymnasium.register("Shapeless-v0", ShapelessEnv)
    gymnasium.register("Nothing-v0", make_nothing)
    gymnasium.register("NoClass-v0", f"{__name__}:NoClass")
    gymnasium.register("NoModule-v0", "no_such_module:NoClass")
    gymnasium.register("NoEnv-v0", lambda: 3)


if "Good-v0" not in gymnasium.registry:
    _register()
