"""Scalars to a TensorBoard ``SummaryWriter`` or any TorchRL ``Logger``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.record.loggers.common import Logger


def check_writer(writer: Any) -> Any:
    """Return ``writer`` if scalars can be logged to it.

    Raises:
        TypeError: if it is neither ``None``, a TorchRL ``Logger`` nor has ``add_scalar``.
    """
    if writer is None or isinstance(writer, Logger) or hasattr(writer, "add_scalar"):
        return writer
    raise TypeError(
        "writer: expected None, a torch.utils.tensorboard.SummaryWriter or a torchrl Logger, "
        f"got {type(writer).__name__}."
    )


def mean_of_taken(steps: Sequence[TensorDictBase]) -> tuple[Tensor, dict[str, float]]:
    """Average the outputs of steps, without those that were skipped.

    A skipped step has a ``grad_norm`` that is not finite.

    Returns:
        The mean ``loss``, NaN if no step was taken; and all means by name, empty then.
    """
    names = [str(name) for name in steps[0].keys()]
    values = torch.stack([torch.stack([*step.values()]) for step in steps])
    taken = values[:, names.index("grad_norm")].isfinite()
    means = values[taken].mean(0)
    info = dict(zip(names, means.tolist(), strict=True)) if taken.any() else {}
    return means[names.index("loss")], info


def log_scalars(writer: Any, scalars: Mapping[str, float], step: int) -> None:
    """Write every scalar at ``step``; nothing if ``writer`` is ``None``."""
    if writer is None:
        return
    write = writer.log_scalar if isinstance(writer, Logger) else writer.add_scalar
    for name, value in scalars.items():
        write(name, value, step)
