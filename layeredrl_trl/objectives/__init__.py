"""What is minimised, and how a step of it is taken."""

from layeredrl_trl.objectives.reward_predictor import RewardPredictorLoss
from layeredrl_trl.objectives.update import ForeachSoftUpdate, Update, total_loss

__all__ = ["ForeachSoftUpdate", "RewardPredictorLoss", "Update", "total_loss"]
