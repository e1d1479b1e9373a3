"""The learned model as a TorchRL environment that any planner or policy can act in.

And what real environments need for it: observations of several entries as one vector.
"""

from layeredrl_trl.envs.flat_observation import flatten_observation, observation_layout
from layeredrl_trl.envs.imagination import Imagination, ImaginedStep
from layeredrl_trl.envs.predictor_env import InitialState, PredictorEnv, spread_members

__all__ = [
    "Imagination",
    "ImaginedStep",
    "InitialState",
    "PredictorEnv",
    "flatten_observation",
    "observation_layout",
    "spread_members",
]
