"""Small replay buffers to save, and an oracle: all of a buffer's state by ``torch.save``."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.checkpoint import Checkpoint
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from layeredrl_trl.checkpoints.row_files import RowFiles
from layeredrl_trl.checkpoints.stored_rows import StoredRows
from layeredrl_trl.data import TransitionSliceSampler

CAPACITY = 40


def transitions(n: int, seed: int = 0, lanes: tuple[int, ...] = ()) -> TensorDict:
    """Rows ``[n]``, or ``[lanes, n]`` as a collector of several envs gives them."""
    generator = torch.Generator().manual_seed(seed)
    size = (*lanes, n)
    done = torch.rand(*size, 1, generator=generator) > 0.8
    return TensorDict(
        {
            "observation": torch.rand(*size, 3, generator=generator),
            "half": torch.rand(*size, 2, generator=generator).bfloat16(),
            "step": torch.randint(99, size, generator=generator),
            "next": {
                "done": done,
                "deep": {"flag": torch.rand(*size, 5, generator=generator) > 0.5},
            },
        },
        batch_size=size,
    )


def make_buffer(
    storage: Any = None, *, plain: bool = False, seed: int | None = 1, **options
) -> ReplayBuffer:
    """A buffer that samples slices by a generator of its own."""
    return (ReplayBuffer if plain else TensorDictReplayBuffer)(
        storage=LazyTensorStorage(CAPACITY) if storage is None else storage,
        sampler=TransitionSliceSampler(slice_len=2),
        batch_size=8,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        **options,
    )


def checkpoint_of(buffer: ReplayBuffer, run: Path, *, chunk_rows: int = 8, **options) -> Checkpoint:
    adapter = StoredRows(run / "rows", chunk_rows=chunk_rows, **options)
    return Checkpoint().register("buffer", buffer, adapter=adapter)


def whole_state(buffer: ReplayBuffer) -> dict[str, Any]:
    """The oracle: everything that the buffer holds, through ``torch.save``."""
    storage = buffer.storage
    rows = storage._storage[: storage._len_along_dim0] if len(storage) else None
    state = {
        "rows": None if rows is None else rows.clone().to_dict(),
        "length": len(storage),
        "last": storage._last_cursor_index,
        "writer": buffer.writer.state_dict(),
        "sampler": buffer.sampler.state_dict(),
        "generator": None if buffer._rng is None else buffer._rng.get_state(),
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Bit for bit, dtypes included."""
    if isinstance(one, Mapping):
        assert set(one) == set(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, where
        flat = (x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other))
        assert torch.equal(*flat), where
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (item, its_twin) in enumerate(zip(one, other, strict=True)):
            assert_equal(item, its_twin, f"{where}/{number}")
    else:
        assert one == other, where


def files_in(folder: Path) -> dict[str, int]:
    """Inode of every file in a folder, by its path there."""
    return {
        str(file.relative_to(folder)): file.stat().st_ino
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def record_written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give a list that gets the digest of every chunk written to the disk from now on."""
    digests: list[str] = []
    name = RowFiles._name

    def recorded(self: RowFiles, partial: Path, digest: str) -> None:
        if partial.stat().st_nlink == 1:  # not a link to a chunk of a checkpoint
            digests.append(digest)
        name(self, partial, digest)

    monkeypatch.setattr(RowFiles, "_name", recorded)
    return digests
