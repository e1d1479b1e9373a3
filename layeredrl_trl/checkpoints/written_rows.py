"""Which rows of a storage were written since somebody last looked."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import RoundRobinWriter, TensorStorage


class WrittenRows:
    """Watch the writers of a storage, and notice what bypasses them.

    A writer tells everybody attached to its storage which rows it wrote (``mark_update``). Beside
    that, a storage counts every change of its content, and a writer every row. Where those counts
    exceed what was told, somebody else wrote: a writer in another process, whose rows are those
    before the cursor, or ``buffer.update_``, ``set_``, ``set_at_``, ``buffer[...] = `` and
    ``empty()``, after which any row may have changed.

    What nobody counts is not noticed: writing into a tensor that ``buffer[:10]`` or the storage
    gave out, ``buffer["key"] = value``, and in another process an in-place change that coincides
    with rows written there.

    Args:
        storage: is watched from now on.
        writer: its writer.
        chunk_rows: rows of a chunk.
    """

    def __init__(self, storage: TensorStorage, writer: RoundRobinWriter, chunk_rows: int) -> None:
        self.chunk_rows = chunk_rows
        self._ndim = storage.ndim
        self.reset(storage, writer)
        storage.attach(self)

    def mark_update(self, index: int | Tensor) -> None:
        """Take note of rows that were written; writers call this."""
        rows = torch.as_tensor(index)
        if self._ndim > 1 and rows.ndim:
            rows = rows[..., 0]
        self._changes += 1
        self._positions += rows.numel()
        self._chunks.update((rows.reshape(-1) // self.chunk_rows).unique().tolist())

    def detach(self, storage: TensorStorage) -> None:
        """Watch no longer."""
        attached = storage._attached_entities
        attached[:] = [entity for entity in attached if entity is not self]

    def reset(self, storage: TensorStorage, writer: RoundRobinWriter) -> None:
        """Forget what was written until now."""
        self._revision, self._count = int(storage._mutation_revision), int(writer._write_count)
        self._changes = 0
        self._positions = 0
        self._chunks: set[int] = set()

    def chunks(self, storage: TensorStorage, writer: RoundRobinWriter) -> set[int] | None:
        """Give the chunks with rows that may have changed; None means all of them."""
        lanes = 1
        for size in (storage._total_shape or (0,))[1:]:
            lanes *= size
        count = int(writer._write_count) - self._count
        changes = int(storage._mutation_revision) - self._revision - self._changes
        rows = count - self._positions // max(lanes, 1)
        if rows < 0 or not 0 <= changes <= rows:
            return None
        if rows == 0:
            return set(self._chunks)
        total = (storage._total_shape or (0,))[0]
        if count >= total:
            return None
        before = (int(writer._cursor) - 1 - torch.arange(count)) % total
        return self._chunks | set((before // self.chunk_rows).unique().tolist())
