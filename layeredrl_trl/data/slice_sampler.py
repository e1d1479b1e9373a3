"""Slices of consecutive transitions with uniform starts.

TorchRL's ``SliceSampler`` lists all trajectories of the storage and draws among them, which costs
O(size of the buffer) per batch and favours short episodes. Here a start is drawn among all stored
transitions, and only the boundary flags of the steps in the drawn windows are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, is_tensor_collection, unravel_key
from torch import Tensor
from torchrl.data import SliceSampler, TensorStorage
from torchrl.data.replay_buffers.storages import Storage

from layeredrl_trl.checks import check_count, check_key, check_keys
from layeredrl_trl.data.boundaries import Columns, check_writers, read_flags, walk
from layeredrl_trl.data.positions import flat_position, leaf_keys
from layeredrl_trl.keys import IS_INIT, MASK, NEXT_DONE, NEXT_TERMINATED, NEXT_TRUNCATED, TRAJ_IDS
from layeredrl_trl.signatures import OwnSignature

DEFAULT_END_KEYS = (NEXT_DONE, NEXT_TERMINATED, NEXT_TRUNCATED)
DEFAULT_TRAJ_KEYS = (TRAJ_IDS, "episode")
# A start that falls on stored padding is drawn again, at most so often: with half of the storage
# being padding one slice in 65536 still starts on it.
_DRAWS_PER_START = 16


class TransitionSliceSampler(SliceSampler):
    """Sample slices of consecutive transitions whose starts are uniform over the stored ones.

    A batch of ``B`` slices of ``T`` steps is the flat batch ``[B * T]`` of TorchRL's convention,
    slice after slice; ``batch.reshape(B, T)`` gives it time as its last batch dim. It is always
    rectangular and always has ``("collector", "mask")``.

    Between two consecutive rows of the storage there is a boundary if the first has an end flag
    (``end_keys``), if the trajectory id changes (``traj_key``), if the second is an episode's
    first step (``init_key``), and behind the last row written. No slice crosses a boundary, nor
    from one env's row into another's (storage ``ndim`` 2: time first, then envs). In a storage of
    one dim that holds the steps of several envs one after the other, only a trajectory id tells
    where an env's steps stop: have it stored, as TorchRL's collectors do. The same holds for data
    from which rows were removed: without an id that changes there, the rows around the gap are
    taken for consecutive steps. And for stretches that end in mid-episode: two
    ``buffer.extend(env.rollout(50))`` without an end in between, or a second collector, whose ids
    begin at 0 again. Have their ends marked (``Collector(..., set_truncated=True)``), their
    beginnings (TorchRL's ``InitTracker``), or use one collector for all, its random phase by
    ``init_random_frames``.

    Past the end of the episode the last real step repeats and the mask is False. A slice may start
    on any step, the last of an episode included: then it has one real step. Rows of a stored
    ``("collector", "mask")`` that are False (padding) are never real steps; a start on one is drawn
    again, up to 16 times, after which the slice is wholly masked.

    What is stored comes out as it is: ``done``, ``truncated`` and ``is_init`` are not touched. The
    cost of a batch is O(B * T), whatever the size of the buffer.

    Args:
        slice_len: steps ``T`` of a slice; the batch size must be a multiple. Exclusive with
            ``num_slices``.
        num_slices: slices ``B`` of a batch; the batch size must be a multiple. Exclusive with
            ``slice_len``.
        end_keys: flags that mark the last step of an episode, OR-ed; those not stored are skipped,
            but one must be. None: ``("next", "done")``, ``("next", "terminated")`` and
            ``("next", "truncated")``, and none of them need be stored if a trajectory id is.
        traj_key: trajectory id, looked at in addition to the end flags. None:
            ``("collector", "traj_ids")`` or else ``"episode"``, if stored.
        init_key: flag of an episode's first step, looked at in addition if stored. None: never.

    Writes:
        ``("collector", "mask")`` ``[B * T, 1]`` bool: True on real steps.

    Raises:
        TypeError: both or none of ``slice_len`` and ``num_slices`` are given, or one is no integer;
            ``end_keys`` is no sequence of keys, or ``traj_key`` or ``init_key`` no key; when
            sampling: the storage is not one of tensors in a TensorDict (a ``ListStorage``), or a
            writer puts rows anywhere (``TensorDictMaxValueWriter``).
        ValueError: ``slice_len`` or ``num_slices`` is below 1, or ``end_keys`` is empty; when
            sampling: the storage is empty, its elements are themselves batches, or the batch size
            is not divisible.
        KeyError: when sampling: none of the keys that would tell where an episode ends is stored.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> sampler = TransitionSliceSampler(slice_len=4)
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(100), sampler=sampler, batch_size=32
        ... )
        >>> done = torch.arange(50).remainder(10).eq(9).unsqueeze(-1)
        >>> data = {"observation": torch.rand(50, 3), "next": {"done": done}}
        >>> _ = buffer.extend(TensorDict(data, batch_size=[50]))
        >>> batch = buffer.sample().reshape(8, 4)
        >>> batch["observation"].shape, batch["collector", "mask"].shape
        (torch.Size([8, 4, 3]), torch.Size([8, 4, 1]))
        >>> index, mask = sampler.slices_from(buffer.storage, (torch.tensor([8]),), 4)
        >>> index[0].tolist(), mask.tolist()
        ([[8, 9, 9, 9]], [[True, True, False, False]])
    """

    __signature__ = OwnSignature()

    def __init__(
        self,
        *,
        slice_len: int | None = None,
        num_slices: int | None = None,
        end_keys: Sequence[NestedKey] | None = None,
        traj_key: NestedKey | None = None,
        init_key: NestedKey | None = IS_INIT,
    ) -> None:
        if (slice_len is None) == (num_slices is None):
            raise TypeError(
                "TransitionSliceSampler: expected exactly one of slice_len and num_slices, got "
                f"slice_len={slice_len} and num_slices={num_slices}."
            )
        if slice_len is not None:
            check_count("slice_len", slice_len)
        else:
            check_count("num_slices", num_slices)
        if end_keys is not None:
            check_keys("TransitionSliceSampler: end_keys", end_keys)
            if not len(end_keys):
                text = "TransitionSliceSampler: end_keys is empty; pass None for the usual."
                raise ValueError(text)
        for name, key in (("traj_key", traj_key), ("init_key", init_key)):
            if key is not None:
                check_key(f"TransitionSliceSampler: {name}", key)
        super().__init__(
            slice_len=slice_len,
            num_slices=num_slices,
            end_keys=end_keys,
            traj_key=None if traj_key is None else unravel_key(traj_key),
            init_key=None if init_key is None else unravel_key(init_key),
            truncated_key=None,
            strict_length=False,
            pad_output=True,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(slice_len={self.slice_len}, num_slices={self.num_slices}, "
            f"end_keys={self.end_keys}, traj_key={self.traj_key}, init_key={self.init_key})"
        )

    def sample(
        self, storage: Storage, batch_size: int
    ) -> tuple[tuple[Tensor, ...], dict[NestedKey, Any]]:
        """Draw a batch of slices, as the replay buffer asks for it.

        Args:
            storage: the storage of the replay buffer.
            batch_size: steps of all slices together, ``B * T``.

        Returns:
            The storage positions, one LongTensor ``[B * T]`` per storage dim, and the info
            ``{("collector", "mask"): [B * T, 1]}``.
        """
        slice_len, num_slices = self._adjusted_batch_size(batch_size)
        index, mask = self.sample_slices(storage, num_slices, slice_len)
        return tuple(i.reshape(-1) for i in index), {MASK: mask.reshape(-1, 1)}

    def sample_slices(
        self, storage: Storage, num_slices: int, slice_len: int
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Draw slices, whatever the ``slice_len`` or ``num_slices`` of this sampler.

        Args:
            storage: the storage of a replay buffer.
            num_slices: slices ``B``.
            slice_len: steps ``T`` of each.

        Returns:
            The storage positions, one LongTensor ``[B, T]`` per storage dim (time first), and the
            mask ``[B, T]``, True on real steps; both on the storage's device.
        """
        check_count("num_slices", num_slices)
        check_count("slice_len", slice_len)
        columns = self._columns(storage)
        start = self._draw_starts(columns, storage.shape, num_slices)
        return walk(storage, columns, start, slice_len)

    def slices_from(
        self, storage: Storage, start_index: tuple[Tensor, ...], slice_len: int
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Give the slices that begin at the given positions.

        Args:
            storage: the storage of a replay buffer.
            start_index: one LongTensor ``[B]`` per storage dim (time first). That they lie within
                what is stored is checked, which on CUDA waits for the device.
            slice_len: steps ``T`` of each slice.

        Returns:
            As :meth:`sample_slices`.

        Raises:
            TypeError: ``start_index`` is no tuple of as many LongTensors as the storage has dims.
            IndexError: a position is negative or beyond what is stored.
        """
        check_count("slice_len", slice_len)
        columns = self._columns(storage)
        shape = storage.shape
        if not (
            isinstance(start_index, tuple)
            and len(start_index) == len(shape)
            and all(i.dtype == torch.long and i.ndim == 1 for i in start_index)
            and all(i.shape == start_index[0].shape for i in start_index)
        ):
            raise TypeError(
                f"start_index: expected a tuple of {len(shape)} LongTensor(s) of one shape [B], "
                f"one for each dim of the storage, got {start_index}."
            )
        for position, size in zip(start_index, shape, strict=True):
            if bool(((position < 0) | (position >= size)).any()):
                raise IndexError(
                    f"start_index: expected positions within the stored {list(shape)}, got "
                    f"{position.min().item()} to {position.max().item()} for a size of {size}."
                )
        start = tuple(i.to(columns.device) for i in start_index)
        return walk(storage, columns, start, slice_len)

    def end_columns(self, storage: Storage) -> list[Tensor]:
        """Give the stored flags that mark the last step of an episode, each ``[*N, ...]``."""
        return self._columns(storage).ends

    def _adjusted_batch_size(self, batch_size: int) -> tuple[int, int]:
        """Split a batch size into ``(T, B)``."""
        name = "slice_len" if self.num_slices is None else "num_slices"
        divisor = getattr(self, name)
        if batch_size < 1 or batch_size % divisor:
            raise ValueError(
                f"batch_size: expected a multiple of {name}={divisor}, got {batch_size}."
            )
        quotient = batch_size // divisor
        return (divisor, quotient) if self.num_slices is None else (quotient, divisor)

    def _sampleable_count(self, storage: Storage, batch_size: int) -> int:
        """Count the possible starts: 0 if nothing is stored yet, else all that is stored.

        Whatever else would keep :meth:`sample` from working is raised, not counted as 0: waiting
        for more data would not help.
        """
        self._adjusted_batch_size(batch_size)
        if len(storage) == 0:
            return 0
        self._columns(storage)
        return storage.shape.numel()

    def _columns(self, storage: Storage) -> Columns:
        """Find the stored entries that tell where an episode ends."""
        if not isinstance(storage, TensorStorage):
            raise TypeError(
                f"{type(self).__name__} needs a storage that keeps TensorDicts as tensors "
                f"(LazyTensorStorage, LazyMemmapStorage, TensorStorage), got "
                f"{type(storage).__name__}."
            )
        data = storage._storage
        if len(storage) == 0 or data is None:
            raise ValueError("Cannot sample slices: the storage of the replay buffer is empty.")
        if not is_tensor_collection(data):
            raise TypeError(
                f"{type(self).__name__} needs a storage of TensorDicts, got {type(data).__name__}."
            )
        if data.batch_dims > storage.ndim:
            raise ValueError(
                f"Each element of the storage is itself a batch: the data have batch size "
                f"{list(data.batch_size)}, but the storage has ndim={storage.ndim}. Give the "
                f"storage ndim={data.batch_dims}, or flatten the data before extending the buffer."
            )

        check_writers(storage)

        def stored(key: NestedKey | None) -> Tensor | None:
            return None if key is None else data.get(key, None)

        end_keys = self.end_keys or DEFAULT_END_KEYS
        traj_keys = DEFAULT_TRAJ_KEYS if self.traj_key is None else (self.traj_key,)
        ends = [column for column in map(stored, end_keys) if column is not None]
        traj = next((column for column in map(stored, traj_keys) if column is not None), None)
        if self.end_keys is not None and not ends:
            raise KeyError(
                f"None of the end_keys {list(end_keys)} is stored; there are {leaf_keys(data)}."
            )
        if self.traj_key is not None and traj is None:
            raise KeyError(
                f"The traj_key {self.traj_key!r} is not stored; there are {leaf_keys(data)}."
            )
        if not ends and traj is None:
            raise KeyError(
                "Cannot tell where an episode ends: expected one of the end keys "
                f"{list(end_keys)} or one of the trajectory keys {list(traj_keys)} to be stored; "
                f"there are {leaf_keys(data)}."
            )
        device = (ends[0] if ends else traj).device
        return Columns(ends, traj, stored(self.init_key), stored(MASK), device)

    def _draw_starts(
        self, columns: Columns, shape: torch.Size, num_slices: int
    ) -> tuple[Tensor, ...]:
        """Draw ``[B]`` positions, uniform over the stored (and not padding) transitions."""
        generator = self._rng
        # the buffer's generator may live on the CPU while the storage is on an accelerator
        device = columns.device if generator is None else generator.device
        draws = 1 if columns.mask is None else _DRAWS_PER_START
        start = tuple(
            torch.randint(size, (num_slices, draws), generator=generator, device=device).to(
                columns.device
            )
            for size in shape
        )
        if columns.mask is not None:
            real = read_flags(columns.mask, flat_position(start, shape[1:]), len(shape))
            first_real = real.byte().argmax(-1, keepdim=True)
            start = tuple(i.gather(-1, first_real) for i in start)
        return tuple(i.squeeze(-1) for i in start)
