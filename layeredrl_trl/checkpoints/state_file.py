"""State dicts in a checkpoint, written so that a full disk is an error and not the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl.checkpoint import StateDictCheckpointAdapter


class StateFile(StateDictCheckpointAdapter):
    """TorchRL's adapter with one file of numbers and one of JSON, neither of which names code.

    TorchRL writes the numbers through a memory mapping. On a full disk, that kills the process
    (SIGBUS) where writing to a file raises an error. So the mapping is of memory here, and its
    content is then written to the file; what TorchRL reads is the same.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torchrl.checkpoint import Checkpoint
        >>> layer, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     checkpoint = Checkpoint().register("layer", layer, adapter=StateFile())
        ...     _ = Checkpoint(layer=other).load(checkpoint.save(f"{run}/checkpoint"))
        >>> torch.equal(layer.weight, other.weight)
        True
    """

    def __init__(self) -> None:
        super().__init__("consolidated")

    def save(
        self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Write the state of ``component`` into the folder ``path``.

        Args:
            component: has a ``state_dict``.
            path: of the component within the checkpoint.
            args: for ``state_dict``.
            kwargs: for ``state_dict``.

        Returns:
            The state.
        """
        if not hasattr(os, "memfd_create"):  # not Linux
            return super().save(component, path, args=args, kwargs=kwargs)
        file = path / self.state_consolidated
        path.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.memfd_create(file.name), "rb") as memory:
            file.symlink_to(f"/proc/self/fd/{memory.fileno()}")
            try:
                state = super().save(component, path, args=args, kwargs=kwargs)
            finally:
                file.unlink()
            with file.open("xb") as target:
                shutil.copyfileobj(memory, target, 2**20)
        return state
