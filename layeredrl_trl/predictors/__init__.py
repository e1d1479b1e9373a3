"""Predictors: encoder, dynamics, reward and value behind one interface."""

from layeredrl_trl.predictors.factory import PredictorFactory, get_default_predictor_factory
from layeredrl_trl.predictors.predictor import Predictor
from layeredrl_trl.predictors.reward_predictor import RewardPredictor
from layeredrl_trl.predictors.static_predictor import StaticPredictor

__all__ = [
    "Predictor",
    "PredictorFactory",
    "RewardPredictor",
    "StaticPredictor",
    "get_default_predictor_factory",
]
