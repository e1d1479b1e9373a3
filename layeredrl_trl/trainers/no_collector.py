"""What a trainer iterates over when it learns from data that are there already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict, TensorDictBase

from layeredrl_trl.checks import check_count, check_counts


class NoCollector:
    """Stand in for a collector: count frames without collecting any.

    Args:
        total_frames: frames in all.
        frames_per_batch: frames that a trainer counts, and so optimisation steps that it takes,
            between two calls of its hooks.
    """

    init_random_frames = 0
    replay_buffer = None

    def __init__(self, total_frames: int, frames_per_batch: int = 100) -> None:
        check_counts(total_frames=total_frames, frames_per_batch=frames_per_batch)
        self.total_frames = total_frames
        self.frames_per_batch = frames_per_batch
        self.frames = 0

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Yield batches without entries."""
        while self.frames < self.total_frames:
            n = min(self.frames_per_batch, self.total_frames - self.frames)
            self.frames += n
            yield TensorDict(batch_size=[n])

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Return the seed, as there is no env."""
        return seed

    def shutdown(self, *_: Any, **__: Any) -> None:
        """Do nothing: nothing runs."""

    def state_dict(self) -> dict[str, Any]:
        """Return the number of frames."""
        return {"frames": self.frames}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_count("collector: frames", state_dict["frames"], least=0)
        self.frames = state_dict["frames"]
