"""Draw and read the batches of many optimisation steps from a replay buffer at once.

Reading a batch takes about as long as learning from it, at any size up to some ten thousand
transitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer

from layeredrl_trl import keys
from layeredrl_trl.checks import check_counts
from layeredrl_trl.data import (
    TransitionSliceSampler,
    check_buffer,
    has_plain_columns,
    read_slices,
    read_transitions,
    slice_sampler,
    warn_of_gaps,
)
from layeredrl_trl.objectives import RewardPredictorLoss, Slices

READ_AHEAD = 2**16
"""Maximum number of transitions that are read at once."""

_MOST_NUMBERS = 2**25
"""Maximum number of elements of observations that are read at once."""


class ReadAhead(NamedTuple):
    """Draw batches from replay buffers and read the entries that a loss needs.

    Attributes:
        loss: gives the names of entries and the length of slices; none of its networks is used.
        sampler: draws slices, if the buffer has no ``TransitionSliceSampler``.
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

        A buffer with transforms is read for each step, as their output may depend on learning; and
        only once, so that they see nothing but slices, as they do in ``buffer.sample()``.
        """
        check_counts(batch_size=batch_size, model_batch_size=model_batch_size)
        length, ahead = self.loss.slice_len, 1
        is_plain = has_plain_columns(buffer)
        if is_plain:
            rows = batch_size * length + model_batch_size
            ahead = max(1, self.most_rows // rows)
        for done in range(0, n_steps, ahead):
            n = min(ahead, n_steps - done)
            if is_plain:
                slices = self.slices(buffer, n * batch_size, length)
                transitions = self.transitions(buffer, n * model_batch_size)
            else:
                steps = self._draw(buffer, batch_size + model_batch_size, length)
                slices = self._slices(steps[:batch_size])
                transitions = self._transitions(steps[batch_size:, 0])
            slices = self.loss.with_returns(slices)
            if slices.mask.all():  # for example slices of one step with a state value
                slices = slices._replace(mask=None)
            yield from zip(slices.split(n), transitions.split(n), strict=True)

    def warn_of_gaps(self, buffer: TensorDictReplayBuffer) -> None:
        """Warn if the slices to read would join steps that do not follow each other."""
        names = self.loss.tensor_keys
        if self.loss.slice_len > 1 and len(buffer.storage):
            sampler = slice_sampler(buffer, self.sampler)
            warn_of_gaps(buffer, sampler, names.observation, names.next_observation, stacklevel=4)

    def slices(self, buffer: TensorDictReplayBuffer, batch_size: int, length: int) -> Slices:
        """Draw slices ``[B, length]``, whose starts are uniform over stored transitions."""
        return self._slices(self._draw(buffer, batch_size, length))

    def transitions(self, buffer: TensorDictReplayBuffer, batch_size: int) -> Slices:
        """Draw single transitions ``[B]``; transforms see the slices that these begin."""
        check_buffer(buffer)
        length = 1 if has_plain_columns(buffer) else self.loss.slice_len
        return self._transitions(self._draw(buffer, batch_size, length, with_reward=False)[:, 0])

    def entries(
        self, buffer: TensorDictReplayBuffer, index: tuple[Tensor, ...]
    ) -> dict[NestedKey, Tensor]:
        """Read what is learned from at storage positions ``[N]``; by name, each ``[N, *]``.

        Transforms see the slices that begin there.
        """
        names, loss = self.loss.tensor_keys, self.loss
        needed = [names.observation, names.action, names.next_observation]
        needed += [names.next_reward] if loss.reward is not None or loss.has_value else []
        length = 1 if has_plain_columns(buffer) else loss.slice_len
        sampler = slice_sampler(buffer, self.sampler)
        # backwards, so that consecutive positions do not look like one slice
        index, _ = sampler.slices_from(buffer.storage, tuple(i.flip(0) for i in index), length)
        read = read_transitions(buffer, index, needed, [keys.WEIGHT, names.mask])
        return {key: x.flip(0) for key, x in read[:, 0].items(True, True)}

    def _draw(
        self,
        buffer: TensorDictReplayBuffer,
        batch_size: int,
        length: int,
        *,
        with_reward: bool = True,
    ) -> TensorDict:
        """Draw slices and read their entries, ``[B, length]`` on this device."""
        check_buffer(buffer)
        check_counts(batch_size=batch_size)
        names = self.loss.tensor_keys
        needed = [names.observation, names.action, names.next_observation, names.next_terminated]
        needed += [names.next_reward] if with_reward else []
        optional = [names.planned, keys.WEIGHT, keys.STEPS_TO_NEXT]
        sampler = slice_sampler(buffer, self.sampler)
        steps = read_slices(buffer, sampler, batch_size, length, needed, optional)
        is_there = all(x.device == self.device for x in steps.values(True, True))
        return steps if is_there else steps.to(self.device)

    def _slices(self, steps: TensorDict) -> Slices:
        slices = Slices.read(steps, self.loss.tensor_keys, with_mask=False)
        return slices._replace(mask=steps[keys.MASK], weight=None)

    def _transitions(self, steps: TensorDict) -> Slices:
        names = self.loss.tensor_keys
        steps = steps.exclude(names.planned)  # the dynamics learn from random actions as well
        return Slices.read(steps, names, with_reward=False, with_mask=False)
