"""A predictor that learns everything from a replay buffer, the encoder through the reward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import TensorDictReplayBuffer

from layeredrl_trl import keys
from layeredrl_trl.checks import check_count, check_counts, check_flags, check_fraction
from layeredrl_trl.data import TransitionSliceSampler, check_buffer
from layeredrl_trl.modules import DeltaStandardizer, DynamicsModel, Encoder
from layeredrl_trl.modules.outputs import check_std
from layeredrl_trl.objectives import RewardPredictorLoss, total_loss
from layeredrl_trl.predictors.faults import watched
from layeredrl_trl.predictors.logging import log_scalars, mean_of_taken
from layeredrl_trl.predictors.modes import in_training_mode
from layeredrl_trl.predictors.part_rates import LearningRate, LearningRates
from layeredrl_trl.predictors.part_updates import (
    check_update_state,
    load_update_state,
    make_update,
    update_state,
)
from layeredrl_trl.predictors.predictor import Predictor
from layeredrl_trl.predictors.read_ahead import ReadAhead


class RewardPredictor(Predictor):
    """Learn encoder, dynamics, reward and value together from partial trajectories.

    Only the reward loss trains the encoder. See
    :class:`~layeredrl_trl.objectives.RewardPredictorLoss` for the loss terms and the treatment of
    terminated, truncated, unfinished and padded steps.

    Loss, optimiser and targets are bound to the parts at construction. Replacing a part later
    (``predictor.rew_func = ...``) changes predictions but not learning: make a new predictor
    instead.

    Args:
        model: the dynamics model.
        val_func: state value or Q-function; ``None``: no value is learned.
        rew_func: reward function; ``None``: no reward is learned.
        encoder: encoder of observations.
        latent_state_dim, context_dim: ``D`` and ``C``.
        gamma: discount, in [0, 1].
        tau: how far the value's target moves to the value after each step, in [0, 1].
        k_steps: steps of a slice that train reward and value.
        n_steps: maximum number of rewards in a value target.
        learn_encoder: let the reward loss train the encoder.
        consistency_loss_weight, value_loss_weight, rew_loss_weight: factors of the losses of
            dynamics, value and reward.
        delta_standardizer_lr, encoder_lr, reward_lr, model_lr, value_lr: learning rates, each a
            float or a function of the total number of env steps.
        encoder_warm_up: number of first optimiser steps in which only encoder and reward learn; no
            effect with ``learn_encoder=False``.
        delta_standardizer: learn a matrix that whitens changes of the latent state.
        clip_grad_max_norm: maximum norm of the gradients of each part (encoder, model, reward,
            value, standardizer); ``None`` for no clipping.
        device: device to move all parts to.
        writer: a ``SummaryWriter`` or TorchRL ``Logger``; ``None`` for no logging.
        log_interval: number of calls to :meth:`learn` per log entry.
        compile: run losses and gradients of :meth:`learn` in code from ``torch.compile``; equal up
            to rounding, on a CPU in some 60 to 90% of the time. Compiling, at the first call and
            for new batch sizes, takes half a minute and is logged once. Needs a C++ compiler, on
            CUDA Triton.
        cudagraphs: take the steps of :meth:`learn` as a CUDA graph, see
            :class:`~layeredrl_trl.acceleration.DeviceUpdate`. Not yet run on a GPU.

    Attributes:
        loss_module: the :class:`~layeredrl_trl.objectives.RewardPredictorLoss`, for your own loops.
        standardizer: the :class:`~layeredrl_trl.modules.DeltaStandardizer`, or ``None``.

    Raises:
        TypeError: if a part is of an unknown kind, ``val_func`` a reward or ``rew_func`` a value,
            or a flag no bool.
        ValueError: if a number is out of range, sizes of the parts differ, or ``cudagraphs`` is set
            without CUDA.

    Example:
        >>> from torchrl.data import LazyTensorStorage
        >>> from layeredrl_trl import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
        >>> model, value = ProbabilisticEnsemble(3, 0, 1, n_models=5), ValueNet(3, 0)
        >>> parts = model, value, RewardNet(3, 0, 1), IdentityEncoder(3)
        >>> predictor = RewardPredictor(*parts, latent_state_dim=3, context_dim=0, n_steps=3)
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
        >>> flags = {key: torch.zeros(100, 1).bool() for key in ("terminated", "truncated", "done")}
        >>> following = {"observation": torch.randn(100, 3), "reward": torch.randn(100, 1), **flags}
        >>> data = {"observation": torch.randn(100, 3), "action": torch.randn(100, 1)}
        >>> _ = buffer.extend(TensorDict({**data, "next": following}, batch_size=[100]))
        >>> loss, info = predictor.learn(
        ...     buffer, n_steps=2, batch_size=16, model_batch_size=16, n_total_env_steps=100
        ... )
        >>> predictor.value(torch.zeros(4, 3)).shape
        torch.Size([4])
    """

    loss_module: RewardPredictorLoss

    def __init__(
        self,
        model: DynamicsModel,
        val_func: nn.Module | Callable[..., Tensor] | None,
        rew_func: nn.Module | Callable[..., Tensor] | None,
        encoder: Encoder,
        latent_state_dim: int,
        context_dim: int,
        gamma: float = 0.99,
        tau: float = 0.005,
        k_steps: int = 1,
        n_steps: int = 1,
        learn_encoder: bool = True,
        consistency_loss_weight: float = 1.0,
        value_loss_weight: float = 1.0,
        rew_loss_weight: float = 1.0,
        delta_standardizer_lr: LearningRate = 1e-3,
        encoder_lr: LearningRate = 3e-4,
        reward_lr: LearningRate = 3e-4,
        model_lr: LearningRate = 3e-4,
        value_lr: LearningRate = 3e-4,
        encoder_warm_up: int = 20,
        delta_standardizer: bool = True,
        clip_grad_max_norm: float | None = 20.0,
        device: torch.device | str = torch.device("cpu"),
        writer: Any = None,
        log_interval: int = 10,
        *,
        compile: bool = False,
        cudagraphs: bool = False,
    ) -> None:
        check_flags(learn_encoder=learn_encoder, delta_standardizer=delta_standardizer)
        check_flags(compile=compile, cudagraphs=cudagraphs)
        parts = model, val_func, rew_func, encoder, latent_state_dim, context_dim
        super().__init__(*parts, device, writer, log_interval)
        check_fraction("tau", tau)
        self.standardizer = DeltaStandardizer(latent_state_dim) if delta_standardizer else None
        self.to(device)
        loss_module = RewardPredictorLoss(
            self.encoder,
            self.model,
            self.rew_func,
            self.val_func,
            standardizer=self.standardizer,
            gamma=gamma,
            k_steps=k_steps,
            n_steps=n_steps,
            learn_encoder=learn_encoder,
            consistency_loss_weight=consistency_loss_weight,
            value_loss_weight=value_loss_weight,
            rew_loss_weight=rew_loss_weight,
        )
        self.__dict__["loss_module"] = loss_module  # registered, it would save each part twice
        self._rates = LearningRates(
            delta_standardizer=delta_standardizer_lr,
            encoder=encoder_lr,
            reward=reward_lr,
            model=model_lr,
            value=value_lr,
        )
        self._update_options = {
            "tau": tau,
            "clip_grad_max_norm": clip_grad_max_norm,
            "encoder_warm_up": encoder_warm_up,
            "compile": compile,
            "cudagraphs": cudagraphs,
        }
        self.n_learn_calls = 0
        self.update = make_update(loss_module, **self._update_options)
        if loss_module.has_value:
            self.target_val_params = loss_module.target_value_network_params
        self._sampler = TransitionSliceSampler(slice_len=loss_module.slice_len)

    def compute_targets(
        self,
        buffer: TensorDictReplayBuffer,
        batch_size: int,
        k_steps: int,
        n_steps: int,
        gamma: float = 0.99,
    ) -> TensorDict:
        """Draw slices and compute their n-step value targets.

        Args:
            buffer: replay buffer; slice starts are uniform over stored transitions.
            batch_size: ``B``, number of slices.
            k_steps: steps of a slice that get a target.
            n_steps: maximum number of rewards in a target.
            gamma: discount, in [0, 1].

        Returns:
            TensorDict ``[B, k_steps]`` as from ``loss_module.compute_targets``, with ``index``
            (storage positions).

        Raises:
            KeyError: if the buffer lacks an entry.
            ValueError: if it is empty, or a shape or number does not fit.
        """
        check_counts(batch_size=batch_size, k_steps=k_steps, n_steps=n_steps)
        length = k_steps + n_steps - (0 if self.loss_module.bootstraps_action else 1)
        slices = self._reader.slices(buffer, batch_size, length)
        return self.loss_module.compute_targets(
            slices, k_steps=k_steps, n_steps=n_steps, gamma=gamma
        )

    def sample_model_batch(self, buffer: TensorDictReplayBuffer, batch_size: int) -> TensorDict:
        """Draw single transitions for the dynamics, uniformly over stored ones.

        Args:
            buffer: replay buffer to draw from.
            batch_size: ``B``.

        Returns:
            TensorDict ``[B]``, without gradient: ``latent``, ``context``, ``action``,
            ``("next", "latent")``, ``("next", "context")``, ``("next", "terminated")``,
            ``("collector", "mask")``, ``index``, and ``weight`` if it is stored.

        Raises:
            KeyError: if the buffer lacks an entry.
            ValueError: if it is empty, or a shape or number does not fit.
        """
        return self.loss_module.encode_transitions(self._reader.transitions(buffer, batch_size))

    def loss(
        self, batch: TensorDictBase, model_batch: TensorDictBase | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss.

        Args:
            batch: from :meth:`compute_targets`; or slices, see
                :class:`~layeredrl_trl.objectives.RewardPredictorLoss`.
            model_batch: from :meth:`sample_model_batch`; ``None`` only with slices.

        Returns:
            The sum of the loss terms, a scalar with gradient, and all outputs of the loss by name.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if a shape does not fit, or targets come without ``model_batch``.
        """
        loss = self.loss_module
        has_targets = keys.VALUE_TARGET in batch.keys(True)
        if model_batch is not None:
            targets = batch if has_targets else loss.compute_targets(batch)
            terms = loss.terms(targets, model_batch)
        elif not has_targets:
            terms = loss(batch)
        else:
            raise ValueError(
                "RewardPredictorLoss: targets hold no next observations, so the dynamics need "
                "transitions as second argument; or pass slices alone."
            )
        return total_loss(terms), dict(terms.items())

    @in_training_mode
    def learn(
        self,
        buffer: TensorDictReplayBuffer,
        n_steps: int,
        batch_size: int,
        model_batch_size: int,
        n_total_env_steps: int,
    ) -> tuple[Tensor, dict[str, float]]:
        """Take optimisation steps on data from a replay buffer.

        Slices and transitions are drawn uniformly, by the buffer's sampler if that is a
        ``TransitionSliceSampler``. Transforms run once for each step, on slices. Another thread may
        extend the buffer meanwhile. More is in ``docs/buffers.md``. A predictor in evaluation mode
        (:meth:`eval`) is set to training mode during the call.

        A warning says if steps are stored so that slices are wrong or have a single step. A batch
        with non-finite gradients is skipped. Warnings of the first, and of the 10th, 100th, ... in
        a row, name entries and storage positions to blame; another one values far from all.

        Args:
            buffer: with ``observation``, ``action``, ``("next", "observation")``,
                ``("next", "reward")``, ``("next", "terminated")``, ``("next", "done")`` and
                optionally ``planned``.
            n_steps: optimisation steps.
            batch_size: slices in a batch, for reward and value.
            model_batch_size: transitions in a batch, for the dynamics.
            n_total_env_steps: steps taken in the real env so far; argument of learning rates that
                are functions.

        Returns:
            The mean loss over steps that were not skipped (NaN if all were), and an info dictionary
            of floats: means of every term, ``loss`` and ``grad_norm`` (before clipping) over the
            same steps, ``target_scale`` (mean over dims, if the model has it), ``lr_...`` for each
            part, and ``skipped`` (batches skipped so far for non-finite gradients).

        Raises:
            KeyError: if the buffer lacks an entry.
            TypeError: if ``buffer`` cannot be learned from, or a number is no integer.
            ValueError: if it is empty, or a shape or number does not fit.
        """
        check_buffer(buffer)
        check_counts(n_steps=n_steps, batch_size=batch_size, model_batch_size=model_batch_size)
        check_count("n_total_env_steps", n_total_env_steps, least=0)
        rates = self.set_learning_rates(n_total_env_steps)
        batches = self._reader.batches(buffer, n_steps, batch_size, model_batch_size)
        with self.watch(buffer):
            steps = [self.update(slices, transitions) for slices, transitions in batches]
        self.advance(n_total_env_steps)
        mean_loss, info = mean_of_taken(steps)
        info |= {f"lr_{name}": rate for name, rate in rates.items()}
        if hasattr(self.model, "target_scale"):
            info["target_scale"] = float(self.model.target_scale.mean())
        info["skipped"] = float(self.update.skipped)
        if self.n_learn_calls % self.log_interval == 0:
            scalars = {f"predictor/{name}": value for name, value in info.items()}
            log_scalars(self.writer, scalars, n_total_env_steps)
        self.n_learn_calls += 1
        return mean_loss, info

    def set_learning_rates(self, n_total_env_steps: int) -> dict[str, float]:
        """Set and return the rates after so many env steps, for steps of your own on ``update``."""
        return self._rates.set(self.update.optimizer, n_total_env_steps)

    def advance(self, n_total_env_steps: int) -> None:
        """Tell the model the progress of training, after steps of your own on ``update``."""
        whitening = None if self.standardizer is None else self.standardizer.matrix
        self.model.advance(n_total_env_steps, whitening)

    def watch(self, buffer: TensorDictReplayBuffer) -> AbstractContextManager[None]:
        """Warn of what is wrong with ``buffer`` while your own loop calls ``update``."""
        return watched(self.update, self._reader, buffer)

    def set_keys(self, **names: NestedKey) -> None:
        """Rename the entries that are read from buffers.

        Args:
            names: of ``observation`` and ``action`` (by default as in ``encoder`` and ``model``),
                ``planned``, and of ``reward`` and ``terminated`` under ``"next"``; ``done`` and
                ``truncated`` are siblings of ``terminated``.

        Raises:
            ValueError: if there is no such entry.
        """
        self.loss_module.set_keys(**names)
        self._sampler = TransitionSliceSampler(
            slice_len=self.loss_module.slice_len, end_keys=self.loss_module.tensor_keys.end_keys
        )

    def get_standardized_log_prob(
        self,
        state: Tensor,
        context: Tensor,
        action: Tensor,
        next_state: Tensor,
        fixed_std: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Compute the log density of the whitened change of the latent state: a skill's reward.

        It is the density of ``W (next_state - state)`` under the mixture of all members with means
        ``W (mean - state)`` and standard deviation ``fixed_std``; ``W`` is the standardizer's
        matrix, or the identity.

        Args:
            state: latent state, ``[B, D]``.
            context: ``[B, C]``.
            action: ``[B, A]``.
            next_state: ``[B, D]``.
            fixed_std: broadcast to ``[B, E, M, D]``; usually ``[D]`` or a scalar.

        Returns:
            ``log_prob`` ``[B]`` in nats, ``term_prob`` ``[B]``, and a dictionary with
            ``standardized_delta`` ``[B, D]``.

        Raises:
            ValueError: if a shape does not fit, or ``fixed_std`` is not positive and finite.
        """
        state, context, action, next_state, fixed_std = (
            self._tensor(x) for x in (state, context, action, next_state, fixed_std)
        )
        each = (*state.shape[:-1], self.model.n_models, self.model.n_modes, state.shape[-1])
        check_std("fixed_std", fixed_std, each)
        matrix = torch.eye(self.latent_state_dim, device=state.device)
        matrix = (matrix if self.standardizer is None else self.standardizer.matrix).to(state)
        log_prob, term_prob = self.model.log_prob(
            state, context, action, next_state, std=fixed_std, transform=matrix
        )
        return log_prob, term_prob, {"standardized_delta": (next_state - state) @ matrix.mT}

    def get_extra_state(self) -> dict[str, Any]:
        """Return state besides parameters and buffers: optimiser, counters and learning rates.

        A learning rate that is a function but no :class:`~layeredrl_trl.schedules.Schedule` has no
        state; loading leaves it unchanged.
        """
        return {
            "rates": self._rates.state_dict(),
            **update_state(self.update),
            "n_learn_calls": self.n_learn_calls,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state from :meth:`get_extra_state`.

        Raises:
            TypeError, ValueError: if it is of other parts or layers, or an entry is missing or out
                of its range; nothing is changed then.
        """
        self.check_extra_state(state)
        load_update_state(self.update, state)
        self.n_learn_calls = state["n_learn_calls"]
        self._rates.load_state_dict(state["rates"])

    def check_extra_state(self, state: Any) -> None:
        """Raise what :meth:`set_extra_state` would; a load asks this before it changes anything."""
        check_update_state(self.update, state, ("n_learn_calls", "rates"))
        self._rates.read(state["rates"])

    def train(self, mode: bool = True) -> RewardPredictor:
        """Set training or evaluation mode; in the latter :meth:`loss` changes no statistics."""
        super().train(mode)
        self.loss_module.train(mode)
        return self

    def _discount(self) -> float:
        return self.loss_module.gamma

    @property
    def _reader(self) -> ReadAhead:
        return ReadAhead(self.loss_module, self._sampler, self.device)

    def _apply(self, fn: Any, recurse: bool = True) -> RewardPredictor:
        super()._apply(fn, recurse)
        if "update" in self.__dict__:
            self._remake_update(self.get_extra_state())
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["update"]
        return state | {"_extra_state": self.get_extra_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        extra_state = state.pop("_extra_state")
        super().__setstate__(state)
        self._remake_update(extra_state)

    def _remake_update(self, extra_state: dict[str, Any]) -> None:
        """Bind optimiser and target updater to moved, copied or unpickled parameters."""
        buffers = [(buffer, buffer.clone()) for buffer in self.loss_module.buffers()]
        self.update = make_update(self.loss_module, **self._update_options)
        for buffer, old in buffers:  # a new SoftUpdate sets the targets to the parameters
            buffer.copy_(old)
        self.set_extra_state(extra_state)
