"""What is minimised, and how a step of it is taken.

Learning reads top to bottom in four files:

- a batch (:mod:`~layeredrl_trl.objectives.batch`): slices of ``T`` consecutive steps as plain
  tensors; past the end of an episode the last real step repeats and the mask is False. A transition
  is a slice of one step;
- targets (:mod:`~layeredrl_trl.objectives.targets`): what the rest of the episode is worth from
  each of the first ``k`` steps: ``n`` rewards and the value of what comes after, unless it
  terminated;
- the loss (:class:`RewardPredictorLoss`): encodes the batch, asks the parts, and gives a loss term
  for the reward, the value, the dynamics and the standardizer. It is a TorchRL ``LossModule``: one
  call on a sample of a replay buffer is enough for a loop of your own;
- the step (:class:`Update`): gradients, and unless one is not finite, clipping, the optimiser and
  the target network. Otherwise everything stays as it was.
"""

from layeredrl_trl.objectives.batch import SliceKeys, Slices, rows_with_data
from layeredrl_trl.objectives.reward_predictor import RewardPredictorLoss
from layeredrl_trl.objectives.update import ForeachSoftUpdate, Update, total_loss

__all__ = [
    "ForeachSoftUpdate",
    "RewardPredictorLoss",
    "SliceKeys",
    "Slices",
    "Update",
    "rows_with_data",
    "total_loss",
]
