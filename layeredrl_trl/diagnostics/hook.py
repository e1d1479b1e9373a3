"""A report at intervals of training, logged."""

from __future__ import annotations

import math
from typing import Any

from torchrl.data import TensorDictReplayBuffer
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import TrainerHookBase

from layeredrl_trl.checks import check_counts
from layeredrl_trl.data import check_buffer
from layeredrl_trl.diagnostics.model_report import ModelReport, model_report
from layeredrl_trl.predictors import Predictor
from layeredrl_trl.predictors.logging import check_writer, log_scalars


class ModelReportHook(TrainerHookBase):
    """Report on a model every so many env steps, and log the scalars.

    In a loop of your own, call it with the env steps taken so far. In a TorchRL ``Trainer``,
    ``register`` it: it is called after the optimisation steps of every batch of the collector and
    looks up the env steps (``trainer.collected_frames``) itself. The first call reports, and then
    the first one that is at least ``interval`` env steps later. While the buffer is empty it waits.
    NaN (what the data cannot tell) is not logged.

    Args:
        predictor: to report on.
        buffer: of held-out episodes, see :func:`~layeredrl_trl.diagnostics.model_report`.
        horizon: steps of a segment.
        interval: env steps from one report to the next.
        writer: a ``SummaryWriter`` or TorchRL ``Logger``. ``None``: in a ``Trainer`` its logger,
            else nothing is logged.
        prefix: of the names that are logged: ``"model/open_loop/error_last"``.
        options: of :func:`~layeredrl_trl.diagnostics.model_report`.

    Attributes:
        report: the last one; ``None`` before the first.

    Raises:
        TypeError: if ``buffer`` is no replay buffer, a number no integer, or ``writer`` of an
            unknown kind.
        ValueError: if ``horizon`` or ``interval`` is below 1.
    """

    def __init__(
        self,
        predictor: Predictor,
        buffer: TensorDictReplayBuffer,
        horizon: int,
        *,
        interval: int = 1000,
        writer: Any = None,
        prefix: str = "model",
        **options: Any,
    ) -> None:
        check_buffer(buffer)
        check_counts(horizon=horizon, interval=interval)
        self.predictor = predictor
        self.buffer = buffer
        self.horizon = horizon
        self.interval = interval
        self.writer = check_writer(writer)
        self.prefix = prefix
        self.options = options
        self.report: ModelReport | None = None
        self._trainer: Trainer | None = None
        self._last: int | None = None

    def __call__(self, n_env_steps: int | None = None) -> ModelReport | None:
        """Report if it is time.

        Args:
            n_env_steps: taken so far; ``None`` asks the trainer.

        Returns:
            The report, or ``None`` if it is not time or the buffer is empty.

        Raises:
            TypeError: without ``n_env_steps`` and without a trainer.
        """
        if n_env_steps is None:
            if self._trainer is None:
                raise TypeError(
                    "ModelReportHook: expected the number of env steps taken so far, or to be "
                    "registered in a Trainer first."
                )
            n_env_steps = int(self._trainer.collected_frames)
        too_early = self._last is not None and n_env_steps - self._last < self.interval
        if too_early or len(self.buffer) == 0:
            return None
        self._last = n_env_steps
        self.report = model_report(self.predictor, self.buffer, self.horizon, **self.options)
        scalars = {
            f"{self.prefix}/{name}": value
            for name, value in self.report.scalars().items()
            if not math.isnan(value)
        }
        writer = self.writer
        if writer is None and self._trainer is not None:
            writer = self._trainer.logger
        log_scalars(writer, scalars, n_env_steps)
        return self.report

    def register(self, trainer: Trainer, name: str = "model_report") -> None:
        """Register in a trainer, at the stage ``"post_steps"``."""
        self._trainer = trainer
        trainer.register_module(name, self)
        trainer.register_op("post_steps", self)

    def state_dict(self) -> dict[str, Any]:
        """Say when the last report was."""
        return {"last_report_at": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._last = state_dict["last_report_at"]
