"""World-model predictors for TorchRL.

Data flows one way: replay buffer -> slices -> loss -> predictor -> imagination -> planner ->
action. Each folder is a floor and imports only from floors below its own:

``functional``, ``keys``
    pure tensor maths; the names of all entries.
``modules``, ``data``
    the learnable parts; slices from replay buffers.
``objectives``
    the loss, and one optimisation step.
``envs``
    the learned model as a TorchRL environment.
``predictors``
    the parts behind one interface.
``planners``
    policies that search in a model.
``recipes``
    the main job: collect, learn, plan, evaluate.
"""

from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.objectives import RewardPredictorLoss, Update
from layeredrl_trl.planners import CrossEntropyPlanner
from layeredrl_trl.predictors import Predictor, RewardPredictor

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyPlanner",
    "IdentityEncoder",
    "Predictor",
    "PredictorEnv",
    "ProbabilisticEnsemble",
    "RewardNet",
    "RewardPredictor",
    "RewardPredictorLoss",
    "TransitionSliceSampler",
    "Update",
    "ValueNet",
]
