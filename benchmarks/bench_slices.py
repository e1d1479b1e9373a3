"""One sample of 256 slices of 3 steps from buffers of growing size."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

from benchmarks.workloads import BATCH_SIZE, EPISODE_STEPS, N_STEPS
from layeredrl_trl.data import TransitionSliceSampler


def make_draw(who, size):
    """What draws one sample."""
    step = torch.arange(size)
    done = (step % EPISODE_STEPS == EPISODE_STEPS - 1)[:, None]
    if who == "bare":
        ends = done[:, 0].nonzero()[:, 0]
        last = ends[torch.searchsorted(ends, step)]
        offset = torch.arange(N_STEPS)

        def draw():
            start = torch.randint(size, (BATCH_SIZE, 1))
            end = last[start]
            index = start + offset
            return index.minimum(end), index <= end

        return draw
    data = TensorDict({"observation": step[:, None].float(), "next": {"done": done}}, [size])
    storage = LazyTensorStorage(size)
    TensorDictReplayBuffer(storage=storage).extend(data)
    if who == "slices":
        sampler = TransitionSliceSampler(slice_len=N_STEPS)
    else:  # finding where episodes end is what it does anew for each sample
        end_key = ("next", "done")
        sampler = SliceSampler(slice_len=N_STEPS, end_key=end_key, cache_values=False)
    return lambda: sampler.sample(storage, BATCH_SIZE * N_STEPS)


@pytest.mark.parametrize("other", ["bare", "TorchRL's"])
@pytest.mark.parametrize("size", [10**4, 10**5, 10**6])
def test_slices(size, other, take_turns):
    draw, other_draw = make_draw("slices", size), make_draw(other, size)
    take_turns(
        f"slices, of {size:,} transitions", "slices", draw, other, other_draw, rounds=20, calls=20
    )
