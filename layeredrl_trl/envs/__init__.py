"""The learned model as a TorchRL environment that any planner or policy can act in.

And what real environments need for it: observations of several entries as one vector; and rewards
for what the model does not know, on either.
"""

from layeredrl_trl.envs.flat_observation import flatten_observation, observation_layout
from layeredrl_trl.envs.imagination import Imagination
from layeredrl_trl.envs.imagined_step import ImaginedState, ImaginedStep
from layeredrl_trl.envs.initial_state import InitialState, spread_members
from layeredrl_trl.envs.predictor_env import PredictorEnv
from layeredrl_trl.envs.uncertainty_rewards import (
    DisagreementBonus,
    DisagreementReward,
    PessimismPenalty,
)

__all__ = [
    "DisagreementBonus",
    "DisagreementReward",
    "Imagination",
    "ImaginedState",
    "ImaginedStep",
    "InitialState",
    "PessimismPenalty",
    "PredictorEnv",
    "flatten_observation",
    "observation_layout",
    "spread_members",
]
