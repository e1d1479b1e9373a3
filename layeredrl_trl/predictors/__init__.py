"""Predictors: encoder, dynamics, reward and value behind one interface."""

from layeredrl_trl.predictors.predictor import Predictor
from layeredrl_trl.predictors.reward_predictor import RewardPredictor

__all__ = ["Predictor", "RewardPredictor"]
