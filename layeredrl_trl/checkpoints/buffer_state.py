"""The state of a replay buffer: what stays outside of its rows, and how a load puts both back."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.checkpoint import CheckpointError
from torchrl.data import ReplayBuffer, RoundRobinWriter, TensorStorage

from layeredrl_trl.checkpoints.row_layout import RowLayout
from layeredrl_trl.checkpoints.state_file import StateFile
from layeredrl_trl.data.reading import locked

STATE = "state"
_FORMAT = "layeredrl_trl.rows/1"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_COUNTS = ("ndim", "chunk_rows", "capacity", "rows", "length", "cursor", "write_count")


def check_buffer(buffer: Any) -> ReplayBuffer:
    """Check that a component is a replay buffer whose rows can be stored by chunks.

    Raises:
        TypeError: if it is not; says why.
    """
    if not isinstance(buffer, ReplayBuffer):
        raise TypeError(f"StoredRows: expected a ReplayBuffer, got {type(buffer).__name__}.")
    storage, writer = buffer.storage, buffer.writer
    if not isinstance(storage, TensorStorage):
        raise TypeError(
            "StoredRows needs a storage that keeps TensorDicts as tensors (LazyTensorStorage, "
            f"LazyMemmapStorage, TensorStorage), got {type(storage).__name__}."
        )
    if not isinstance(writer, RoundRobinWriter):
        raise TypeError(
            "StoredRows needs a writer that fills the storage in a ring (RoundRobinWriter, "
            f"TensorDictRoundRobinWriter), got {type(writer).__name__}."
        )
    if storage.initialized:
        RowLayout.of(storage._storage)
    if buffer._prefetch:
        raise TypeError(
            "StoredRows: the buffer prefetches, so batches that are drawn already would be lost. "
            "Build it without prefetch."
        )
    return buffer


def state_of(buffer: ReplayBuffer) -> dict[str, Any]:
    """Give the state of everything but the rows; its tensors may be the live ones."""
    generator = buffer._rng
    return {
        "sampler": buffer.sampler.state_dict(),
        "writer": buffer.writer.state_dict(),
        "transforms": buffer.transform.state_dict(),
        "batch_size": buffer._batch_size,
        "consume_after_n_samples": buffer._consume_after_n_samples,
        "generator": None
        if generator is None
        else {"state": generator.get_state(), "device": str(generator.device)},
    }


def put_state(buffer: ReplayBuffer, state: Mapping[str, Any]) -> None:
    """Give a buffer what :func:`state_of` gave."""
    generator = state["generator"]
    if generator is None and buffer._rng is not None:
        raise CheckpointError("the buffer has a generator of its own, the saved one had none.")
    buffer.sampler.load_state_dict(state["sampler"])
    buffer.writer.load_state_dict(state["writer"])
    buffer.transform.load_state_dict(state["transforms"])
    buffer._batch_size = state["batch_size"]
    buffer._consume_after_n_samples = state["consume_after_n_samples"]
    if generator is not None:
        if buffer._rng is None:
            buffer.set_rng(torch.Generator(device=generator["device"]))
        buffer._rng.set_state(generator["state"].cpu())


class _Held:
    """Something with a state, as TorchRL's adapter wants it."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def write_state(state: dict[str, Any], path: Path) -> None:
    """Write what :func:`state_of` gave into a folder of a checkpoint.

    Raises:
        TypeError: if some state is not made of tensors and plain values.
    """
    try:
        StateFile().save(_Held(state), path / STATE, args=(), kwargs={})
    except TypeError as error:
        raise TypeError(
            "StoredRows: the state of the buffer's sampler or transforms is not made of tensors "
            f"and plain values, as that of prioritised samplers is not: {error}"
        ) from error


def read_state(path: Path) -> dict[str, Any]:
    """Read what :func:`write_state` wrote, and nothing that would have to be unpickled."""
    held = _Held()
    names = sorted(os.listdir(path / STATE))
    if names != ["state.json", "state.tdc"]:
        raise CheckpointError(f"the state of the buffer has other files than it should: {names}.")
    StateFile().load(
        held, path / STATE, map_location=None, tensor_load_kwargs={}, args=(), kwargs={}
    )
    expected = {"sampler", "writer", "transforms", "batch_size", "generator"}
    if not isinstance(held.state, Mapping) or expected - held.state.keys():
        raise CheckpointError("the state of the buffer lacks entries.")
    return dict(held.state)


