"""Rewards for what an ensemble does not know: a bonus to explore it, a penalty to stay away.

Both are TorchRL transforms, and one formula: the reward plus or minus ``scale`` times the
*disagreement* of the members. They work on real envs, on imagined ones, and on replay buffers.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform

from layeredrl_trl import keys
from layeredrl_trl.functional import disagreement, epistemic_variance
from layeredrl_trl.modules import DynamicsModel, Encoder

# Where an env carries it from before the step, with the policy's action, to after it.
_OF_THIS_STEP = "_disagreement"


class DisagreementReward(Transform):
    """Base class: change the reward by how much the members of an ensemble disagree.

    ``reward' = reward + sign * scale * disagreement``, with ``disagreement = alive *
    sqrt(mean_d epistemic_var_d)`` of the transition that was taken. ``alive`` is the mean over the
    particles of an imagined state before the step (1 on real data): an imagined reward is weighted
    by it too. The variance is over members, of their mean predictions, so one member gives 0.

    It is read from what an imagined env writes, or computed by ``encoder`` and ``dynamics``,
    without gradient, from the observation and the action:

    - ``TransformedEnv(PredictorEnv(..., uncertainty=True), DisagreementBonus(0.1))`` reads;
    - ``TransformedEnv(real_env, DisagreementBonus(0.1, encoder=..., dynamics=...))`` computes, from
      the action that comes to this transform: transforms before it may change what the env gets;
    - ``buffer.append_transform(DisagreementBonus(0.1, encoder=..., dynamics=...))`` computes for
      each sample what the model says by now. What is stored stays as it is.

    All latent dims count alike in their own units, one of a large range more: bring them to one
    scale in the encoder.

    The step that terminates or is truncated counts like any other, padding too (it has its mask);
    after a reset ``disagreement`` is 0. Nothing is clipped: a model that predicts NaN gives a
    reward of NaN, of that transition alone (and where all particles are dead, a disagreement of 0).

    The parts stay their owner's: they are in no state dict of the transform, do not follow it to
    another device, and are used in the mode that they are in. What they learn it knows, but in a
    worker process it has a copy: append it to a ``ParallelEnv``, not inside.

    Args:
        scale: factor of the disagreement, at least 0; may be set anew at any time.
        encoder: of real observations; with ``dynamics`` or not at all.
        dynamics: the ensemble.
        reward_key: as the env calls it, without ``"next"``.
        disagreement_key: of the entry that is written, without ``"next"``.
        epistemic_var_key: of the variance that is read, without ``"next"``.
        alive_key: of the particles' weights; ``None``: everything counts in full.

    Reads:
        ``("next", "reward")`` ``[..., 1]``; ``alive`` ``[..., E, P, 1]`` if it is there; without
        parts ``("next", "epistemic_var")`` ``[..., D]``, with them ``observation`` ``[..., O]`` and
        ``action`` ``[..., A]`` or indices ``[...]``, under the parts' names for them.

    Writes:
        ``("next", "reward")`` ``[..., 1]``, of unbounded spec, and ``("next", "disagreement")``
        ``[..., 1]``: the reward without it is ``reward' - sign * scale * disagreement``.

    Raises:
        TypeError: if only one of ``encoder`` and ``dynamics`` is given, or of another type.
        ValueError: if ``scale`` is negative or not finite, or the parts differ in size; in a step:
            if a shape does not fit.
        KeyError: in a step, and by the specs of an env: if an entry is not there.
    """

    sign: ClassVar[int]

    def __init__(
        self,
        scale: float,
        *,
        encoder: Encoder | None = None,
        dynamics: DynamicsModel | None = None,
        reward_key: NestedKey = keys.REWARD,
        disagreement_key: NestedKey = keys.DISAGREEMENT,
        epistemic_var_key: NestedKey = keys.EPISTEMIC_VAR,
        alive_key: NestedKey | None = keys.ALIVE,
    ) -> None:
        name = type(self).__name__
        _check_parts(name, encoder, dynamics)
        needed = [epistemic_var_key] if dynamics is None else [encoder.in_keys[0]]
        super().__init__([reward_key, *needed], [reward_key, disagreement_key])
        self.reward_key, self.needed_key = self.in_keys
        self.disagreement_key = self.out_keys[1]
        self.alive_key = alive_key
        self.scale = scale
        # Not registered: appending to an env would put the shared parts into evaluation mode.
        self.__dict__.update(encoder=encoder, dynamics=dynamics)

    @property
    def scale(self) -> float:
        """Factor of the disagreement, at least 0."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(
                f"{type(self).__name__}: scale must be a finite number of at least 0, got {scale}; "
                "DisagreementBonus adds, PessimismPenalty subtracts."
            )
        self._scale = float(scale)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Change the rewards of transitions in a copy of ``tensordict``, as on a buffer's sample.

        Args:
            tensordict: batch ``[...]``, TorchRL's layout of steps.

        Returns:
            A copy with the entries above; all others are the same tensors.
        """
        out = tensordict.copy()
        if "next" not in out.keys():
            raise self._missing(("next", self.reward_key), out)
        if self.dynamics is not None:
            out.set(_OF_THIS_STEP, self._compute(out))
        out.set("next", self._step(out, out.get("next")))
        return out.exclude(_OF_THIS_STEP)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add ``disagreement`` ``[..., 1]``."""
        if self.needed_key not in observation_spec.keys(True):
            raise self._missing(self.needed_key, observation_spec)
        spec = Unbounded((*observation_spec.shape, 1), device=observation_spec.device)
        observation_spec[self.disagreement_key] = spec
        return observation_spec

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Take the bounds off the reward."""
        if self.reward_key not in reward_spec.keys(True):
            raise self._missing(self.reward_key, reward_spec)
        old = reward_spec[self.reward_key]
        dtype = torch.promote_types(old.dtype, torch.float32)
        reward_spec[self.reward_key] = Unbounded(old.shape, device=old.device, dtype=dtype)
        return reward_spec

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        # In an env this comes before the step: transforms nearer to the env have not yet changed
        # the action. In a buffer it is the way in, where nothing is to be changed.
        if self.dynamics is not None and self._is_in_env:
            tensordict.set(_OF_THIS_STEP, self._compute(tensordict))
        return tensordict

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        reward = next_tensordict.get(self.reward_key, None)
        if reward is None:
            raise self._missing(("next", self.reward_key), next_tensordict)
        if self.dynamics is not None:
            value = tensordict.get(_OF_THIS_STEP)
        else:
            variance = next_tensordict.get(self.needed_key, None)
            if variance is None:
                raise self._missing(("next", self.needed_key), next_tensordict)
            value = disagreement(variance)
        value = value.to(reward.device)
        alive = None if self.alive_key is None else tensordict.get(self.alive_key, None)
        if alive is not None:
            if alive.ndim != value.ndim + 2 or alive.shape[-1] != 1:
                raise ValueError(
                    f"{self.alive_key}: expected shape {[*value.shape[:-1], 'E', 'P', 1]}, got "
                    f"{list(alive.shape)}; if these are no particles, pass alive_key=None."
                )
            weight = alive.mean((-3, -2))
            value = torch.where(weight > 0, weight * value, 0.0)  # the dead may hold anything
        if reward.shape != value.shape:
            raise ValueError(
                f"{self.reward_key}: expected shape {list(value.shape)}, got {list(reward.shape)}."
            )
        next_tensordict.set(self.disagreement_key, value)
        next_tensordict.set(self.reward_key, reward + self.sign * self.scale * value)
        return next_tensordict

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        shape = (*tensordict_reset.batch_size, 1)
        zeros = torch.zeros(shape, device=tensordict_reset.device)
        return tensordict_reset.set(self.disagreement_key, zeros)

    @torch.no_grad()
    def _compute(self, tensordict: TensorDictBase) -> Tensor:
        """Disagreement ``[..., 1]`` on the transitions from an observation by an action."""
        device = next((p.device for p in self.dynamics.parameters()), None)
        entries = []
        for key in (self.needed_key, self.dynamics.in_keys[2]):
            entry = tensordict.get(key, None)
            if entry is None:
                raise self._missing(key, tensordict)
            entries.append(entry.to(device))
        observation, action = entries
        latent, context = self.encoder.encode(observation)
        mean, weights, _, _ = self.dynamics.predict(latent, context, action)
        return disagreement(epistemic_variance(mean, weights)).to(tensordict.device)

    @property
    def _is_in_env(self) -> bool:
        try:
            return self.container is not None
        except ValueError:  # TorchRL's answer for a transform of a replay buffer
            return False

    def _missing(self, key: NestedKey, among: TensorDictBase | Composite) -> KeyError:
        hint = ""
        if self.dynamics is None and self.needed_key in (key, key[-1]):
            hint = (
                " An imagined env writes it if made with uncertainty=True; on real data pass "
                "encoder and dynamics."
            )
        there = sorted(map(str, among.keys(True, True)))
        return KeyError(f"{type(self).__name__}: no entry {key!r}; there is {there}.{hint}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale={self.scale}, keys={self.in_keys})"


class DisagreementBonus(DisagreementReward):
    """Add the disagreement of the members to the reward, to explore what the model does not know.

    ``reward' = reward + scale * alive * sqrt(mean_d epistemic_var_d)``. Arguments, keys and edge
    rules are those of :class:`DisagreementReward`.

    Reference:
        Pathak, Gandhi, Gupta 2019, arXiv:1906.04161. Deviations: the square root of the
        variance, so that the bonus has the units of the latent; added to the reward instead of
        replacing it.

    Example:
        >>> from torchrl.data import Bounded
        >>> from torchrl.envs import TransformedEnv
        >>> from layeredrl_trl.envs.predictor_env import PredictorEnv
        >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet
        >>> dynamics = ProbabilisticEnsemble(3, 0, 1, n_models=5)
        >>> action_spec = Bounded(-1.0, 1.0, (1,))
        >>> parts = IdentityEncoder(3), dynamics, RewardNet(3, 0, 1), action_spec
        >>> env = TransformedEnv(PredictorEnv(*parts, uncertainty=True), DisagreementBonus(0.1))
        >>> env.rollout(7)["next", "disagreement"].shape
        torch.Size([7, 1])
    """

    sign = 1


class PessimismPenalty(DisagreementReward):
    """Subtract the disagreement of the members from the reward, to stay where there are data.

    ``reward' = reward - scale * alive * sqrt(mean_d epistemic_var_d)``. Arguments, keys and edge
    rules are those of :class:`DisagreementReward`.

    Reference:
        Yu et al. 2020 (MOPO), arXiv:2005.13239, section 4.3. Deviation: their penalty is the
        largest standard deviation that a member predicts, which is aleatoric; this is epistemic.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=4)
        >>> data = {"observation": torch.randn(10, 3), "action": torch.randn(10, 1)}
        >>> data["next"] = {"reward": torch.zeros(10, 1)}
        >>> _ = buffer.extend(TensorDict(data, batch_size=[10]))
        >>> dynamics = ProbabilisticEnsemble(3, 0, 1, n_models=5)
        >>> penalty = PessimismPenalty(0.5, encoder=IdentityEncoder(3), dynamics=dynamics)
        >>> _ = buffer.append_transform(penalty)
        >>> sample = buffer.sample()
        >>> (sample["next", "reward"] + 0.5 * sample["next", "disagreement"]).sum()
        tensor(0.)
    """

    sign = -1


def _check_parts(name: str, encoder: Encoder | None, dynamics: DynamicsModel | None) -> None:
    if encoder is None and dynamics is None:
        return
    for part, given, kind in (("encoder", encoder, Encoder), ("dynamics", dynamics, DynamicsModel)):
        if not isinstance(given, kind):
            got = "None" if given is None else type(given).__name__
            raise TypeError(
                f"{name}: expected encoder and dynamics or neither, but {part} is {got}, no "
                f"{kind.__name__}."
            )
    sizes = [(part.latent_state_dim, part.context_dim) for part in (encoder, dynamics)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name}: encoder has {sizes[0][0]} latent and {sizes[0][1]} context dims, dynamics "
            f"{sizes[1][0]} and {sizes[1][1]}."
        )
