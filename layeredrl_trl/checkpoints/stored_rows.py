"""Checkpoints of a replay buffer whose cost does not grow with the buffer."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torchrl.checkpoint import CheckpointAdapter, CheckpointError
from torchrl.data import ReplayBuffer

from layeredrl_trl.checkpoints.buffer_state import (
    BufferIndex,
    RestorePoint,
    check_buffer,
    put_state,
    read_state,
    state_of,
    write_state,
)
from layeredrl_trl.checkpoints.row_files import RowFiles, sha256_of
from layeredrl_trl.checkpoints.row_layout import RowLayout
from layeredrl_trl.checkpoints.written_rows import WrittenRows
from layeredrl_trl.checks import check_count
from layeredrl_trl.data.reading import locked

INDEX = "index.json"
CHUNKS = "chunks"
_CHUNK_BYTES = 2**21
_LEAST_ROWS, _MOST_ROWS = 2**4, 2**14


class StoredRows(CheckpointAdapter):
    """Save a replay buffer into checkpoints, each time only the rows written since the last one.

    The rows lie in chunks of a fixed number of rows, one immutable file each. A checkpoint holds
    hard links to all of them (copies, where the file system has no links), so each checkpoint is
    complete and any may be removed. ``folder`` holds links to the chunks of the latest save, by
    which the adapter finds those that it need not write again, also after a resume. A chunk file
    that somebody removed or touched is written anew. Only chunks with new rows are written: as a
    save begins and ends in mid-chunk, up to two chunks more than the new rows fill.

    Saved are the rows, cursor, write count, length, the state of sampler and transforms, and the
    state of the buffer's generator. After a load the buffer behaves bit for bit as the saved one.
    Rows are copied under the buffer's locks and written after that: a collector may go on writing
    meanwhile. The first save needs memory for all rows once more, later ones for the new rows.

    ``buffer.update_``, ``set_``, ``set_at_``, ``write_all``, ``buffer[i] = row`` and ``empty()``
    are noticed: the next save compares all chunks, and writes those that differ. Writing into
    tensors that the storage gave out (``buffer[:10]["reward"].zero_()``, ``buffer["reward"] = x``)
    is not: call :meth:`forget` after it. Priorities belong to the sampler, not to the rows.

    An adapter is for one buffer, and a folder for one adapter at a time.

    Args:
        folder: keeps the current chunks; on the file system of the checkpoints, so that links
            work. Files in it that are not chunks stay.
        chunk_rows: rows of a chunk. None: the power of two that gives chunks of 1 to 2 MiB,
            within [16, 16384].
        like: rows ``[N, ...]`` whose entries, dtypes and shapes a checkpoint must have to be
            loaded. None: a buffer that was written to decides, any other takes what there is.

    Raises:
        TypeError: when saving or loading, before anything is written: the buffer prefetches, its
            storage keeps no TensorDict as tensors, its writer is not a ``RoundRobinWriter``, or
            its sampler has a state that is not plain (prioritised samplers).
        CheckpointError: when loading: a file is missing or damaged, the entries differ, or the
            capacity does. A larger capacity than the saved one is accepted as long as the saved
            buffer had not begun to overwrite rows. The buffer is unchanged then.
        OSError: when saving: the disk is full. The folder is as before then.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.checkpoint import Checkpoint
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> def new():
        ...     return ReplayBuffer(storage=LazyTensorStorage(100), batch_size=4)
        >>> buffer, other = new(), new()
        >>> rows = TensorDict({"observation": torch.rand(50, 3)}, batch_size=[50])
        >>> _ = buffer.extend(rows)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     save = Checkpoint().register("buffer", buffer, adapter=StoredRows(f"{run}/rows"))
        ...     load = Checkpoint().register("buffer", other, adapter=StoredRows(f"{run}/rows"))
        ...     _ = load.load(save.save(f"{run}/checkpoint"))
        >>> bool((other[:] == buffer[:]).all()), len(other)
        (True, 50)
    """

    adapter_id = "layeredrl_trl.stored_rows"
    format_version = 1

    def __init__(
        self,
        folder: str | Path,
        *,
        chunk_rows: int | None = None,
        like: TensorDictBase | None = None,
    ) -> None:
        if chunk_rows is not None:
            check_count("chunk_rows", chunk_rows)
        self.folder = Path(folder).expanduser().absolute()
        self._given_rows = chunk_rows
        self._like = None if like is None else RowLayout.of(like)
        self._files = RowFiles(self.folder)
        self._chunks: dict[int, tuple[str, int]] = {}  # digest and rows, of those on the disk
        self._written: dict[int, str] | None = None  # by a save that has not ended
        self._compare_all = False
        self._layout: RowLayout | None = None
        self._watch: WrittenRows | None = None
        self._storage: Callable[[], Any] = _nothing
        self._point: Callable[[], RestorePoint | None] = _nothing

    def forget(self) -> None:
        """Have the next save compare all chunks, as if any row might have changed."""
        self._compare_all = True

    @property
    def known_digests(self) -> dict[str, str]:
        """The sha256 of files that the last save put into the checkpoint, by their path there."""
        return {_chunk_name(digest): digest for digest, _ in self._chunks.values()}

    def save(
        self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Write the rows that are new, and link all chunks below ``path``.

        Args:
            component: the replay buffer.
            path: folder of the component within the checkpoint.
            args: must be empty.
            kwargs: must be empty.
        """
        if args or kwargs:
            raise TypeError(f"StoredRows takes no options to save, got {args} and {dict(kwargs)}.")
        buffer = check_buffer(component)
        self.end_save(kept=True)  # of a checkpoint that does not tell
        with locked(buffer):
            storage, writer = buffer.storage, buffer.writer
            state = copy.deepcopy(state_of(buffer))
            layout = RowLayout.of(storage._storage) if storage.initialized else None
            chunk_rows = self._prepare(buffer, layout)
            index = BufferIndex.of(buffer, layout, chunk_rows)
            spans = dict(enumerate(index.spans()))
            self._chunks = {
                number: (digest, count)
                for number, (digest, count) in self._chunks.items()
                if number in spans
                and count == spans[number][1] - spans[number][0]
                and self._files.holds(digest)
            }
            packed = {
                number: layout.pack(storage._storage, *span)
                for number, span in spans.items()
                if layout is not None and number not in self._chunks
            }
            self._watch.reset(storage, writer)
        write_state(state, path)
        self._files.sweep(self._files.known)
        self._written = {}
        try:
            for number in sorted(packed):
                data = packed.pop(number)
                digest, new = self._files.add(data)
                if new:
                    self._written[number] = digest
                low, high = spans[number]
                self._chunks[number] = (digest, high - low)
            index.chunks = [self._chunks[number][0] for number in spans]
            (path / CHUNKS).mkdir(parents=True)
            for digest in dict.fromkeys(index.chunks):
                self._files.link(digest, path / _chunk_name(digest))
            with (path / INDEX).open("x", encoding="utf-8") as file:
                json.dump(index.to_json(), file, separators=(",", ":"))
        except BaseException:
            self.end_save(kept=False)
            raise

    def end_save(self, *, kept: bool) -> None:
        """Clear the folder after a save: of older chunks, or of new ones if it came to nothing.

        :class:`WholeCheckpoint` calls it; with TorchRL's
        ``Checkpoint`` the next save does.

        Args:
            kept: whether there is a checkpoint now that holds what was saved.
        """
        if self._written is None:
            return
        if kept:
            self._files.sweep({digest for digest, _ in self._chunks.values()})
        else:
            self._files.discard(set(self._written.values()))
            for number in self._written:
                self._chunks.pop(number, None)
        self._written = None

    def load(
        self,
        component: Any,
        path: Path,
        *,
        map_location: Any,
        tensor_load_kwargs: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Check all files below ``path`` and what they hold, then put it into the buffer.

        Args:
            component: the replay buffer.
            path: folder of the component within the checkpoint.
            map_location: ignored, rows go to the device of the storage.
            tensor_load_kwargs: ignored.
            args: must be empty.
            kwargs: must be empty.
        """
        del map_location, tensor_load_kwargs
        if args or kwargs:
            raise TypeError(f"StoredRows takes no options to load, got {args} and {dict(kwargs)}.")
        buffer = check_buffer(component)
        index = BufferIndex.read(path / INDEX)
        state = read_state(path)
        _check_files(index, path)
        with locked(buffer):
            index.check_fits(buffer, self._like)
            point = self._point() or RestorePoint(buffer, self._recall())
            try:
                index.put_frame(buffer)
                for (low, high), digest in zip(index.spans(), index.chunks, strict=True):
                    file = path / _chunk_name(digest)
                    index.put_rows(buffer, low, high, file, digest)
                index.put_length(buffer)
                put_state(buffer, state)
                index.put_cursor(buffer)
                self._know(buffer, index, path)
            except BaseException:
                point.put_back()
                raise

    def restore_point(self, component: Any) -> RestorePoint:
        """Give an object whose ``restore()`` gives the buffer the state that it has now."""
        buffer = check_buffer(component)
        with locked(buffer):
            point = RestorePoint(buffer, self._recall())
        self._point = weakref.ref(point)
        return point

    def _prepare(self, buffer: ReplayBuffer, layout: RowLayout | None) -> int:
        """Drop the chunks that the buffer has outgrown; give the number of rows of a chunk."""
        storage, watch = buffer.storage, self._watch
        known = watch is not None and self._storage() is storage and layout == self._layout
        compare_all, self._compare_all = self._compare_all or not known, False
        changed = None if compare_all else watch.chunks(storage, buffer.writer)
        if changed is None:
            self._chunks.clear()
        else:
            for number in changed:
                self._chunks.pop(number, None)
        if not known:
            watch = self._attach(buffer, layout, self._rows_of_a_chunk(layout))
        return watch.chunk_rows

    def _attach(
        self, buffer: ReplayBuffer, layout: RowLayout | None, chunk_rows: int
    ) -> WrittenRows:
        """Watch a buffer from now on, and no other."""
        self._detach()
        self._storage, self._layout = weakref.ref(buffer.storage), layout
        self._watch = WrittenRows(buffer.storage, buffer.writer, chunk_rows)
        return self._watch

    def _detach(self) -> None:
        storage = self._storage()
        if storage is not None and self._watch is not None:
            self._watch.detach(storage)
        self._watch = None
        self._storage = _nothing

    def _rows_of_a_chunk(self, layout: RowLayout | None) -> int:
        if self._given_rows is not None:
            return self._given_rows
        row_bytes = 1 if layout is None else max(layout.row_bytes, 1)
        fitting = max(_CHUNK_BYTES // row_bytes, 1)
        return min(max(2 ** (fitting.bit_length() - 1), _LEAST_ROWS), _MOST_ROWS)

    def _know(self, buffer: ReplayBuffer, index: BufferIndex, path: Path) -> None:
        """Remember which chunks lie on the disk after a load."""
        self._attach(buffer, index.layout, index.chunk_rows)
        self._chunks = {
            number: (digest, high - low)
            for number, ((low, high), digest) in enumerate(
                zip(index.spans(), index.chunks, strict=True)
            )
            if self._files.adopt(digest, path / _chunk_name(digest))
        }

    def _recall(self) -> Callable[[], None]:
        """Give a function that makes this adapter know what it knows now."""
        chunks = dict(self._chunks)

        def recall() -> None:
            self._detach()  # what was written meanwhile is unknown: the next save compares all
            self._chunks = chunks

        return recall


def _nothing() -> None:
    """Stand for a weak reference to nothing."""


def _chunk_name(digest: str) -> str:
    return f"{CHUNKS}/{digest}.rows"


def _check_files(index: BufferIndex, path: Path) -> None:
    """Check that all chunks are there, whole and unchanged, and nothing else is."""
    names = {f"{digest}.rows" for digest in index.chunks}
    folder = path / CHUNKS
    found = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if names != found:
        raise CheckpointError(
            f"{len(names - found)} chunks of rows are missing and {len(found - names)} are surplus."
        )
    seen: set[str] = set()
    for (low, high), digest in zip(index.spans(), index.chunks, strict=True):
        file = folder / f"{digest}.rows"
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"the chunk of rows {file.name} is no file.")
        if file.stat().st_size != (high - low) * index.layout.row_bytes:
            raise CheckpointError(f"the chunk of rows {file.name} has another size.")
        if digest not in seen and sha256_of(file) != digest:
            raise CheckpointError(f"the chunk of rows {file.name} is damaged.")
        seen.add(digest)
