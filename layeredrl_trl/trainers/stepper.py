"""The optimisation step of a predictor in a TorchRL ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDictBase
from torchrl.trainers.trainers import OptimizationStepper

from layeredrl_trl.checks import check_count
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.predictors.modes import in_mode


class PredictorStepper(OptimizationStepper):
    """Take one guarded step of a predictor on the slices that a trainer has sampled.

    It is the step of ``predictor.learn``: learning rates after the trainer's ``collected_frames``,
    loss, clipping of each part, warm-up, optimiser, target network. A batch with non-finite
    gradients changes nothing and is counted. The optimiser is the predictor's own: the trainer gets
    none, and no ``TargetNetUpdaterHook``.

    Args:
        predictor: learns.
        model_batch_size: number of slices, the last of each sample, whose first steps train the
            dynamics, and nothing else. ``None``: the first steps of all slices do, and all slices
            train reward and value.

    Reads:
        A flat sample ``[B * T]`` of a buffer with ``TransitionSliceSampler(slice_len=T)`` and ``T =
        predictor.loss_module.slice_len``; the entries of
        :class:`~layeredrl_trl.objectives.RewardPredictorLoss`.

    Raises:
        TypeError: if ``predictor`` is no ``RewardPredictor`` or ``model_batch_size`` no integer.
        ValueError: if ``model_batch_size`` is below 1; in a step, if the sample has no more slices
            than that.

    Example:
        See :class:`~layeredrl_trl.trainers.PredictorTrainer`, which makes one. In a trainer of your
        own: ``Trainer(..., optimization_stepper=PredictorStepper(predictor), optimizer=None,
        loss_module=predictor.loss_module)``.
    """

    def __init__(self, predictor: RewardPredictor, *, model_batch_size: int | None = None) -> None:
        if not isinstance(predictor, RewardPredictor):
            raise TypeError(
                f"predictor: expected a RewardPredictor, got {type(predictor).__name__}."
            )
        if model_batch_size is not None:
            check_count("model_batch_size", model_batch_size)
        self.predictor = predictor
        self.model_batch_size = model_batch_size
        self.steps = 0

    @property
    def optimizer_step_count(self) -> int:
        """Steps taken in the trainer, skipped ones included; TorchRL's hooks ask for it."""
        return self.steps

    def step(self, trainer: Any, sub_batch: TensorDictBase) -> TensorDictBase:
        """Take one step.

        Returns:
            The detached outputs of the loss, and ``loss``, ``grad_norm`` and ``skipped`` (batches
            skipped so far). Of a skipped batch some are not finite.
        """
        predictor, frames = self.predictor, int(trainer.collected_frames)
        batches = self._split(sub_batch)
        predictor.set_learning_rates(frames)
        with in_mode(predictor, True):
            terms = predictor.update(*batches)
        predictor.advance(frames)
        self.steps += 1
        return terms.set("skipped", terms["loss"].new_tensor(float(predictor.update.skipped)))

    def _split(self, sample: TensorDictBase) -> tuple[TensorDictBase, ...]:
        """Part a sample into slices and, if there are any, transitions of their own."""
        n_single, length = self.model_batch_size, self.predictor.loss_module.slice_len
        sample = sample.to(self.predictor.device)
        if n_single is None:
            return (sample,)
        if sample.ndim != 1 or sample.numel() % length or sample.numel() <= n_single * length:
            raise ValueError(
                f"PredictorStepper: expected a flat sample of more than model_batch_size={n_single}"
                f" slices of {length} steps, got batch size {list(sample.batch_size)}."
            )
        first = sample[-n_single * length :: length]
        return sample[: -n_single * length], first

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps; all else is the predictor's own state."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: if it is not that; nothing is changed then.
        """
        check_count("state_dict: steps", state_dict["steps"], least=0)
        self.steps = state_dict["steps"]
