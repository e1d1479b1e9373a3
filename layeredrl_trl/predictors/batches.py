"""From a replay buffer to the batches that a ``RewardPredictor`` learns on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer

from layeredrl_trl import keys
from layeredrl_trl.checks import check_counts
from layeredrl_trl.data import (
    TransitionSliceSampler,
    check_buffer,
    has_plain_columns,
    read_transitions,
    stack_index,
)
from layeredrl_trl.objectives import RewardPredictorLoss
from layeredrl_trl.objectives.columns import SliceParts, TransitionParts, split
from layeredrl_trl.objectives.slices import rows_with_data

READ_AHEAD = 2**16
"""Most steps that are read from a buffer at once, for several optimisation steps."""


class BatchReader(NamedTuple):
    """Draw slices and transitions from replay buffers and read what a loss makes batches of.

    Attributes:
        loss: says which entries are read and how long slices are; no network of it is asked.
        sampler: draws slices.
        device: of what is returned.
    """

    loss: RewardPredictorLoss
    sampler: TransitionSliceSampler
    device: torch.device

    def batches(
        self, buffer: TensorDictReplayBuffer, n_steps: int, batch_size: int, model_batch_size: int
    ) -> Iterator[tuple[SliceParts, TransitionParts]]:
        """Draw and read slices and transitions for ``n_steps`` steps, those of many at once.

        Transforms of the buffer are asked anew for every step: what they give may change with what
        is learned.
        """
        loss, ahead = self.loss, 1
        if has_plain_columns(buffer):
            ahead = max(1, READ_AHEAD // (batch_size * loss.slice_len + model_batch_size))
        for done in range(0, n_steps, ahead):
            n = min(ahead, n_steps - done)
            slices = self.slices(buffer, n * batch_size, loss.k_steps, loss.n_steps, loss.gamma)
            transitions = self.transitions(buffer, n * model_batch_size)
            transitions = TransitionParts.read(transitions, loss.tensor_keys)
            yield from zip(split(slices, n), split(transitions, n), strict=True)

    def slices(
        self,
        buffer: TensorDictReplayBuffer,
        batch_size: int,
        k_steps: int,
        n_steps: int,
        gamma: float,
    ) -> SliceParts:
        """Draw slices and read what targets are made of, ``[B, k_steps]``."""
        check_buffer(buffer)
        check_counts(batch_size=batch_size, k_steps=k_steps, n_steps=n_steps)
        length = k_steps + n_steps - (0 if self.loss.bootstraps_action else 1)
        index, mask = self._draw(buffer, batch_size, length)

        def read(names: Sequence[NestedKey], steps: Tensor) -> TensorDictBase:
            steps = steps.to(index[0].device)
            return self._read(buffer, tuple(i.gather(1, steps) for i in index), names)

        slices = self.loss.read_slices(
            read, mask.to(self.device), k_steps=k_steps, n_steps=n_steps, gamma=gamma
        )
        first = stack_index(tuple(i[:, :k_steps] for i in index))
        return slices._replace(index=first.to(self.device))

    def transitions(self, buffer: TensorDictReplayBuffer, batch_size: int) -> TensorDictBase:
        """Draw and read single transitions for the dynamics, ``[B]``."""
        names = self.loss.tensor_keys
        check_buffer(buffer)
        check_counts(batch_size=batch_size)
        index, _ = self._draw(buffer, batch_size, 1)
        wanted = [
            names.observation,
            names.action,
            names.next_observation,
            names.next_terminated,
            keys.WEIGHT,
        ]
        index = tuple(i[:, 0] for i in index)
        transitions = self._read(buffer, index, wanted)
        return transitions.set(keys.INDEX, stack_index(index).to(self.device))

    def _draw(
        self, buffer: TensorDictReplayBuffer, batch_size: int, length: int
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        index, mask = self.sampler.sample_slices(buffer.storage, batch_size, length)
        row = rows_with_data(mask)
        return tuple(i[row] for i in index), mask

    def _read(
        self,
        buffer: TensorDictReplayBuffer,
        index: tuple[Tensor, ...],
        names: Sequence[NestedKey],
    ) -> TensorDictBase:
        maybe = {self.loss.tensor_keys.planned, keys.WEIGHT}
        needed = [name for name in names if name not in maybe]
        optional = [name for name in names if name in maybe]
        out = read_transitions(buffer, index, needed, optional)
        is_there = all(x.device == self.device for x in out.values(True, True))
        return out if is_there else out.to(self.device)
