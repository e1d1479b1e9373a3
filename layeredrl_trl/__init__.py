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
``checkpoints``, ``bridges``
    what a run saves; the way to other libraries.
``trainers``
    TorchRL's trainer, put together.
``recipes``
    the main job: collect, learn, plan, evaluate.
"""

from importlib.metadata import version

from layeredrl_trl.data import HindsightGoals, TransitionSliceSampler
from layeredrl_trl.diagnostics import model_report
from layeredrl_trl.envs import (
    DisagreementBonus,
    PessimismPenalty,
    PredictorEnv,
    flatten_observation,
)
from layeredrl_trl.functional import (
    draw_by_weight,
    elite_weights,
    softmax_weights,
    weighted_moments,
)
from layeredrl_trl.modules import (
    BestActionValue,
    ConcatMLP,
    DynamicsModel,
    Encoder,
    IdentityEncoder,
    LatentFunction,
    LearnedEncoder,
    LinearEncoder,
    MLPEncoder,
    ParticlePrediction,
    PolicyValue,
    ProbabilisticEnsemble,
    RewardNet,
    RunningMoments,
    SelectEncoder,
    SymmetryBreakingStart,
    ValueNet,
    action_features,
    as_reward_module,
    as_termination_module,
    as_value_module,
)
from layeredrl_trl.objectives import RewardPredictorLoss, Update
from layeredrl_trl.planners import (
    CandidateReturn,
    CategoricalCrossEntropyPlanner,
    CrossEntropyPlanner,
    GaussianBelief,
    GaussianPlanner,
    ICEMPlanner,
    PathIntegralPlanner,
    SamplingPlanner,
)
from layeredrl_trl.predictors import (
    Predictor,
    PredictorFactory,
    RewardPredictor,
    StaticPredictor,
    get_default_predictor_factory,
)
from layeredrl_trl.schedules import Schedule

__version__ = version("layeredrl_trl")

__all__ = [
    "BestActionValue",
    "CandidateReturn",
    "CategoricalCrossEntropyPlanner",
    "ConcatMLP",
    "CrossEntropyPlanner",
    "DisagreementBonus",
    "DynamicsModel",
    "Encoder",
    "GaussianBelief",
    "GaussianPlanner",
    "HindsightGoals",
    "ICEMPlanner",
    "IdentityEncoder",
    "LatentFunction",
    "LearnedEncoder",
    "LinearEncoder",
    "MLPEncoder",
    "ParticlePrediction",
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
    "RunningMoments",
    "SamplingPlanner",
    "Schedule",
    "SelectEncoder",
    "StaticPredictor",
    "SymmetryBreakingStart",
    "TransitionSliceSampler",
    "Update",
    "ValueNet",
    "action_features",
    "as_reward_module",
    "as_termination_module",
    "as_value_module",
    "draw_by_weight",
    "elite_weights",
    "flatten_observation",
    "get_default_predictor_factory",
    "model_report",
    "softmax_weights",
    "weighted_moments",
]
