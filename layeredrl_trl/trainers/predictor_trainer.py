"""One object that trains a predictor and its planner: a TorchRL ``Trainer``, put together."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import Checkpoint, CheckpointRotation, GlobalRNGState
from torchrl.collectors import BaseCollector, MultiAsyncCollector
from torchrl.data import TensorDictReplayBuffer
from torchrl.record.loggers.common import Logger
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import TrainerHookBase

from layeredrl_trl.checks import check_count, check_counts, check_finite
from layeredrl_trl.data import mark_break
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.trainers.collector_state import CollectorState
from layeredrl_trl.trainers.no_collector import NoCollector
from layeredrl_trl.trainers.own_state import OwnState
from layeredrl_trl.trainers.slice_feed import SliceFeed
from layeredrl_trl.trainers.stepper import PredictorStepper

_HISTORY = 1000
"""Number of latest values of each logged scalar that are kept."""

_POLL = 0.01
"""Seconds between two looks at a buffer that fills in the background."""


class PredictorTrainer(Trainer):
    """Train a predictor and its planner: collect, store, learn, report, save.

    After each batch of the collector it stores the batch, takes the optimisation steps that are due
    (``int(updates_per_frame * collected_frames)`` in all, none before ``init_random_frames``), and
    sends the planner's weights to the workers. Everything else is a hook: pass TorchRL's
    (``LogScalar``, ``LogValidationReward``, ``EarlyStopping``, ...) and
    :class:`~layeredrl_trl.diagnostics.ModelReportHook`, or register them later.

    **Checkpoints** hold everything that a run needs to go on as if it had not stopped:
    ``predictor`` (with its optimiser and schedules), ``replay_buffer``, ``planner`` (its own
    state), ``collector`` (the env in mid-episode, plans, counters), ``trainer_state``, the state of
    hooks, and ``rng``. See :class:`~layeredrl_trl.trainers.CollectorState` for envs whose state
    cannot be saved: their episodes end, marked truncated, at every checkpoint. Resume by
    ``trainer.load_from_file(path)`` before :meth:`train`.

    Args:
        predictor: learns.
        collector: of TorchRL; it acts by ``planner``. ``None``: learn from ``replay_buffer`` as it
            is; a frame is then one optimisation step.
        replay_buffer: with ``TransitionSliceSampler(slice_len=predictor.loss_module.slice_len)``. A
            collector that extends it itself must not be given to another buffer.
        total_frames: env steps at which training ends.
        updates_per_frame: optimisation steps per env step, 0 for none; 1 without a collector.
        batch_size: slices in a sample, for reward and value.
        model_batch_size: further slices, whose first steps train the dynamics; ``None``: the first
            steps of all slices do.
        planner: the collector's policy, or a part of it that has state. Its weights are sent to
            workers after each batch, its own state is saved.
        init_random_frames: env steps before the first optimisation step; ``None``: as many as the
            collector takes at random.
        stored_keys: entries of the collector's batches that are stored; ``None``: all.
        frame_skip: env steps per row of a batch.
        hooks: registered in this order.
        logger: of TorchRL; gets the terms of the loss and what hooks log.
        log_interval: env steps between two log entries of a scalar.
        progress_bar: show one.
        seed: of collector, torch and NumPy; ``None``: they are left alone.
        save_trainer_interval: env steps between two checkpoints, at their multiples.
        save_trainer_file: where to save, if not by ``checkpoint_rotation``.
        checkpoint: of ``torchrl.checkpoint``, for example :class:`WholeCheckpoint`. Components that
            it has already are left as they are.
        checkpoint_rotation: keeps several checkpoints.
        async_collection: the collector fills ``replay_buffer`` in the background (``start()``).
        options: further arguments of ``torchrl.trainers.Trainer``.

    Attributes:
        loss_module: the predictor's.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if a number is out of its range, or the sampler's slices are of another length.

    Example:
        >>> import torch
        >>> from torchrl.collectors import Collector
        >>> from torchrl.data import LazyTensorStorage
        >>> from torchrl.envs import GymEnv
        >>> from layeredrl_trl import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
        >>> from layeredrl_trl import TransitionSliceSampler
        >>> env = GymEnv("Pendulum-v1")
        >>> parts = ProbabilisticEnsemble(3, 0, 1), ValueNet(3, 0), RewardNet(3, 0, 1)
        >>> predictor = RewardPredictor(
        ...     *parts, IdentityEncoder(3), latent_state_dim=3, context_dim=0, learn_encoder=False
        ... )
        >>> trainer = PredictorTrainer(
        ...     predictor=predictor,
        ...     collector=Collector(env, None, frames_per_batch=20, total_frames=-1),
        ...     replay_buffer=TensorDictReplayBuffer(
        ...         storage=LazyTensorStorage(100), sampler=TransitionSliceSampler(slice_len=1)
        ...     ),
        ...     total_frames=60,
        ...     updates_per_frame=0.1,
        ...     batch_size=16,
        ...     progress_bar=False,
        ... )
        >>> trainer.train()
        >>> trainer.collected_frames, trainer.optimization_stepper.steps
        (60, 6)
    """

    optimization_stepper: PredictorStepper
    replay_buffer: TensorDictReplayBuffer

    def __init__(
        self,
        *,
        predictor: RewardPredictor,
        collector: BaseCollector | None,
        replay_buffer: TensorDictReplayBuffer,
        total_frames: int,
        updates_per_frame: float = 1.0,
        batch_size: int,
        model_batch_size: int | None = None,
        planner: TensorDictModuleBase | None = None,
        init_random_frames: int | None = None,
        stored_keys: Sequence[NestedKey] | None = None,
        frame_skip: int = 1,
        hooks: Sequence[TrainerHookBase] = (),
        logger: Logger | None = None,
        log_interval: int = 1000,
        progress_bar: bool = True,
        seed: int | None = None,
        save_trainer_interval: int = 10_000,
        save_trainer_file: str | Path | None = None,
        checkpoint: Checkpoint | None = None,
        checkpoint_rotation: CheckpointRotation | None = None,
        async_collection: bool = False,
        **options: Any,
    ) -> None:
        check_counts(total_frames=total_frames, batch_size=batch_size, frame_skip=frame_skip)
        check_counts(save_trainer_interval=save_trainer_interval)
        check_finite("updates_per_frame", updates_per_frame)
        if updates_per_frame < 0:
            raise ValueError(f"updates_per_frame must not be negative, got {updates_per_frame}.")
        stepper = PredictorStepper(predictor, model_batch_size=model_batch_size)
        n_slices = batch_size + (model_batch_size or 0)
        has_gaps = isinstance(collector, MultiAsyncCollector)
        feed = SliceFeed(replay_buffer, n_slices, stored_keys, has_gaps=has_gaps)
        length, expected = replay_buffer.sampler.slice_len, predictor.loss_module.slice_len
        if length != expected:
            raise ValueError(
                f"replay_buffer: expected TransitionSliceSampler(slice_len={expected}), as "
                f"predictor.loss_module.slice_len, got slice_len={length}."
            )
        source = NoCollector(total_frames) if collector is None else collector
        if init_random_frames is not None:
            check_count("init_random_frames", init_random_frames, least=0)
        self.predictor = predictor
        self.planner = planner
        self.updates_per_frame = 1.0 if collector is None else updates_per_frame
        self.init_random_frames = init_random_frames
        self._collector_state = CollectorState(source)
        self._last_log = {}  # TorchRL shares it between all trainers of a class
        super().__init__(
            collector=source,
            total_frames=total_frames,
            frame_skip=frame_skip,
            optim_steps_per_batch=1,
            loss_module=predictor.loss_module,
            optimization_stepper=stepper,
            replay_buffer=replay_buffer,
            batch_size=batch_size,
            logger=logger,
            log_interval=log_interval,
            progress_bar=progress_bar,
            seed=seed,
            save_trainer_interval=save_trainer_interval,
            save_trainer_file=save_trainer_file,
            checkpoint=checkpoint,
            checkpoint_rotation=checkpoint_rotation,
            async_collection=async_collection,
            **options,
        )
        if getattr(source, "replay_buffer", None) is not None:
            self.register_op("process_optim_batch", feed.sample)
        else:
            feed.register(self)
        if planner is not None:
            self.register_op("post_steps", self.send_weights)
        self.register_op("setup", self._prepare_bar)
        for hook in hooks:
            hook.register(self)

    def optim_steps(self, batch: TensorDictBase | None, **options: Any) -> None:
        """Take the optimisation steps that are due."""
        due = self.updates_due()
        if not due or not len(self.replay_buffer):
            if batch is None:
                time.sleep(_POLL)
            return
        self.optim_steps_per_batch = due
        with self.predictor.watch(self.replay_buffer):
            super().optim_steps(batch, **options)

    def updates_due(self) -> int:
        """Return how many optimisation steps are due after the frames that are collected."""
        frames = self.collected_frames
        if self.init_random_frames is not None and frames < self.init_random_frames:
            return 0
        due = math.floor(self.updates_per_frame * frames + 1e-9)  # 0.29 * 100 is 28.999...
        return max(0, due - self.optimization_stepper.steps)

    def send_weights(self) -> None:
        """Send the planner's weights to the collector's workers."""
        if isinstance(self.collector, BaseCollector):
            self.collector.update_policy_weights_()

    @contextlib.contextmanager
    def stop_on_signal(
        self, signals: Collection[int] = (signal.SIGINT, signal.SIGTERM)
    ) -> Iterator[None]:
        """Let the first of these signals end training after the current batch, with a checkpoint.

        A second one raises ``KeyboardInterrupt`` at once. Outside of the main thread, where Python
        allows no handlers, this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _: Any) -> None:
            if self._stop_training:
                raise KeyboardInterrupt
            self.request_stop(f"received {signal.Signals(number).name}")

        before = {number: signal.signal(number, handle) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def train(self) -> None:
        """Train until ``total_frames`` are collected, or a stop is requested."""
        if self.collected_frames >= self.total_frames:
            return
        try:
            super().train()
        finally:
            if self.progress_bar and hasattr(self, "_pbar"):
                self._pbar.close()

    def save_trainer(self, force_save: bool = False) -> None:
        """Save a checkpoint if one is due: at each multiple of ``save_trainer_interval``."""
        is_due = self._save_interval_elapsed() or force_save
        if self._has_checkpoint_destination() and is_due:
            self._last_save = self.collected_frames
            self._save_trainer()

    def _save_interval_elapsed(self) -> bool:
        """Tell whether a multiple of the interval was passed; TorchRL 0.15 asks, too."""
        interval = self.save_trainer_interval
        return self.collected_frames // interval > self._last_save // interval

    def save_after_error(self) -> None:
        """Save what has been learned and collected, after an error that :meth:`train` has raised.

        The resumed run begins a new episode.
        """
        if isinstance(self.collector, BaseCollector):
            self._break_off(live=False)
        super()._save_trainer()

    def load_from_file(self, file: str | Path, **options: Any) -> PredictorTrainer:
        """Load a checkpoint, and send the weights to the workers; see ``Trainer``."""
        super().load_from_file(file, **options)
        if self._collector_state.began_anew:
            mark_break(self.replay_buffer)
        self.send_weights()
        return self

    def _save_trainer(self) -> None:
        if self._collector_state.breaks_off:
            self._break_off()
        super()._save_trainer()

    def _break_off(self, *, live: bool = True) -> None:
        mark_break(self.replay_buffer)
        self._collector_state.break_off(live=live)

    def _sync_checkpoint_components(self, checkpoint: Checkpoint | None = None) -> Checkpoint:
        """Register what a run needs, each thing once; TorchRL would save the networks twice."""
        checkpoint = checkpoint or self.checkpoint or Checkpoint()
        components = {
            "predictor": self.predictor,
            "collector": self._collector_state,
            "trainer_state": self._checkpoint_state,
            "rng": GlobalRNGState(),
        }
        if isinstance(self.collector, BaseCollector):  # otherwise the data do not change
            components["replay_buffer"] = self.replay_buffer
        if self.planner is not None:
            components["planner"] = OwnState(self.planner, self.predictor)
        components |= {f"trainer_module.{name}": module for name, module in self._modules.items()}
        for name, component in components.items():
            if name not in checkpoint:
                checkpoint.register(name, component)
        return checkpoint

    def _replay_write_count(self) -> int:
        """Count the env steps that were ever stored."""
        columns = self.replay_buffer.storage.shape[1:].numel() if len(self.replay_buffer) else 1
        return super()._replay_write_count() * columns * self.frame_skip

    def _prepare_bar(self) -> None:
        """Let the bar of progress begin where the run does, and be drawn twice a second at most."""
        if not self.progress_bar:
            return
        bar = self._pbar
        bar.unit, bar.mininterval, bar.miniters, bar.dynamic_miniters = "step", 0.5, 1, False
        bar.initial = bar.n = bar.last_print_n = self.collected_frames

    def _pbar_description(self) -> None:
        text = ", ".join(f"{key} {value:.4g}" for key, value in sorted(self._pbar_str.items()))
        self._pbar.set_description(text, refresh=False)

    def _async_iterator(self) -> Iterator[None]:
        """Yield until the trainer has seen all frames, the last of which TorchRL does not count."""
        while self.collected_frames < self.total_frames:
            runs = getattr(self.collector, "is_running", lambda: True)()
            yield None
            if not runs and self._replay_write_count() <= self.collected_frames:
                raise RuntimeError(
                    f"collector: it has stopped after {self.collected_frames} of "
                    f"{self.total_frames} frames."
                )

    def _log(self, log_pbar: bool = False, **scalars: Any) -> None:
        """Log scalars, and keep only the latest of them: a run may be long."""
        super()._log(log_pbar=log_pbar, **{key: _plain(x) for key, x in scalars.items()})
        for key in scalars:
            del self._log_dict[key][:-_HISTORY]


def _plain(value: Any) -> Any:
    """Return a tensor of one number as that number."""
    is_scalar = isinstance(value, TensorDict) is False and getattr(value, "ndim", None) == 0
    return value.item() if is_scalar else value
