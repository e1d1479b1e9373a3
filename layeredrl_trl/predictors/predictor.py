"""The interface of a predictor: encode, predict, value, imagine, learn."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import Categorical, TensorDictReplayBuffer, TensorSpec, Unbounded

from layeredrl_trl.checks import (
    check_count,
    check_counts,
    check_device,
    check_flag,
    check_precision,
)
from layeredrl_trl.data import TransitionSliceSampler, check_buffer, slice_sampler
from layeredrl_trl.data.positions import flat_position
from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import (
    DynamicsModel,
    Encoder,
    as_reward_module,
    as_value_module,
    check_heads,
    check_kinds,
    evaluate,
    head_entries,
    reads_action,
)
from layeredrl_trl.modules.loading import LoadsWhole
from layeredrl_trl.modules.parts import check_counts_of, check_precision_of
from layeredrl_trl.predictors.logging import check_writer


class Predictor(LoadsWhole, abc.ABC):
    """Predict next latent state, reward, termination and value.

    It computes in float32, whatever torch's default dtype is; inputs of any dtype are cast. What a
    network reads is cast to the dtype of its parameters, float64 for networks of yours made so or
    after :meth:`double`; states, rewards and values stay float32. :meth:`half` and other
    conversions are refused.

    Args:
        model: the dynamics model.
        val_func: state value or Q-function; a plain ``f(latent, context)`` or
            ``f(latent, context, action)`` is wrapped (a state value if it has an attribute
            ``reads_action = False``); may be ``None``.
        rew_func: reward function; a plain ``f(latent, context, action)`` is wrapped; may be
            ``None``.
        encoder: encoder of observations.
        latent_state_dim, context_dim: ``D`` and ``C``.
        device: device to move all parts to.
        writer: a ``SummaryWriter`` or TorchRL ``Logger``; ``None`` for no logging. Copied and
            unpickled predictors have none.
        log_interval: number of calls to :meth:`learn` per log entry.

    Attributes:
        model, val_func, rew_func, encoder: the parts, each a ``TensorDictModule``.

    Raises:
        ValueError: if sizes of the parts differ from ``latent_state_dim`` and ``context_dim``, or
            ``device`` names none.
        TypeError: if ``writer`` or a part is of an unknown kind, a part of the library is of
            half precision, or a number no integer.
    """

    def __init__(
        self,
        model: DynamicsModel,
        val_func: nn.Module | Callable[..., Tensor] | None,
        rew_func: nn.Module | Callable[..., Tensor] | None,
        encoder: Encoder,
        latent_state_dim: int,
        context_dim: int,
        device: torch.device | str = torch.device("cpu"),
        writer: Any = None,
        log_interval: int = 10,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_device(f"{owner}: device", device)
        check_kinds(owner, model=(model, DynamicsModel), encoder=(encoder, Encoder))
        check_counts_of(owner, model)
        check_count(f"{owner}: latent_state_dim", latent_state_dim)
        check_count(f"{owner}: context_dim", context_dim, least=0)
        _check_dims(model, encoder, latent_state_dim, context_dim)
        check_count("log_interval", log_interval)
        self.writer = check_writer(writer)
        self.log_interval = log_interval
        self.latent_state_dim = latent_state_dim
        self.context_dim = context_dim
        self.encoder = encoder
        self.model = model
        check_precision_of(owner, model=model)
        names = (*encoder.out_keys, model.in_keys[2])
        self.rew_func = as_reward_module(rew_func, names, argument="rew_func")
        self.val_func = as_value_module(val_func, names, argument="val_func")
        check_heads(owner, encoder, model, rew_func=self.rew_func, val_func=self.val_func)
        self.to(device)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        tensor = next(self.parameters(), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def encode(self, obs: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Encode observations.

        Args:
            obs: ``[..., O]``; numbers are cast to float32.

        Returns:
            ``latent`` ``[..., D]`` and ``context`` ``[..., C]``.

        Raises:
            ValueError: if the last dims do not fit the encoder.
        """
        return self.encoder.encode(self._tensor(obs))

    def predict(
        self, obs: Tensor | np.ndarray, act: Tensor | np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Predict one step with every member; carries gradient unless under ``torch.no_grad``.

        Args:
            obs: ``[B, O]``.
            act: ``[B, A]``, or indices ``[B]`` of discrete actions.

        Returns:
            ``s_mean`` of the next latent state ``[B, E, M, D]``, ``weights`` ``[B, E, M]``,
            ``s_std`` ``[B, E, M, D]``, ``reward`` ``[B]`` (0 without ``rew_func``), ``term_prob``
            ``[B]``.

        Raises:
            ValueError: if a shape does not fit.
        """
        latent, context = self.encode(obs)
        act = self._tensor(act)
        mean, weights, std, term_prob = self.model.predict(latent, context, act)
        reward = torch.zeros_like(term_prob)
        if self.rew_func is not None:
            reward = self._evaluate(self.rew_func, latent, context, act)
        return mean, weights, std, reward, term_prob

    def predict_reward(self, obs: Tensor | np.ndarray, act: Tensor | np.ndarray) -> Tensor:
        """Predict the reward of taking ``act`` ``[B, A]`` at ``obs`` ``[B, O]``; returns ``[B]``.

        Raises:
            ValueError: if there is no ``rew_func``, or a shape does not fit.
        """
        if self.rew_func is None:
            raise ValueError("predict_reward: this predictor has no rew_func.")
        latent, context = self.encode(obs)
        return self._evaluate(self.rew_func, latent, context, self._tensor(act))

    def value(self, obs: Tensor | np.ndarray, act: Tensor | np.ndarray | None = None) -> Tensor:
        """Predict the value of observations; returns ``[B]``.

        Args:
            obs: ``[B, O]``.
            act: ``[B, A]``; a state value ignores it, a Q-function needs it.

        Raises:
            ValueError: if there is no ``val_func``, a Q-function gets no action, or a shape does
                not fit.
        """
        if self.val_func is None:
            raise ValueError("value: this predictor has no val_func.")
        if act is None and reads_action(self.val_func, self.model.in_keys[2]):
            raise ValueError("value: val_func is a Q-function and needs act.")
        latent, context = self.encode(obs)
        return self._evaluate(
            self.val_func, latent, context, None if act is None else self._tensor(act)
        )

    def rollout(
        self,
        obs: Tensor | np.ndarray,
        act: Tensor | np.ndarray,
        deterministic: bool = False,
        *,
        set_truncated: bool = False,
    ) -> tuple[TensorDictBase, Tensor]:
        """Imagine a rollout of given actions; carries gradient unless under ``torch.no_grad``.

        Args:
            obs: initial observations, ``[B, O]``.
            act: ``[B, H, A]``, or indices ``[B, H]`` of discrete actions.
            deterministic: move particles to the mean of their mixture instead of drawing.
            set_truncated: set ``truncated`` and ``done`` on the last step; needed for a replay
                buffer.

        Returns:
            TorchRL's rollout layout, batch size ``[B, H]``: ``latent`` ``[B, H, E, P, D]`` before
            the step, ``action``, and under ``"next"`` ``latent``, ``alive``, ``particle_reward``,
            ``term_prob`` (each ``[B, H, E, P, .]``), ``reward`` ``[B, H, 1]`` and done flags;
            and the context ``[B, C]``.

        Raises:
            TypeError: if ``deterministic`` or ``set_truncated`` is neither True nor False.
            ValueError: if a shape does not fit.
        """
        check_flag("rollout: deterministic", deterministic)
        check_flag("rollout: set_truncated", set_truncated)
        device = self.device
        obs, act = self._tensor(obs, device), self._tensor(act, device)
        if obs.ndim != 1 + len(self.encoder.obs_shape) or act.ndim not in (2, 3):
            raise ValueError(
                "rollout: expected obs [B, O] and act [B, H, A] (or indices [B, H]), got obs "
                f"{list(obs.shape)} and act {list(act.shape)}."
            )
        if act.shape[:1] != obs.shape[:1]:
            raise ValueError(f"rollout: obs is for {obs.shape[0]} envs, act for {act.shape[0]}.")
        is_index = not act.is_floating_point() and act.shape[2:] != (self.model.action_dim,)
        discrete = self.model.accepts_indices and is_index and act.shape[2:] in ((), (1,))
        if discrete:
            act = act.reshape(act.shape[:2])
        env = self._rollout_env(deterministic, discrete)
        start = TensorDict({self.encoder.in_keys[0]: obs}, batch_size=obs.shape[:1], device=device)
        out = env.imagine(env.initial_state(start), act, set_truncated=set_truncated)
        return out, out.get(self.encoder.out_keys[1])[:, 0]

    def env(self, action_spec: TensorSpec, **options: Any) -> PredictorEnv:
        """Make an environment that shares the parts of this predictor, and so follows learning.

        Args:
            action_spec: of one env, without batch dims.
            options: of :class:`~layeredrl_trl.envs.PredictorEnv`; ``reward`` replaces the learned
                one, and ``gamma``, for planners, the discount of the value.
        """
        reward = options.pop("reward", self.rew_func)
        options.setdefault("gamma", self._discount())
        return PredictorEnv(self.encoder, self.model, reward, action_spec, **options)

    @abc.abstractmethod
    def loss(self, batch: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss on ``batch`` and its terms by name."""

    @abc.abstractmethod
    def learn(
        self,
        buffer: TensorDictReplayBuffer,
        n_steps: int,
        batch_size: int,
        model_batch_size: int,
        n_total_env_steps: int,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Take ``n_steps`` optimisation steps on data from ``buffer``."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state; an error, or an interruption, changes nothing.

        Args:
            state_dict: from ``state_dict()`` of a predictor of the same architecture.
            strict: whether it must have the entries of this predictor and no others.
            assign: must be False: optimiser and loss hold the tensors that there are.

        Raises:
            RuntimeError: if an entry is missing, unexpected, or of another shape or kind.
            ValueError, TypeError: if the state of the optimiser or of a schedule does not fit, or
                ``assign`` is True.
        """
        if assign:
            raise ValueError(
                "load_state_dict: assign=True would part the optimiser and the loss from what they "
                "learn; load with assign=False."
            )
        return super().load_state_dict(state_dict, strict)

    @staticmethod
    def sample_partial_trajectories(
        buffer: TensorDictReplayBuffer,
        batch_size: int,
        n_steps: int,
        device: torch.device | str = torch.device("cpu"),
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """Draw slices whose starts are uniform over the stored transitions.

        Past the end of the episode the last real step repeats and the mask is 0.

        Args:
            buffer: replay buffer to draw from.
            batch_size: number of slices.
            n_steps: steps of a slice.
            device: device of ``lengths`` and ``mask``.

        Returns:
            ``indices``, storage positions as an int64 ndarray ``[n_steps, batch_size]`` (for a
            storage of two dims as from ``np.ravel_multi_index``); ``lengths``, real steps of each
            slice, ``[batch_size]``; ``mask`` ``[batch_size, n_steps]``, 1.0 on real steps.

        Raises:
            TypeError: if ``buffer`` is no replay buffer or a number no integer.
            ValueError: if the buffer is empty, a number is below 1, or ``device`` names none.
        """
        check_buffer(buffer)
        check_counts(batch_size=batch_size, n_steps=n_steps)
        check_device("device", device)
        storage = buffer.storage
        sampler = slice_sampler(buffer, TransitionSliceSampler(slice_len=n_steps))
        index, mask = sampler.sample_slices(storage, batch_size, n_steps)
        position = flat_position(index, storage.shape[1:])
        mask = mask.to(device)
        return position.mT.cpu().numpy(), mask.sum(-1), mask.to(torch.float32)

    def _discount(self) -> float | None:
        """Return the discount that the value is learned with, if it is known."""
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> Predictor:
        check_precision(type(self).__name__, fn)
        self.__dict__.pop("_envs", None)
        return super()._apply(fn, recurse)

    def _rollout_env(self, deterministic: bool, discrete: bool) -> PredictorEnv:
        """Return an env for :meth:`rollout`; cached, as making specs takes longer than a step."""
        envs = self.__dict__.setdefault("_envs", {})
        env = envs.get((deterministic, discrete))
        if env is None or not self._is_of_my_parts(env):
            n = self.model.action_dim
            spec = Categorical(n) if discrete else Unbounded((n,), dtype=torch.float32)
            env = envs[deterministic, discrete] = self.env(spec, deterministic=deterministic)
        return env

    def _is_of_my_parts(self, env: PredictorEnv) -> bool:
        return (
            env.initial_state.encoder is self.encoder
            and env.world_model.dynamics is self.model
            and env.world_model.reward is self.rew_func
        )

    def _evaluate(
        self, module: nn.Module, latent: Tensor, context: Tensor, act: Tensor | None
    ) -> Tensor:
        names = (*self.encoder.out_keys, self.model.in_keys[2])
        model = self.model
        entries = head_entries(
            names, latent, context, act, model.action_dim, indices=model.accepts_indices
        )
        return evaluate(module, entries).squeeze(-1)

    def _tensor(self, x: Tensor | np.ndarray, device: torch.device | None = None) -> Tensor:
        x = torch.as_tensor(x, device=device or self.device)
        return x.float() if x.is_floating_point() else x

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key != "_envs"}
        return state | {"writer": None}  # an open file, which cannot be copied or pickled


def _check_dims(
    model: DynamicsModel, encoder: Encoder, latent_state_dim: int, context_dim: int
) -> None:
    for name, part in (("model", model), ("encoder", encoder)):
        sizes = (part.latent_state_dim, part.context_dim)
        if sizes != (latent_state_dim, context_dim):
            raise ValueError(
                f"{name} has {sizes[0]} latent and {sizes[1]} context dims, but latent_state_dim="
                f"{latent_state_dim} and context_dim={context_dim}."
            )
