"""A predictor as TorchRL's ``WorldModel``."""

from __future__ import annotations

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.modules import WorldModel

from layeredrl_trl.checks import check_fraction
from layeredrl_trl.keys import NEXT_DONE, NEXT_REWARD, NEXT_TERMINATED
from layeredrl_trl.modules import Encoder, LatentFunction, RewardNet, evaluate
from layeredrl_trl.predictors import Predictor

_RECONSTRUCTION = "reconstructed_observation"
"""What a decoder of a world model writes, by the default name of ``WorldModelLoss``."""


def to_world_model(predictor: Predictor, *, done_threshold: float | None = 0.5) -> WorldModel:
    """Make TorchRL's ``WorldModel`` of the parts of a predictor.

    The parts are shared: whoever trains one trains the other. Encoder and dynamics are the
    predictor's own; the reward head evaluates its reward, the done head reads the probability of
    termination, and there is a decoder if the encoder can decode. The value has no place in it.

    Like the dynamics themselves, it predicts the mean of the even mixture of all members, or under
    ``set_exploration_type(ExplorationType.RANDOM)`` a draw from it. A step that is predicted to
    terminate is marked as done; nothing else ends an episode.

    ``world_model.encoder``, ``.dynamics`` and ``.reward_head`` are what
    :class:`~layeredrl_trl.objectives.RewardPredictorLoss` takes. Its running statistics are those
    of the predictor, too.

    Args:
        predictor: the predictor.
        done_threshold: probability from which on a step terminates, in [0, 1]; ``None`` writes the
            probability itself, with gradient, as ``WorldModelLoss`` needs it for its loss of the
            done flag.

    Reads:
        ``observation`` ``[..., O]`` and ``action`` ``[..., A]``; a step instead of the observation
        ``latent`` ``[..., D]`` and ``context`` ``[..., C]``.

    Writes:
        ``latent``, ``context``; ``("next", "latent")`` ``[..., D]``, ``("next", "term_prob")``
        ``[..., 1]``, ``("next", "reward")`` ``[..., 1]`` (0 without ``rew_func``),
        ``("next", "terminated")`` and ``("next", "done")`` ``[..., 1]``, bool unless
        ``done_threshold`` is ``None``; ``reconstructed_observation`` ``[..., O]`` where there is a
        decoder.

    Raises:
        TypeError: if ``predictor`` is no :class:`~layeredrl_trl.predictors.Predictor`, or
            ``done_threshold`` no number.
        ValueError: if ``done_threshold`` is not in [0, 1].

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from layeredrl_trl import IdentityEncoder, ProbabilisticEnsemble, StaticPredictor
        >>> parts = ProbabilisticEnsemble(3, 0, 1), None, RewardNet(3, 0, 1), IdentityEncoder(3)
        >>> world_model = to_world_model(StaticPredictor(*parts, 3, 0))
        >>> data = {"observation": torch.zeros(4, 3), "action": torch.zeros(4, 1)}
        >>> world_model(TensorDict(data, batch_size=[4]))["next", "latent"].shape
        torch.Size([4, 3])
    """
    if not isinstance(predictor, Predictor):
        raise TypeError(
            f"to_world_model: predictor: expected a Predictor, got {type(predictor).__name__}."
        )
    if done_threshold is not None:
        check_fraction("to_world_model: done_threshold", done_threshold)
    encoder, dynamics = predictor.encoder, predictor.model
    return WorldModel(
        encoder,
        dynamics,
        _reward_head(predictor.rew_func, encoder.out_keys[0]),
        done_head=_DoneHead(dynamics.out_keys[1], done_threshold),
        decoder=_Decoder(encoder) if encoder.can_decode else None,
    )


def _reward_head(
    reward: TensorDictModuleBase | None, latent_key: NestedKey
) -> TensorDictModuleBase:
    if reward is None:
        return _NoReward(latent_key)
    if type(reward) in (LatentFunction, RewardNet):  # the loss finds its running statistics here
        head = LatentFunction(reward.module, reward.in_keys, [NEXT_REWARD])
        head.argument = reward.argument
        return head
    return _RewardHead(reward, latent_key)


class _RewardHead(TensorDictModuleBase):
    """Evaluate a reward module of any kind, and write ``("next", "reward")``."""

    def __init__(self, reward: TensorDictModuleBase, latent_key: NestedKey) -> None:
        super().__init__()
        self.reward = reward
        self.in_keys = list(dict.fromkeys([latent_key, *reward.in_keys]))
        self.out_keys = [NEXT_REWARD]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        entries = {key: tensordict[key] for key in self.in_keys}
        return tensordict.set(NEXT_REWARD, evaluate(self.reward, entries))


class _NoReward(TensorDictModuleBase):
    """Write a reward of 0, as :meth:`Predictor.predict` returns it without ``rew_func``."""

    def __init__(self, latent_key: NestedKey) -> None:
        super().__init__()
        self.in_keys, self.out_keys = [latent_key], [NEXT_REWARD]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        latent = tensordict[self.in_keys[0]]
        return tensordict.set(NEXT_REWARD, latent.new_zeros(*latent.shape[:-1], 1))


class _DoneHead(TensorDictModuleBase):
    """Turn the probability of termination into ``terminated`` and ``done``."""

    def __init__(self, term_prob_key: NestedKey, threshold: float | None) -> None:
        super().__init__()
        self.threshold = threshold
        self.in_keys, self.out_keys = [term_prob_key], [NEXT_TERMINATED, NEXT_DONE]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        ends = tensordict[self.in_keys[0]]
        if self.threshold is not None:
            ends = ends >= self.threshold
        for key in self.out_keys:
            tensordict.set(key, ends.clone())
        return tensordict


class _Decoder(TensorDictModuleBase):
    """Decode the current latent state."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.in_keys, self.out_keys = list(encoder.out_keys), [_RECONSTRUCTION]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        latent, context = (tensordict[key] for key in self.in_keys)
        return tensordict.set(_RECONSTRUCTION, self.encoder.decode(latent, context))
