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
    no buffer and no running statistic. A
    :class:`~layeredrl_trl.modules.SymmetryBreakingStart` stays where it is, too.

    Args:
        model: of the dynamics.
        val_func: state value or Q-function, or ``None``.
        rew_func: of the reward, or ``None``.
        encoder: of observations.
        latent_state_dim: ``D``.
        context_dim: ``C``.
        device: where all parts are moved to.
        writer: not written to, as nothing happens.
        log_interval: without effect.

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
        """Return 0 and no terms.

        Args:
            batch: not read.
            model_batch: not read.

        Returns:
            A scalar of its own that wants a gradient, so that ``backward`` works and reaches
            nothing; and an empty dictionary.
        """
        return torch.zeros((), device=self.device, requires_grad=True), {}

    def learn(
        self,
        buffer: TensorDictReplayBuffer,
        n_steps: int,
        batch_size: int,
        model_batch_size: int,
        n_total_env_steps: int,
    ) -> tuple[Tensor, dict[str, float]]:
        """Learn nothing.

        Args:
            buffer: not read; it may be empty.
            n_steps: without effect, as are the others.
            batch_size: see above.
            model_batch_size: see above.
            n_total_env_steps: see above.

        Returns:
            The scalar 0 and an empty dictionary.
        """
        return torch.zeros((), device=self.device), {}