@dataclass
class BufferIndex:
    """What a checkpoint says about the rows of a buffer.

    Attributes:
        layout: of a row; None if the buffer was never written to.
        ndim: of the storage.
        chunk_rows: rows of a chunk; the last one may hold fewer.
        capacity: rows of the full storage along its first dim; without a layout its ``max_size``.
        rows: stored rows along the first dim.
        length: ``len`` of the storage, lanes counted.
        cursor: next row to be written.
        write_count: rows written in all.
        last_cursor: row written last, None before that.
        chunks: sha256 of every chunk.
    """

    layout: RowLayout | None
    ndim: int
    chunk_rows: int
    capacity: int
    rows: int
    length: int
    cursor: int
    write_count: int
    last_cursor: int | None
    chunks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, buffer: ReplayBuffer, layout: RowLayout | None, chunk_rows: int) -> BufferIndex:
        """Describe a buffer; the chunks are added later."""
        storage, last = buffer.storage, buffer.storage._last_cursor_index
        return cls(
            layout=layout,
            ndim=storage.ndim,
            chunk_rows=chunk_rows,
            capacity=_capacity(storage, layout),
            rows=0 if layout is None else int(storage._len_along_dim0),
            length=int(storage._len),
            cursor=int(buffer.writer._cursor),
            write_count=int(buffer.writer._write_count),
            last_cursor=None if last is None else int(last),
        )

    @classmethod
    def read(cls, file: Path) -> BufferIndex:
        """Read a file that holds :meth:`to_json`.

        Raises:
            CheckpointError: if it cannot be read, or its numbers contradict each other.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("format") != _FORMAT:
                raise ValueError("it is of another format")
            layout = content.pop("layout")
            index = cls(layout=None if layout is None else RowLayout.from_json(layout), **content)
            index._check()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file.name} of the rows cannot be read: {error}") from error
        return index

    def to_json(self) -> dict[str, Any]:
        """Give plain values that describe all attributes."""
        layout = None if self.layout is None else self.layout.to_json()
        return {"format": _FORMAT, **vars(self), "layout": layout}

    def spans(self) -> Iterator[tuple[int, int]]:
        """Give first row and last row plus one of every chunk."""
        for low in range(0, self.rows, self.chunk_rows):
            yield low, min(low + self.chunk_rows, self.rows)

    def check_fits(self, buffer: ReplayBuffer, like: RowLayout | None) -> None:
        """Check that a buffer can take the rows.

        Raises:
            CheckpointError: if its entries or its capacity differ.
        """
        storage = buffer.storage
        if storage.ndim != self.ndim:
            raise CheckpointError(f"its storage has ndim {self.ndim}, this one {storage.ndim}.")
        if self.layout is not None:
            live = RowLayout.of(storage._storage) if storage.initialized else None
            for what, other in (("this buffer", live), ("the rows of `like`", like)):
                if other is not None and (text := self.layout.difference(other)):
                    raise CheckpointError(f"its rows differ from those of {what}: {text}.")
        capacity = _capacity(storage, self.layout)
        exactly_full = self.rows == self.capacity and self.write_count == self.rows
        may_grow = self.rows < self.capacity or exactly_full
        if capacity != self.capacity and not (capacity > self.capacity and may_grow):
            raise CheckpointError(
                f"its storage holds {self.capacity} rows"
                f"{'' if may_grow else ', the oldest of them overwritten,'} and this one {capacity}"
                "; only a larger one may take the rows, and only before they are overwritten."
            )

    def put_frame(self, buffer: ReplayBuffer) -> None:
        """Have the storage make room, if it was never written to."""
        if self.layout is not None and not buffer.storage.initialized:
            buffer.storage._init(self.layout.empty_row())

    def put_rows(self, buffer: ReplayBuffer, low: int, high: int, file: Path, digest: str) -> None:
        """Read a chunk, check it once more, and put its rows into the storage.

        Raises:
            CheckpointError: if the file changed since it was checked.
        """
        data = torch.empty((high - low) * self.layout.row_bytes, dtype=torch.uint8)
        view = memoryview(data.numpy())
        with file.open("rb") as stream:
            whole = stream.readinto(view) == len(view) and not stream.read(1)
        if not whole or hashlib.sha256(view).hexdigest() != digest:
            raise CheckpointError(f"the chunk of rows {file.name} is damaged.")
        rows = buffer.storage._storage
        for key, value in self.layout.unpack(data, high - low):
            rows.get(key)[low:high].copy_(value)

    def put_length(self, buffer: ReplayBuffer) -> None:
        """Tell the storage how many rows it holds, and which one was written last."""
        storage = buffer.storage
        _ = storage._total_shape  # asking for it the first time sets the length
        storage._len = self.length
        storage._set_last_cursor(self.last_cursor)
        storage._bump_mutation_revision()

    def put_cursor(self, buffer: ReplayBuffer) -> None:
        """Move the cursor behind the rows, where a larger storage goes on instead of wrapping."""
        capacity = _capacity(buffer.storage, self.layout)
        if self.cursor == 0 and self.rows == self.capacity < capacity:
            buffer.writer._cursor = self.rows

    def _check(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < (name in ("ndim", "chunk_rows", "capacity")):
                raise ValueError(f"{name} is {value!r}")
        lanes = self.layout.nodes[0][1][: self.ndim - 1] if self.layout is not None else ()
        last = self.last_cursor
        consistent = (
            isinstance(self.chunks, list)
            and all(isinstance(x, str) and _DIGEST.fullmatch(x) for x in self.chunks)
            and len(self.chunks) == -(-self.rows // self.chunk_rows)
            and (self.layout is not None or self.rows == self.length == 0)
            and (self.layout is None or len(lanes) == self.ndim - 1)
            and self.rows <= self.capacity
            and self.rows * math.prod(lanes) == self.length
            and (self.layout is None or self.cursor < self.capacity)
            and (last is None or (type(last) is int and 0 <= last < self.capacity))
        )
        if not consistent:
            raise ValueError("its numbers contradict each other")


class RestorePoint:
    """The state of a buffer at one moment, to return to.

    Args:
        buffer: its stored rows are copied.
        recall: is called too when the buffer gets its state back.
    """

    def __init__(self, buffer: ReplayBuffer, recall: Callable[[], None]) -> None:
        storage = buffer.storage
        self._buffer, self._recall = buffer, recall
        self._state = _copied(state_of(buffer))
        self._initialized, self._max_size = storage.initialized, storage.max_size
        self._length, self._last = storage._len, storage._last_cursor
        self._generator = buffer._rng
        rows = storage._len_along_dim0 if storage.initialized else 0
        self._rows = storage._storage[:rows].clone() if rows else None

    def restore(self) -> None:
        """Give the buffer its state back."""
        with locked(self._buffer):
            self.put_back()

    def put_back(self) -> None:
        """Give the buffer its state back; whoever calls holds its locks."""
        buffer, storage = self._buffer, self._buffer.storage
        if not self._initialized and storage.initialized:
            self._release(storage)
        elif self._rows is not None:
            storage._storage[: self._rows.shape[0]].copy_(self._rows)
        storage._len = self._length
        storage._set_last_cursor(self._last)
        storage._bump_mutation_revision()
        if buffer._rng is not self._generator:
            buffer.set_rng(self._generator)
        put_state(buffer, self._state)
        self._recall()

    def _release(self, storage: TensorStorage) -> None:
        """Make a storage again one that was never written to."""
        for leaf in storage._storage.values(True, True):
            if (name := getattr(leaf, "filename", None)) is not None:
                Path(name).unlink(missing_ok=True)
        storage._storage, storage.initialized = None, False
        storage.max_size = self._max_size
        storage.__dict__["_total_shape_value"] = None
        storage._storage_keys = None


def _capacity(storage: TensorStorage, layout: RowLayout | None) -> int:
    """Give the rows of a full storage along its first dim; one without rows says its size."""
    if layout is None:
        return int(storage.max_size)
    if storage.initialized:
        return int(storage._total_shape[0])
    lanes = layout.nodes[0][1][: storage.ndim - 1]
    return -(-int(storage.max_size) // max(math.prod(lanes), 1))


def _copied(value: Any) -> Any:
    """Copy nested plain values and the tensors in them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
