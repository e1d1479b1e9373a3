"""Rewards changed by an ensemble's uncertainty: a bonus to explore, a penalty to stay near data.

Both are TorchRL transforms with the same formula: the reward plus or minus ``scale`` times the
*disagreement* of the members. They work on real envs, on imagined envs, and on replay buffers.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform

from layeredrl_trl import keys
from layeredrl_trl.checks import check_key
from layeredrl_trl.functional import disagreement, epistemic_variance, zero_if_dead
from layeredrl_trl.modules import DynamicsModel, Encoder

# Entry that carries the disagreement from before an env's step, where the policy's action is still
# known, to after the step.
_STEP_DISAGREEMENT = "_disagreement"


class DisagreementReward(Transform):
    """Base class: change the reward by how much the members of an ensemble disagree.

    ``reward' = reward + sign * scale * disagreement``, with ``disagreement = alive *
    sqrt(mean_d epistemic_var_d)`` of the transition that was taken. ``alive`` is the mean over the
    particles of an imagined state before the step, by which imagined rewards are weighted, too; it
    is 1 on real data. The variance is that of the members' mean predictions for the same state, so
    one member gives 0, and so do members of equal weights, however noisy what they predict is.
    All latent dims count in their own units: let the encoder bring them to one scale.

    The variance is read from the entry that an imagined env writes. With ``encoder`` and
    ``dynamics`` it is computed from the observation and the action instead, without gradient:

    - ``TransformedEnv(PredictorEnv(..., uncertainty=True), DisagreementBonus(0.1))`` reads it;
    - ``TransformedEnv(real_env, DisagreementBonus(0.1, encoder=..., dynamics=...))`` computes it
      from the action that reaches this transform, which earlier transforms may still change before
      it reaches the env;
    - ``buffer.append_transform(DisagreementBonus(0.1, encoder=..., dynamics=...))`` computes it for
      each sample with the current model. The stored entries stay as they are.

    A step that terminates or is truncated counts like any other, and so does a padded one (its mask
    marks it). After a reset, and where all particles are dead, ``disagreement`` is 0. Nothing is
    clipped: where the model predicts NaN, the reward of that transition is NaN.

    ``encoder`` and ``dynamics`` still belong to their owner: they are not in the transform's state
    dict, do not follow it to another device, and are used in their current mode. The transform sees
    what they learn, except in a worker process, which has a copy of them: append the transform to a
    ``ParallelEnv``, not to the envs inside.

    Args:
        scale: factor of the disagreement, at least 0; may be changed at any time.
        encoder, dynamics: encoder of real observations, and the ensemble; both or neither.
        reward_key, disagreement_key, epistemic_var_key: of the reward, of the entry that is
            written, and of the variance that is read, each without ``"next"``.
        alive_key: key of the particles' weights; ``None`` gives every transition the weight 1.

    Reads:
        ``("next", "reward")`` ``[..., 1]``; ``alive`` ``[..., E, P, 1]`` if it exists. Without
        ``encoder`` and ``dynamics`` also ``("next", "epistemic_var")`` ``[..., D]``; with them also
        ``observation`` ``[..., O]`` and ``action`` ``[..., A]`` or indices ``[...]``, under the
        keys that they read.

    Writes:
        ``("next", "reward")`` ``[..., 1]``, whose spec becomes unbounded, and
        ``("next", "disagreement")`` ``[..., 1]``. The original reward is
        ``reward' - sign * scale * disagreement``.

    Raises:
        TypeError: if only one of ``encoder`` and ``dynamics`` is given, one has a wrong type, or a
            key is no key.
        ValueError: if ``scale`` is negative or not finite, or ``encoder`` and ``dynamics`` differ
            in size; in a step, if a shape does not fit.
        KeyError: in a step or when the specs of an env are made, if an entry is missing.
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
        _check_encoder_and_dynamics(type(self).__name__, encoder, dynamics)
        keys_by_name = {
            "reward_key": reward_key,
            "disagreement_key": disagreement_key,
            "epistemic_var_key": epistemic_var_key,
        }
        if alive_key is not None:
            keys_by_name["alive_key"] = alive_key
        for name, key in keys_by_name.items():
            check_key(f"{type(self).__name__}: {name}", key)
        needed = [epistemic_var_key] if dynamics is None else [encoder.in_keys[0]]
        super().__init__([reward_key, *needed], [reward_key, disagreement_key])
        self.reward_key, self.needed_key = self.in_keys
        self.disagreement_key = self.out_keys[1]
        self.alive_key = alive_key
        self.scale = scale
        # Not registered as submodules: appending the transform to an env would put both into
        # evaluation mode.
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
        """Change the rewards of a batch of transitions, such as a replay buffer's sample.

        Returns a copy of ``tensordict`` ``[...]``, which is in TorchRL's layout of steps, with the
        changed and the new entry; all other entries are the same tensors.
        """
        out = tensordict.copy()
        self._get(out, unravel_key(("next", self.reward_key)))
        if self.dynamics is not None:
            out.set(_STEP_DISAGREEMENT, self._compute(out))
        out.set("next", self._step(out, out.get("next")))
        return out.exclude(_STEP_DISAGREEMENT)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add ``disagreement`` ``[..., 1]``."""
        self._get(observation_spec, self.needed_key)
        like = {"dtype": torch.float32, "device": observation_spec.device}
        spec = Unbounded((*observation_spec.shape, 1), **like)
        observation_spec[self.disagreement_key] = spec
        return observation_spec

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Remove the bounds of the reward."""
        old = self._get(reward_spec, self.reward_key)
        dtype = torch.promote_types(old.dtype, torch.float32)
        reward_spec[self.reward_key] = Unbounded(old.shape, device=old.device, dtype=dtype)
        return reward_spec

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        # An env calls this before the step, when the transforms nearer to the env have not yet
        # changed the action. A buffer calls it on what is stored, which stays as it is.
        if self.dynamics is not None and self._is_in_env:
            tensordict.set(_STEP_DISAGREEMENT, self._compute(tensordict))
        return tensordict

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        reward = self._get(next_tensordict, self.reward_key, "next")
        if self.dynamics is not None:
            value = tensordict.get(_STEP_DISAGREEMENT)
        else:
            value = disagreement(self._get(next_tensordict, self.needed_key, "next"))
        value = value.to(reward.device)
        alive = None if self.alive_key is None else tensordict.get(self.alive_key, None)
        if alive is not None:
            if alive.ndim != value.ndim + 2 or alive.shape[-1] != 1:
                raise ValueError(
                    f"{self.alive_key}: expected shape {[*value.shape[:-1], 'E', 'P', 1]}, got "
                    f"{list(alive.shape)}; if these are no particles, pass alive_key=None."
                )
            weight = alive.mean((-3, -2))
            value = weight * zero_if_dead(weight, value)
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
        like = {"dtype": torch.float32, "device": tensordict_reset.device}
        zeros = torch.zeros(*tensordict_reset.batch_size, 1, **like)
        return tensordict_reset.set(self.disagreement_key, zeros)

    @torch.no_grad()
    def _compute(self, tensordict: TensorDictBase) -> Tensor:
        """Compute the disagreement ``[..., 1]`` from the observation and the action."""
        device = next((p.device for p in self.dynamics.parameters()), None)
        observation = self._get(tensordict, self.needed_key).to(device)
        action = self._get(tensordict, self.dynamics.in_keys[2]).to(device)
        mean, weights, _, _ = self.dynamics.predict(*self.encoder.encode(observation), action)
        return disagreement(epistemic_variance(mean, weights)).to(tensordict.device)

    @property
    def _is_in_env(self) -> bool:
        try:
            return self.container is not None
        except ValueError:  # TorchRL raises it for the transform of a replay buffer
            return False

    def _get(self, among: TensorDictBase | Composite, key: NestedKey, *prefix: str) -> Any:
        """Return an entry; the error for a missing one puts ``prefix`` before its key."""
        found = among.get(key, None)
        if found is not None:
            return found
        hint = ""
        if self.dynamics is None and key == self.needed_key:
            hint = (
                " An imagined env writes it if made with uncertainty=True; on real data pass "
                "encoder and dynamics."
            )
        name = (*prefix, key) if prefix else key
        existing = sorted(map(str, among.keys(True, True)))
        raise KeyError(f"{type(self).__name__}: no entry {name!r}; there is {existing}.{hint}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale={self.scale}, keys={self.in_keys})"


class DisagreementBonus(DisagreementReward):
    """Add the members' disagreement to the reward, to explore what the model does not know.

    ``reward' = reward + scale * alive * sqrt(mean_d epistemic_var_d)``. Arguments, keys and edge
    rules are those of :class:`DisagreementReward`.

    Reference:
        Pathak, Gandhi, Gupta 2019, arXiv:1906.04161. Deviations: the bonus is the square root of
        the variance, so that it has the units of the latent; it is added to the reward instead of
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
    """Subtract the members' disagreement from the reward, to stay where there are data.

    ``reward' = reward - scale * alive * sqrt(mean_d epistemic_var_d)``. Arguments, keys and edge
    rules are those of :class:`DisagreementReward`.

    Reference:
        Yu et al. 2020 (MOPO), arXiv:2005.13239, section 4.3. Deviation: their penalty is the
        largest standard deviation that a member predicts, which is aleatoric; this one is
        epistemic.

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


def _check_encoder_and_dynamics(
    name: str, encoder: Encoder | None, dynamics: DynamicsModel | None
) -> None:
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
