"""Reports on a model at intervals during training, logged as scalars."""

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
    """Report on a model every ``interval`` env steps and log the scalars.

    In a loop of your own, call the hook with the number of env steps taken so far. In a TorchRL
    ``Trainer``, ``register`` it: the trainer calls it after the optimisation steps of every
    collected batch, and it looks up the env steps (``trainer.collected_frames``) itself. The first
    call with a buffer that is not empty makes a report; the next report follows at the first call
    that is at least ``interval`` env steps later. A scalar that is NaN is not logged.

    Args:
        predictor: the predictor to report on.
        buffer: held-out episodes, see :func:`~layeredrl_trl.diagnostics.model_report`.
        horizon: number of steps of a segment.
        interval: least number of env steps between two reports.
        writer: a ``SummaryWriter`` or TorchRL ``Logger``. ``None`` means the logger of the
            ``Trainer``; without a ``Trainer`` nothing is logged.
        prefix: first part of the logged names, as in ``"model/open_loop/error_last"``.
        options: keyword arguments of :func:`~layeredrl_trl.diagnostics.model_report`.

    Attributes:
        report: the latest report; ``None`` before the first.

    Raises:
        TypeError: if ``buffer`` is not a replay buffer, a number is not an integer, or ``writer``
            is of an unknown kind.
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
        self._last_report_at: int | None = None

    def __call__(self, n_env_steps: int | None = None) -> ModelReport | None:
        """Make and log a report if one is due after so many env steps; ``None`` asks the trainer.

        Returns:
            The report, or ``None`` if none is due or the buffer is empty.

        Raises:
            TypeError: if there is neither ``n_env_steps`` nor a trainer.
        """
        trainer = self._trainer
        if n_env_steps is None:
            if trainer is None:
                raise TypeError(
                    "ModelReportHook: expected the number of env steps taken so far, or to be "
                    "registered in a Trainer first."
                )
            n_env_steps = int(trainer.collected_frames)
        last = self._last_report_at
        too_early = last is not None and n_env_steps - last < self.interval
        if too_early or len(self.buffer) == 0:
            return None
        self._last_report_at = n_env_steps
        self.report = model_report(self.predictor, self.buffer, self.horizon, **self.options)
        scalars = self.report.scalars().items()
        known = {f"{self.prefix}/{name}": x for name, x in scalars if not math.isnan(x)}
        logger = trainer.logger if self.writer is None and trainer is not None else self.writer
        log_scalars(logger, known, n_env_steps)
        return self.report

    def register(self, trainer: Trainer, name: str = "model_report") -> None:
        """Register in a trainer, at the stage ``"post_steps"``."""
        self._trainer = trainer
        trainer.register_module(name, self)
        trainer.register_op("post_steps", self)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of env steps at the latest report."""
        return {"last_report_at": self._last_report_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._last_report_at = state_dict["last_report_at"]
