"""Scalars to a TensorBoard ``SummaryWriter`` or any TorchRL ``Logger``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def log_scalars(writer: Any, scalars: Mapping[str, float], step: int) -> None:
    """Write every scalar at ``step``; nothing if ``writer`` is ``None``."""
    if writer is None:
        return
    write = writer.log_scalar if isinstance(writer, Logger) else writer.add_scalar
    for name, value in scalars.items():
        write(name, value, step)
