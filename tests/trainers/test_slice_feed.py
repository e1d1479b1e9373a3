"""What a trainer collects, in the buffer; and what its steps get from there."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.trainers import SliceFeed


def make_buffer(ndim=1, **sampler):
    sampler = TransitionSliceSampler(**sampler or {"slice_len": 2})
    return TensorDictReplayBuffer(storage=LazyTensorStorage(60, ndim=ndim), sampler=sampler)


def batch_of(*shape, first=0):
    """Steps whose observation is 100 times the number of the env plus the number of the step."""
    n_envs = torch.Size(shape[:-1]).numel()
    env, step = torch.meshgrid(torch.arange(n_envs), torch.arange(shape[-1]), indexing="ij")
    observation = (100.0 * env + step + first).reshape(*shape, 1)
    flag = torch.zeros(*shape, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": observation,
            "collector": {"traj_ids": env.reshape(shape)},
            "next": {"observation": observation + 1, "done": flag, "terminated": flag.clone()},
        },
        batch_size=shape,
    )


@pytest.mark.parametrize(
    ("ndim", "shape"), [(1, (5,)), (1, (3, 5)), (2, (3, 5)), (2, (2, 3, 5)), (1, (2, 3, 5))]
)
def test_slices_follow_one_env(ndim, shape):
    buffer = make_buffer(ndim)
    feed = SliceFeed(buffer, num_slices=200)
    for i in range(2):
        feed.extend(batch_of(*shape, first=5 * i))
    assert buffer.storage.shape.numel() == 2 * torch.Size(shape).numel()
    sample = feed.sample().reshape(200, 2)
    x, real = sample["observation"][..., 0], sample["collector", "mask"][:, 1, 0]
    assert (x[real, 1] == x[real, 0] + 1).all() and real.any()
    if ndim == 2:  # slices go on from one batch to the next
        assert ((x[real, 0] % 100) == 4).any()


def test_padding_is_left_out():
    buffer, batch = make_buffer(), batch_of(2, 4)
    batch["collector", "mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    SliceFeed(buffer, 1).extend(batch)
    assert buffer[:]["observation"].flatten().tolist() == [0, 1, 2, 100, 101]


def test_only_what_is_asked_for_is_stored():
    buffer = make_buffer()
    SliceFeed(buffer, 1, ["observation", ("next", "done"), "missing"]).extend(batch_of(4))
    stored = set(buffer.storage._storage.keys(True, True)) - {"index"}
    assert stored == {"observation", ("next", "done")}


def test_a_batch_of_no_collector_is_not_stored():
    buffer = make_buffer()
    SliceFeed(buffer, 1).extend(TensorDict(batch_size=[7]))
    assert len(buffer) == 0


def test_the_batch_stays_as_it_is():
    batch = batch_of(4)
    before = batch.clone()
    SliceFeed(make_buffer(), 1, ["observation", ("next", "done")]).extend(batch)
    assert (batch == before).all() and set(batch.keys(True)) == set(before.keys(True))


def test_bad_arguments():
    with pytest.raises(ValueError, match="got RandomSampler"):
        SliceFeed(TensorDictReplayBuffer(storage=LazyTensorStorage(3)), 1)
    with pytest.raises(ValueError, match="TransitionSliceSampler"):
        SliceFeed(make_buffer(num_slices=3), 1)
    with pytest.raises(ValueError, match="num_slices must be at least 1"):
        SliceFeed(make_buffer(), 0)
    with pytest.raises(TypeError, match="buffer"):
        SliceFeed(None, 1)


def test_a_batch_that_may_not_follow_the_one_before_ends_its_slices():
    """A ``MultiAsyncCollector`` drops a batch that waits for more than a second."""
    buffer, batch = make_buffer(), batch_of(5)
    batch["next", "truncated"] = batch["next", "terminated"].clone()
    before = batch.clone()
    feed = SliceFeed(buffer, num_slices=200, has_gaps=True)
    feed.extend(batch)
    assert (batch == before).all()
    batch["observation"] += 50  # of the same trajectory, later on
    feed.extend(batch)
    rows = buffer[:]
    assert rows["next", "truncated"].flatten().nonzero().flatten().tolist() == [4, 9]
    assert rows["next", "done"].flatten().nonzero().flatten().tolist() == [4, 9]
    sample = feed.sample().reshape(200, 2)
    x, real = sample["observation"][..., 0], sample["collector", "mask"][:, 1, 0]
    assert real.any() and (x[real, 1] == x[real, 0] + 1).all()


def test_an_end_of_a_batch_that_terminated_is_not_truncated():
    buffer, batch = make_buffer(), batch_of(5)
    batch["next", "truncated"] = batch["next", "terminated"].clone()
    batch["next", "terminated"][-1] = batch["next", "done"][-1] = True
    SliceFeed(buffer, 1, has_gaps=True).extend(batch)
    assert not buffer[:]["next", "truncated"].any()
