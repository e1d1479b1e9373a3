"""Losses and optimisation steps.

Learning reads top to bottom in four files:

- a batch (:mod:`~layeredrl_trl.objectives.batch`): slices of ``T`` consecutive steps as plain
  tensors; past the end of an episode the last real step repeats and the mask is False. A transition
  is a slice of one step;
- targets (:mod:`~layeredrl_trl.objectives.targets`): for each of the first ``k`` steps, ``n``
  rewards plus, unless the episode terminated, the value of the next state;
- the loss (:class:`RewardPredictorLoss`): loss terms for reward, value, dynamics and standardizer.
  It is a TorchRL ``LossModule``: your own loop can call it on a sample of a replay buffer;
- the step (:class:`Update`): gradients, clipping, optimiser and target network. A non-finite
  gradient leaves everything unchanged.
"""

from layeredrl_trl.objectives.batch import SliceKeys, Slices, check_single_steps
from layeredrl_trl.objectives.reward_predictor import RewardPredictorLoss
from layeredrl_trl.objectives.update import ForeachSoftUpdate, Update, total_loss

__all__ = [
    "ForeachSoftUpdate",
    "RewardPredictorLoss",
    "SliceKeys",
    "Slices",
    "Update",
    "check_single_steps",
    "total_loss",
]
