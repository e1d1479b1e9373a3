"""Draw and read the batches of many optimisation steps from a replay buffer at once.

Reading a batch takes about as long as learning from it, at any size up to some ten thousand
transitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from tensordict import NestedKey
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
from layeredrl_trl.objectives import RewardPredictorLoss, Slices, rows_with_data

READ_AHEAD = 2**16
"""Maximum number of transitions that are read at once."""

_MOST_NUMBERS = 2**25
"""Maximum number of elements of observations that are read at once."""


class ReadAhead(NamedTuple):
    """Draw batches from replay buffers and read the entries that a loss needs.

    Attributes:
        loss: gives the names of entries and the length of slices; none of its networks is used.
        sampler: draws slices.
        device: device of the batches.
    """

    loss: RewardPredictorLoss
    sampler: TransitionSliceSampler
    device: torch.device

    @property
    def most_rows(self) -> int:
        """Maximum number of transitions to read at once, at least 1."""
        size = self.loss.encoder.obs_shape.numel()
        return max(1, min(READ_AHEAD, _MOST_NUMBERS // size))

    def batches(
        self, buffer: TensorDictReplayBuffer, n_steps: int, batch_size: int, model_batch_size: int
    ) -> Iterator[tuple[Slices, Slices]]:
        """Yield slices and transitions for each of ``n_steps`` optimisation steps.

        A buffer with transforms is read for each step, as their output may depend on learning.
        """
        length, ahead = self.loss.slice_len, 1
        if has_plain_columns(buffer):
            rows = batch_size * length + model_batch_size
            ahead = max(1, self.most_rows // rows)
        for done in range(0, n_steps, ahead):
            n = min(ahead, n_steps - done)
            slices = self.loss.with_returns(self.slices(buffer, n * batch_size, length))
            if slices.mask.all():  # for example slices of one step with a state value
                slices = slices._replace(mask=None)
            transitions = self.transitions(buffer, n * model_batch_size)
            yield from zip(slices.split(n), transitions.split(n), strict=True)

    def slices(self, buffer: TensorDictReplayBuffer, batch_size: int, length: int) -> Slices:
        """Draw slices ``[B, length]``, whose starts are uniform over stored transitions."""
        index, mask = self._draw(buffer, batch_size, length)
        slices = self._read(buffer, index, with_reward=True)
        return slices._replace(mask=mask.to(self.device).unsqueeze(-1), weight=None)

    def transitions(self, buffer: TensorDictReplayBuffer, batch_size: int) -> Slices:
        """Draw single transitions ``[B]``."""
        index, _ = self._draw(buffer, batch_size, 1)
        return self._read(buffer, tuple(i[:, 0] for i in index), with_reward=False)

    def entries(
        self, buffer: TensorDictReplayBuffer, index: tuple[Tensor, ...]
    ) -> dict[NestedKey, Tensor]:
        """Read what is learned from at storage positions ``[N]``; by name, each ``[N, *]``."""
        names, loss = self.loss.tensor_keys, self.loss
        needed = [names.observation, names.action, names.next_observation]
        needed += [names.next_reward] if loss.reward is not None or loss.has_value else []
        read = read_transitions(buffer, index, needed, [keys.WEIGHT, names.mask])
        return {key: x for key, x in read.items(True, True)}

    def _draw(
        self, buffer: TensorDictReplayBuffer, batch_size: int, length: int
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        check_buffer(buffer)
        check_counts(batch_size=batch_size)
        index, mask = self.sampler.sample_slices(buffer.storage, batch_size, length)
        row = rows_with_data(mask)
        return tuple(i[row] for i in index), mask

    def _read(
        self, buffer: TensorDictReplayBuffer, index: tuple[Tensor, ...], *, with_reward: bool
    ) -> Slices:
        names = self.loss.tensor_keys
        needed = [names.observation, names.action, names.next_observation, names.next_terminated]
        more = ([names.next_reward], [names.planned]) if with_reward else ([], [keys.WEIGHT])
        steps = read_transitions(buffer, index, needed + more[0], more[1])
        steps.set(keys.INDEX, stack_index(index))
        is_there = all(x.device == self.device for x in steps.values(True, True))
        steps = steps if is_there else steps.to(self.device)
        return Slices.read(steps, names, with_reward=with_reward, with_mask=False)
