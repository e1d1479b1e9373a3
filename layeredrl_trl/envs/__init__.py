"""The learned model as a TorchRL environment that any planner or policy can act in."""

from layeredrl_trl.envs.imagination import ImaginedStep, Imagination
from layeredrl_trl.envs.predictor_env import InitialState, PredictorEnv, spread_members

__all__ = ["ImaginedStep", "Imagination", "InitialState", "PredictorEnv", "spread_members"]
