"""The rows of the last few refills, as one TorchRL replay buffer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    TensorStorage,
)


class RetainedRows:
    """Hold the rows of the last ``retain`` refills, the oldest first.

    A refill puts a new storage into the buffer, exactly as large as it must be: refills grow with
    the length of branches, and a ring of fixed size would keep more of them while they are small.

    Args:
        retain: number of refills.

    Attributes:
        buffer: the replay buffer. It stays the same, and cannot be extended.
        rows: all rows ``[R]``; ``None`` before the first refill.
        sizes: rows of each refill.
    """

    def __init__(self, retain: int) -> None:
        self.retain = retain
        self.rows: TensorDictBase | None = None
        self.sizes: list[int] = []
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(1), writer=ImmutableDatasetWriter()
        )

    def add(self, rows: TensorDictBase) -> None:
        """Add the rows ``[R]`` of a refill, and drop those of the oldest one if it is too many."""
        kept = self.sizes[-(self.retain - 1) :] if self.retain > 1 else []
        old = [] if not kept else [self.rows[-sum(kept) :]]
        self._hold(torch.cat([*old, rows]) if old else rows, [*kept, len(rows)])

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, as nested dictionaries of tensors, and the sizes of the refills."""
        return {"rows": {} if self.rows is None else self.rows.to_dict(), "sizes": [*self.sizes]}

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        needed: Collection[NestedKey],
        device: torch.device | None,
    ) -> None:
        """Restore what :meth:`state_dict` returned; an error changes nothing.

        Args:
            state_dict: the state.
            needed: entries that rows must have.
            device: to put the rows on.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if there are more refills than ``retain``, or there are not as many rows as
                the sizes say.
        """
        rows, sizes = state_dict["rows"], [int(size) for size in state_dict["sizes"]]
        if len(sizes) > self.retain:
            raise ValueError(
                f"state_dict: it has the rows of {len(sizes)} refills, but retain={self.retain}."
            )
        if not sizes:
            self._hold(None, [])
            return
        try:
            loaded = TensorDict(dict(rows), batch_size=[sum(sizes)])
        except RuntimeError as error:
            raise ValueError(
                f"state_dict: expected {sum(sizes)} rows, the sum of its sizes. {error}"
            ) from error
        missing = [key for key in needed if loaded.get(key, None) is None]
        if missing:
            raise KeyError(f"state_dict: its rows have no {missing}.")
        self._hold(loaded.to(device).clone(), sizes)

    def _hold(self, rows: TensorDictBase | None, sizes: list[int]) -> None:
        storage = LazyTensorStorage(1) if rows is None else TensorStorage(rows)
        storage.attach(self.buffer)
        self.buffer.set_storage(storage)
        self.rows, self.sizes = rows, sizes
