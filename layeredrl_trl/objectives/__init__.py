"""What is minimised, and how a step of it is taken."""

from layeredrl_trl.objectives.reward_predictor import RewardPredictorLoss
from layeredrl_trl.objectives.update import Update

__all__ = ["RewardPredictorLoss", "Update"]
