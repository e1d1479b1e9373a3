"""Drawing transitions of a replay buffer uniformly, whole, as ``buffer.sample()`` gives them."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from layeredrl_trl import keys
from layeredrl_trl.data import TransitionSliceSampler, read_transitions, slice_sampler
from layeredrl_trl.data.boundaries import read_flags
from layeredrl_trl.data.positions import flat_position
from layeredrl_trl.data.reading import locked, transformed
from layeredrl_trl.functional import rows_with_data

# Positions that are drawn for one transition, of which the first usable one is taken.
_DRAWS = 8
_OVER = (keys.DONE, keys.TERMINATED, keys.TRUNCATED)


class RealRows:
    """Draw single transitions of a replay buffer, uniformly over those that took place.

    Stored padding (``("collector", "mask")`` False) is left out, and so are rows whose own state
    ends an episode (``done``, ``terminated`` or ``truncated`` at their root), as a rollout with
    ``break_when_all_done=True`` repeats them: no action was taken there.

    Args:
        buffer: one that :func:`~layeredrl_trl.data.check_buffer` passed. Its transforms are
            applied, its generator is used; its sampler tells only where episodes end.
    """

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer
        self._default = TransitionSliceSampler(slice_len=1)

    def observations(self, n: int, key: NestedKey) -> Tensor:
        """Draw ``n`` states in which an action was taken: observations ``[n, *O]`` in float32."""
        return read_transitions(self.buffer, self._draw(n), [key]).get(key)

    def transitions(self, n: int) -> TensorDictBase:
        """Draw ``n`` transitions ``[n]`` with all entries, in the dtypes of the buffer."""
        index = self._draw(n)
        with locked(self.buffer):
            rows = self.buffer.storage.get(index)
            return transformed(self.buffer, rows, torch.Size([n])).detach()

    def _draw(self, n: int) -> tuple[Tensor, ...]:
        """Draw ``n`` positions, one LongTensor ``[n]`` per storage dim."""
        storage = self.buffer.storage
        with locked(self.buffer):
            if len(storage) == 0:
                raise ValueError(
                    "real_buffer: it is empty, so there is no state to imagine from; extend it "
                    "with real steps first."
                )
            sampler = slice_sampler(self.buffer, self._default)
            index, real = sampler.sample_slices(storage, n * _DRAWS, 1)
            index, real = tuple(i[:, 0] for i in index), real[:, 0]
            position = flat_position(index, storage.shape[1:]).unsqueeze(-1)
            for key in _OVER:
                column = storage._storage.get(key, None)
                if column is not None:
                    real = real & ~read_flags(column, position, storage.ndim)[:, 0]
        if not bool(real.any()):
            raise ValueError(
                "real_buffer: no action was taken in any of its rows: they are padding or have "
                f"one of {list(_OVER)} set at their root."
            )
        candidates = real.view(n, _DRAWS)
        first = candidates.byte().argmax(-1, keepdim=True)
        found = rows_with_data(candidates.gather(-1, first))
        return tuple(i.view(n, _DRAWS).gather(-1, first)[found, 0] for i in index)
