"""Parts that are not touched by a move to where they are."""

from __future__ import annotations

from itertools import chain
from typing import Any, Self

import torch
from torch import nn


class StaysInPlace(nn.Module):
    """A module of which ``to(device)`` changes nothing if everything is there already.

    TorchRL's environments move their model when they are made. ``nn.Module.to`` sets the memory of
    every parameter anew even then, which crashes a backward pass in another thread.
    """

    def to(self, *where: Any, **options: Any) -> Self:
        """Move all tensors, as every module does, if there is one to move."""
        to_device = not options and len(where) == 1 and isinstance(where[0], torch.device)
        tensors = chain(self.parameters(), self.buffers())
        if to_device and all(x.device == where[0] for x in tensors):
            return self
        return super().to(*where, **options)
