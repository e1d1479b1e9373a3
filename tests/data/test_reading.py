"""read_transitions: contract, oracle, errors."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.envs import Compose, DoubleToFloat, RenameTransform

from layeredrl_trl.data import check_buffer, read_transitions, stack_index

KEYS = ["observation", "action", ("next", "terminated"), ("goal", "position")]


def make_buffer(ndim=1, storage=LazyTensorStorage, buffer=TensorDictReplayBuffer, **kwargs):
    """18 steps of 2 envs in a ring of 40 (ndim 2: 20 rows); ``action`` tells env and step."""
    step = torch.arange(18.0).expand(2, 18) + 100 * torch.arange(2.0).unsqueeze(-1)
    data = TensorDict(
        {
            "observation": step.unsqueeze(-1).expand(2, 18, 3).double() + 1 / 3,
            "action": step.unsqueeze(-1).clone(),
            "count": step.long(),
            "goal": {"position": step.double()},
            "next": {"terminated": step.unsqueeze(-1) % 3 == 0},
        },
        batch_size=[2, 18],
    )
    dims = {"ndim": ndim} if storage is not ListStorage else {}
    buffer = buffer(storage=storage(40, **dims), batch_size=4, **kwargs)
    buffer.extend(data if ndim == 2 else data.reshape(-1))
    return buffer


def positions(ndim, shape):
    time = torch.randint(18, shape)
    return (time,) if ndim == 1 else (time, torch.randint(2, shape))


# --- contract


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
def test_keys_shapes_and_dtypes(shape, ndim, storage):
    out = read_transitions(make_buffer(ndim, storage), positions(ndim, shape), KEYS)
    assert set(out.keys(True, True)) == set(KEYS)
    assert out.batch_size == shape
    assert out["observation"].shape == (*shape, 3) and out["observation"].dtype == torch.float32
    assert out["goal", "position"].shape == shape and out["goal", "position"].dtype == torch.float32
    assert out["next", "terminated"].dtype == torch.bool
    assert {type(value) for value in out.values(True, True)} == {torch.Tensor}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transform", [None, Compose()], ids=["plain", "transformed"])
def test_sums_of_half_precision_rewards_do_not_overflow(dtype, transform):
    """A sum of 60,000 and 60,000 is infinite in float16."""
    steps = {"reward": torch.full((4, 1), 6e4).to(dtype), "goal": {"x": torch.ones(4, dtype=dtype)}}
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(4), transform=transform)
    buffer.extend(TensorDict(steps, batch_size=[4]))
    out = read_transitions(buffer, (torch.arange(4),), ["reward", "goal"])
    assert {x.dtype for x in out.values(True, True)} == {torch.float32}
    assert out["reward"].sum().item() == pytest.approx(4 * 6e4, rel=1e-2)


def test_optional_keys_are_read_where_they_are_there():
    out = read_transitions(make_buffer(), positions(1, (2,)), ["action"], ["count", ("a", "b")])
    assert set(out.keys(True, True)) == {"action", "count"}
    assert out["count"].dtype == torch.long


def test_a_whole_subtree_can_be_read():
    out = read_transitions(make_buffer(), positions(1, (2, 3)), ["goal"])
    assert out["goal", "position"].shape == (2, 3)
    assert out["goal", "position"].dtype == torch.float32


@pytest.mark.parametrize("ndim", [1, 2])
def test_stack_index(ndim):
    index = positions(ndim, (4, 5))
    out = stack_index(index)
    assert out.shape == ((4, 5) if ndim == 1 else (4, 5, 2)) and out.dtype == torch.long
    assert torch.equal(out.reshape(4, 5, ndim)[..., -1], index[-1])


# --- oracle: one position at a time, from the whole storage


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"transform": Compose()},
        {"transform": DoubleToFloat()},
        {"transform": lambda td: td.clone()},
        {"transform": lambda td: td.reshape(-1, 1)},
        {"collate_fn": lambda td: td.clone()},
    ],
    ids=["plain", "no transforms", "transform", "function", "reshape", "collate"],
)
@pytest.mark.parametrize("buffer", [TensorDictReplayBuffer, ReplayBuffer])
def test_values_are_those_stored(ndim, kwargs, buffer):
    buffer = make_buffer(ndim, buffer=buffer, **kwargs)
    index = positions(ndim, (3, 4))
    out = read_transitions(buffer, index, KEYS)
    whole = buffer.storage._storage
    for b in range(3):
        for t in range(4):
            at = tuple(i[b, t].item() for i in index)
            for key in KEYS:
                expected = whole[key][at]
                expected = expected.float() if expected.is_floating_point() else expected
                assert torch.equal(out[key][b, t].reshape(-1), expected.reshape(-1))


@pytest.mark.parametrize("ndim", [1, 2])
def test_transforms_are_applied_as_in_sample(ndim):
    seen = []

    def double(td):
        seen.append(td.batch_size)
        return td.set("action", td["action"] * 2)

    transform = Compose(RenameTransform(["observation"], ["obs"]), double)
    buffer = make_buffer(ndim, transform=transform)
    before = buffer.storage[:].clone()
    index = positions(ndim, (2, 5))
    out = read_transitions(buffer, index, ["obs", "action"])
    plain = read_transitions(make_buffer(ndim), index, ["observation", "action"])
    assert torch.equal(out["obs"], plain["observation"])
    assert torch.equal(out["action"], plain["action"] * 2)
    assert seen == [torch.Size([10])]
    assert (buffer.storage[:] == before).all()


def test_list_storage():
    index = positions(1, (2, 5))
    out = read_transitions(make_buffer(storage=ListStorage), index, KEYS)
    assert (out == read_transitions(make_buffer(), index, KEYS)).all()


def test_a_full_ring_is_read_to_its_end():
    buffer = make_buffer()
    buffer.extend(buffer[:10].exclude("index").clone())
    out = read_transitions(buffer, (torch.tensor([39, 0]),), ["action"])
    assert out["action"].flatten().tolist() == [3.0, 4.0]


# --- errors


@pytest.mark.parametrize("storage", [LazyTensorStorage, ListStorage])
def test_an_empty_buffer_is_an_error(storage):
    buffer = TensorDictReplayBuffer(storage=storage(4), batch_size=1)
    with pytest.raises(ValueError, match="the replay buffer is empty"):
        read_transitions(buffer, positions(1, (2,)), KEYS)


@pytest.mark.parametrize("kwargs", [{}, {"transform": DoubleToFloat()}], ids=["plain", "transform"])
def test_a_missing_key_is_named_with_those_there(kwargs):
    with pytest.raises(KeyError, match=r"next.*reward.*it has .*next.*terminated.*action"):
        read_transitions(make_buffer(**kwargs), positions(1, (2,)), ["action", ("next", "reward")])


@pytest.mark.parametrize(
    "index",
    [
        torch.zeros(2, dtype=torch.long),
        (torch.zeros(2),),
        (torch.zeros(2, dtype=torch.long),) * 2,
        (),
    ],
    ids=["tensor", "float", "too many", "empty"],
)
def test_a_wrong_index_is_an_error(index):
    with pytest.raises(TypeError, match=r"tuple of 1 LongTensor.*got"):
        read_transitions(make_buffer(), index, KEYS)


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("kwargs", [{}, {"transform": DoubleToFloat()}], ids=["plain", "transform"])
def test_unwritten_positions_are_an_error(ndim, kwargs):
    index = (torch.tensor([39]),) if ndim == 1 else (torch.tensor([19]), torch.tensor([0]))
    with pytest.raises(IndexError):
        read_transitions(make_buffer(ndim, **kwargs), index, KEYS)


def test_a_transform_that_drops_steps_is_an_error():
    with pytest.raises(ValueError, match=r"batch of size \[3\] of 6 steps"):
        read_transitions(make_buffer(transform=lambda td: td[::2]), positions(1, (2, 3)), KEYS)


def test_what_is_no_buffer_is_named():
    check_buffer(ReplayBuffer(storage=LazyTensorStorage(3)))
    with pytest.raises(TypeError, match="buffer: expected a TorchRL replay buffer, got builtins"):
        check_buffer("env")
