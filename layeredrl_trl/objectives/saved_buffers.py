"""Copies of module buffers, to undo a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Slot = tuple[dict[str, Tensor | None], str]
"""Location of a buffer: ``_buffers`` of its module, and its name there."""


def statistics_of(loss_module: nn.Module) -> list[Slot]:
    """List the buffers that computing a loss may change, all except target parameters."""
    targets = {f"target_{name}" for name, _ in loss_module.named_parameters()}
    return [
        (module._buffers, name)
        for path, module in loss_module.named_modules()
        for name in module._buffers
        if f"{path}.{name}".lstrip(".") not in targets
    ]


class SavedBuffers:
    """Copy the buffers at some slots, see :func:`statistics_of`, to restore them later."""

    def __init__(self, slots: list[Slot]) -> None:
        self._own = [
            (buffers, name, x) for buffers, name in slots if (x := buffers.get(name)) is not None
        ]
        self._copies = _cloned([x for _, _, x in self._own])

    def restore(self, where: Tensor | None = None) -> None:
        """Restore the buffers; if ``where``, bool ``[]``, is False, keep their current values.

        A module that replaced a buffer gets the original tensor back.
        """
        for (buffers, name, own), copy in zip(self._own, self._copies, strict=True):
            now, buffers[name] = buffers[name], own
            own.copy_(copy if where is None else torch.where(where, copy, now))


def _cloned(tensors: list[Tensor]) -> list[Tensor]:
    """Copy all tensors, by one call if torch has one (2.11 has none)."""
    if tensors and hasattr(torch, "_foreach_clone"):
        return list(torch._foreach_clone(tensors))
    return [x.clone() for x in tensors]
