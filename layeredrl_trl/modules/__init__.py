"""The learnable parts, each a ``TensorDictModule``: what a predictor is put together from.

An encoder turns observations into latent states and contexts, a dynamics model predicts the next
latent state and termination, reward and value are functions of the latent state. Parts talk through
named entries (:mod:`layeredrl_trl.keys`), so any of them can be replaced by one of your own.
"""

from layeredrl_trl.modules.action_values import BestActionValue, PolicyValue
from layeredrl_trl.modules.dynamics import DynamicsModel
from layeredrl_trl.modules.encoders import Encoder, IdentityEncoder
from layeredrl_trl.modules.ensemble import ProbabilisticEnsemble
from layeredrl_trl.modules.head_mlp import HeadMLP
from layeredrl_trl.modules.heads import (
    LatentFunction,
    RewardNet,
    ValueNet,
    as_reward_module,
    as_termination_module,
    as_value_module,
    evaluate,
    head_entries,
    reads_action,
)
from layeredrl_trl.modules.learned_encoder import LearnedEncoder
from layeredrl_trl.modules.linear_encoder import LinearEncoder
from layeredrl_trl.modules.mlp import ConcatMLP, EnsembleMLP
from layeredrl_trl.modules.mlp_encoder import MLPEncoder
from layeredrl_trl.modules.normalization import RunningMoments
from layeredrl_trl.modules.particles import ParticlePrediction
from layeredrl_trl.modules.parts import check_heads, check_kinds, check_parts
from layeredrl_trl.modules.select_encoder import SelectEncoder
from layeredrl_trl.modules.spaces import action_features, space_dim
from layeredrl_trl.modules.stacking import StackedNetworks
from layeredrl_trl.modules.standardizer import DeltaStandardizer
from layeredrl_trl.modules.symmetry_breaking import SymmetryBreakingStart

__all__ = [
    "BestActionValue",
    "ConcatMLP",
    "DeltaStandardizer",
    "DynamicsModel",
    "Encoder",
    "EnsembleMLP",
    "HeadMLP",
    "IdentityEncoder",
    "LatentFunction",
    "LearnedEncoder",
    "LinearEncoder",
    "MLPEncoder",
    "ParticlePrediction",
    "PolicyValue",
    "ProbabilisticEnsemble",
    "RewardNet",
    "RunningMoments",
    "SelectEncoder",
    "StackedNetworks",
    "SymmetryBreakingStart",
    "ValueNet",
    "action_features",
    "as_reward_module",
    "as_termination_module",
    "as_value_module",
    "check_heads",
    "check_kinds",
    "check_parts",
    "evaluate",
    "head_entries",
    "reads_action",
    "space_dim",
]
