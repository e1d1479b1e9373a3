"""World-model predictors for TorchRL.

Data flows one way: replay buffer -> slices -> loss -> predictor -> imagination -> planner ->
action. Each folder is a floor and imports only from floors below its own:

``functional``, ``keys``, ``schedules``
    pure tensor maths; the names of all entries; learning rates over env steps.
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
``diagnostics``
    the report on a model.
``recipes``
    the main job: collect, learn, plan, evaluate.
"""

from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.diagnostics import model_report
from layeredrl_trl.envs import (
    DisagreementBonus,
    PessimismPenalty,
    PredictorEnv,
    flatten_observation,
)
from layeredrl_trl.modules import (
    BestActionValue,
    DynamicsModel,
    Encoder,
    IdentityEncoder,
    LinearEncoder,
    MLPEncoder,
    PolicyValue,
    ProbabilisticEnsemble,
    RewardNet,
    SelectEncoder,
    SymmetryBreakingStart,
    ValueNet,
)
from layeredrl_trl.objectives import RewardPredictorLoss, Update
from layeredrl_trl.planners import (
    CategoricalCrossEntropyPlanner,
    CrossEntropyPlanner,
    ICEMPlanner,
    PathIntegralPlanner,
)
from layeredrl_trl.predictors import (
    Predictor,
    PredictorFactory,
    RewardPredictor,
    StaticPredictor,
    get_default_predictor_factory,
)

__version__ = "0.1.0"

__all__ = [
    "BestActionValue",
    "CategoricalCrossEntropyPlanner",
    "CrossEntropyPlanner",
    "DisagreementBonus",
    "DynamicsModel",
    "Encoder",
    "ICEMPlanner",
    "IdentityEncoder",
    "LinearEncoder",
    "MLPEncoder",
    "PathIntegralPlanner",
    "PessimismPenalty",
    "PolicyValue",
    "Predictor",
    "PredictorEnv",
    "PredictorFactory",
    "ProbabilisticEnsemble",
    "RewardNet",
    "RewardPredictor",
    "RewardPredictorLoss",
    "SelectEncoder",
    "StaticPredictor",
    "SymmetryBreakingStart",
    "TransitionSliceSampler",
    "Update",
    "ValueNet",
    "flatten_observation",
    "get_default_predictor_factory",
    "model_report",
]
