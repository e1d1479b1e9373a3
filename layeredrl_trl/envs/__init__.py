"""The learned model as a TorchRL environment that any planner or policy can act in."""

from layeredrl_trl.envs.imagination import Imagination, ImaginedStep
from layeredrl_trl.envs.predictor_env import InitialState, PredictorEnv, spread_members

__all__ = ["Imagination", "ImaginedStep", "InitialState", "PredictorEnv", "spread_members"]
