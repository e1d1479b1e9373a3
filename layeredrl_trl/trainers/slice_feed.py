"""Between a trainer's collector and its optimisation steps: the replay buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import NestedKey, TensorDictBase
from torchrl.data import TensorDictReplayBuffer
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import TrainerHookBase

from layeredrl_trl import keys
from layeredrl_trl.checks import check_count
from layeredrl_trl.data import TransitionSliceSampler, check_buffer


class SliceFeed(TrainerHookBase):
    """Store what a trainer collects, and draw slices for each optimisation step.

    Batches ``[T]`` of one env are stored one after the other. Batches ``[N, T]`` go into a storage
    of two dims as they are, a column for each env. A storage of one dim takes one env after the
    other: trajectory ids tell them apart, and slices end with the batch. Padding (``("collector",
    "mask")``) is left out. A batch without entries is not stored: it comes from no collector.

    Args:
        replay_buffer: is extended and sampled, with a ``TransitionSliceSampler(slice_len=...)``.
        num_slices: slices in a sample.
        stored_keys: entries to store, if they are there; ``None``: all.
        has_gaps: whether a batch may not go on where the one before it ended, because the collector
            drops batches that it cannot hand over in time (``MultiAsyncCollector``). Slices then
            end with the batch: its last step is stored as truncated.

    Raises:
        TypeError: if learning cannot draw slices of the buffer, or ``num_slices`` is no integer.
        ValueError: if ``num_slices`` is below 1, or the sampler draws no slices of a fixed length.
    """

    def __init__(
        self,
        replay_buffer: TensorDictReplayBuffer,
        num_slices: int,
        stored_keys: Sequence[NestedKey] | None = None,
        *,
        has_gaps: bool = False,
    ) -> None:
        check_buffer(replay_buffer)
        check_count("num_slices", num_slices)
        sampler = replay_buffer.sampler
        if not isinstance(sampler, TransitionSliceSampler) or sampler.slice_len is None:
            raise ValueError(
                "replay_buffer: expected a buffer with TransitionSliceSampler(slice_len=...) as "
                f"its sampler, got {type(sampler).__name__}."
            )
        self.replay_buffer = replay_buffer
        self.num_slices = num_slices
        self.stored_keys = None if stored_keys is None else [*stored_keys]
        self.has_gaps = has_gaps

    def extend(self, batch: TensorDictBase) -> None:
        """Store a collected batch."""
        rows = self._rows(batch)
        if rows.numel() and not rows.is_empty():
            self.replay_buffer.extend(rows)

    def sample(self, batch: TensorDictBase | None = None) -> TensorDictBase:
        """Draw slices, flat ``[num_slices * T]``."""
        return self.replay_buffer.sample(self.num_slices * self.replay_buffer.sampler.slice_len)

    def _rows(self, batch: TensorDictBase) -> TensorDictBase:
        """Bring a batch into the shape in which the storage takes it."""
        mask = batch.get(keys.MASK, None)
        if self.has_gaps:
            batch = _ended(batch)
        if self.stored_keys is not None:
            batch = batch.select(*self.stored_keys, strict=False)
        if mask is not None:
            return batch[mask.reshape(batch.batch_size)]
        if self.replay_buffer.storage.ndim == 1:
            return batch.reshape(-1)
        return batch.flatten(0, -2) if batch.ndim > 2 else batch

    def register(self, trainer: Trainer, name: str = "replay_buffer") -> None:
        """Register at the stages ``"batch_process"`` and ``"process_optim_batch"``."""
        trainer.register_op("batch_process", self.extend)
        trainer.register_op("process_optim_batch", self.sample)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the buffer is a part of its own of a checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""


def _ended(batch: TensorDictBase) -> TensorDictBase:
    """Return a batch ``[..., T]`` whose last steps are done, truncated unless they were done."""
    batch, last = batch.copy(), batch.ndim - 1
    done = batch.get(keys.NEXT_DONE)
    for key in (keys.NEXT_TRUNCATED, keys.NEXT_DONE):
        flags = batch.get(key, None)
        if flags is not None:
            flags = flags.clone()
            end = flags.select(last, -1)
            end |= ~done.select(last, -1)
            batch.set(key, flags)
    return batch
