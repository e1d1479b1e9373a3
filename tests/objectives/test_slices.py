"""Flat samples of slices: cut where they were put together, or refused."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.keys import MASK
from layeredrl_trl.objectives import RewardPredictorLoss
from layeredrl_trl.objectives.slices import SliceKeys, as_slices, read_reward
from tests.oracles_predictors import filled_buffer, small_parts


def sample(slice_len, mask, index=None) -> TensorDict:
    data = {MASK: torch.tensor(mask).bool().unsqueeze(-1)}
    if index is not None:
        data["index"] = torch.tensor(index)
    return TensorDict(data, batch_size=[len(mask)])


def cut(slice_len, mask, index=None):
    return as_slices(sample(slice_len, mask, index), slice_len, [MASK], MASK)


@pytest.mark.parametrize(
    ("mask", "index"),
    [
        ([1, 1, 1, 1, 1, 1], None),
        ([1, 0, 0, 1, 1, 0], None),
        ([0, 0, 0, 1, 1, 1], None),
        ([1, 1, 1, 1, 1, 1], [4, 5, 6, 3, 4, 5]),
        ([1, 1, 0, 1, 0, 0], [4, 5, 5, 3, 3, 3]),
        ([1, 1, 1, 1, 1, 0], [8, 9, 0, 9, 0, 0]),  # a ring of 10
        ([1, 1, 1, 1, 1, 1], [[4, 0], [5, 0], [6, 0], [7, 1], [8, 1], [9, 1]]),
        ([1, 1, 1, 1, 1, 1], [[4, 0], [8, 0], [6, 0], [7, 1], [8, 1], [9, 1]]),  # not looked at
    ],
)
def test_slices_as_the_sampler_draws_them_are_cut(mask, index):
    assert cut(3, mask, index).batch_size == (2, 3)


@pytest.mark.parametrize(
    ("mask", "index"),
    [
        ([1, 0, 1, 1, 1, 1], None),
        ([1, 1, 0, 0, 1, 0], None),
        ([1, 1, 1, 1, 1, 1], [4, 5, 9, 10, 2, 3]),
        ([1, 1, 1, 1, 1, 1], [4, 5, 2, 3, 7, 8]),
        ([1, 1, 1, 1, 1, 1], [[4], [5], [2], [3], [7], [8]]),
    ],
)
def test_slices_of_another_length_were_joined_where_sizes_divide(mask, index):
    with pytest.raises(ValueError, match=r"slice_len=3 steps joins .* another slice length"):
        cut(3, mask, index)


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("capacity", [60, 37])
def test_no_sample_of_the_right_length_is_refused(ndim, capacity):
    sampler = TransitionSliceSampler(slice_len=4)
    toy = filled_buffer(60, capacity=capacity, ndim=ndim)
    buffer = TensorDictReplayBuffer(storage=toy.buffer.storage, sampler=sampler)
    for _ in range(20):
        drawn = buffer.sample(400)
        assert drawn["index"].shape == (400, ndim)
        assert as_slices(drawn, 4, [MASK], MASK).batch_size == (100, 4)


@pytest.mark.parametrize("slice_len", [2, 6])
@pytest.mark.parametrize("ends", [None, [(100, True)]])
def test_the_loss_refuses_slices_of_another_length(slice_len, ends):
    dynamics, value, reward, encoder = small_parts(None)
    loss = RewardPredictorLoss(encoder, dynamics, reward, value, n_steps=4)
    sampler = TransitionSliceSampler(slice_len=slice_len)
    toy = filled_buffer(60, ends, sampler=sampler)
    with pytest.raises(ValueError, match=r"Give the sampler slice_len=4 \(loss.slice_len\)"):
        loss(toy.buffer.sample(240))


@pytest.mark.parametrize("buffer", [ReplayBuffer, TensorDictReplayBuffer])
def test_a_sample_without_mask_is_told_of_the_sampler(buffer):
    dynamics, value, reward, encoder = small_parts(None)
    loss = RewardPredictorLoss(encoder, dynamics, reward, value, n_steps=3)
    plain = buffer(storage=LazyTensorStorage(60))
    plain.extend(filled_buffer().data.squeeze(1))
    with pytest.raises(KeyError, match=r"TransitionSliceSampler\(slice_len=3\).*the batch has no"):
        loss(plain.sample(30))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_rewards_that_are_no_floats_become_float32(dtype):
    data = TensorDict({("next", "reward"): torch.ones(4, 1, dtype=dtype)}, batch_size=[4])
    expected = dtype if dtype.is_floating_point else torch.float32
    assert read_reward(data, SliceKeys(), torch.Size([4])).dtype is expected
