"""A predictor that stays as it is."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer

from layeredrl_trl.predictors.predictor import Predictor


class StaticPredictor(Predictor):
    """Predict with given parts and learn nothing: for a known or an already learned model.

    It takes the place of any other predictor: a loop that trains runs, and changes no parameter,
    no buffer and no running statistic. A symmetry-breaking start stays where it is, too.

    Args:
        model, val_func, rew_func, encoder, latent_state_dim, context_dim, device: as for
            :class:`~layeredrl_trl.predictors.Predictor`.
        writer, log_interval: without effect, as nothing happens.

    Raises:
        ValueError: if sizes of the parts differ from ``latent_state_dim`` and ``context_dim``.
        TypeError: if ``writer`` or a part is of an unknown kind.

    Example:
        >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet
        >>> model, reward = ProbabilisticEnsemble(3, 0, 1), RewardNet(3, 0, 1)
        >>> predictor = StaticPredictor(model, None, reward, IdentityEncoder(3), 3, 0)
        >>> predictor.predict_reward(torch.zeros(4, 3), torch.zeros(4, 1)).shape
        torch.Size([4])
    """

    def loss(
        self, batch: TensorDictBase, model_batch: TensorDictBase | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return 0 and no loss terms; neither batch is read.

        Returns:
            A scalar of its own that wants a gradient, so that ``backward`` works and reaches
            nothing; and an empty dictionary.
        """
        return torch.zeros((), dtype=torch.float32, device=self.device, requires_grad=True), {}

    def learn(
        self,
        buffer: TensorDictReplayBuffer,
        n_steps: int,
        batch_size: int,
        model_batch_size: int | None = None,
        n_total_env_steps: int | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Learn nothing; the buffer is not read and may be empty.

        The arguments are those of :meth:`Predictor.learn`; none has an effect.

        Returns:
            The scalar 0 and an empty dictionary.
        """
        return torch.zeros((), dtype=torch.float32, device=self.device), {}
