"""TransitionSliceSampler: contract, oracle, properties, errors, state."""

import inspect
import pickle
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    SliceSampler,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.envs import GymEnv, InitTracker, SerialEnv, TransformedEnv

from layeredrl_trl.data import TransitionSliceSampler
from tests.largest_tensor import LargestNewTensor

MASK = ("collector", "mask")
TRAJ = ("collector", "traj_ids")
ENDS = (("next", "done"), ("next", "terminated"), ("next", "truncated"))
# which entries a buffer may keep to tell where an episode ends
SIGNALS = {
    "done": ENDS[:1],
    "terminated+truncated": ENDS[1:],
    "all flags": ENDS,
    "traj_ids": (TRAJ,),
    "episode": ("episode",),
    "is_init": (TRAJ, "is_init"),
    "everything": (*ENDS, TRAJ, "is_init"),
}


# --- problem: streams of steps of several envs, and the slow oracle


@dataclass
class Stream:
    """Endless steps of ``n_env`` envs; every step knows its env, number and episode."""

    n_env: int
    lengths: list[int]
    step: list[list[tuple]] = field(default_factory=list)

    def __post_init__(self):
        self.cursor = [0] * self.n_env  # steps given out
        self.episode = [e * 1000 for e in range(self.n_env)]
        self.age = [-e for e in range(self.n_env)]  # envs end at different times

    def take(self, n: int) -> TensorDict:
        """The next n steps of every env, ``[n_env, n]``."""
        rows = [[self._next(e) for _ in range(n)] for e in range(self.n_env)]
        env, number, episode, first, last = torch.tensor(rows).unbind(-1)
        last, first = last.bool().unsqueeze(-1), first.bool().unsqueeze(-1)
        by_time = episode.unsqueeze(-1) % 2 == 1
        return TensorDict(
            {
                "env": env,
                "number": number,
                "episode_of_step": episode,
                "episode": episode,
                "is_init": first,
                "collector": {"traj_ids": episode},
                "next": {
                    "done": last,
                    "terminated": last & ~by_time,
                    "truncated": last & by_time,
                },
            },
            batch_size=[self.n_env, n],
        )

    def _next(self, e):
        length = self.lengths[self.episode[e] % 1000 % len(self.lengths)] + e
        row = (e, self.cursor[e], self.episode[e], self.age[e] == -e, self.age[e] == length - e - 1)
        self.cursor[e] += 1
        self.age[e] += 1
        if row[-1]:
            self.episode[e] += 1
            self.age[e] = -e
        return row


def filled_buffer(
    stream, capacity, chunks, signals="everything", ndim=1, storage=LazyTensorStorage, **kwargs
):
    """A buffer extended in chunks; with ndim 1 the rows of the envs lie one after the other."""
    kwargs = {"sampler": TransitionSliceSampler(slice_len=2), "batch_size": 2, **kwargs}
    # TensorDictReplayBuffer 0.14.1 cannot extend a storage of two dims by a single time step
    buffer_class = ReplayBuffer if ndim == 2 and 1 in chunks else TensorDictReplayBuffer
    buffer = buffer_class(storage=storage(capacity, ndim=ndim), **kwargs)
    for n in chunks:
        data = stream.take(n).select("env", "number", "episode_of_step", *SIGNALS[signals])
        buffer.extend(data if ndim == 2 else data.reshape(-1))
    return buffer


def slice_oracle(storage, start, slice_len):
    """Walk from one position: the next row continues if it holds the env's very next step."""
    data = storage[:]
    rows = data.shape[0]
    position, positions, mask = tuple(start), [tuple(start)], [True]

    def identity(p):
        return tuple(data[key][p].item() for key in ("env", "number", "episode_of_step"))

    while len(positions) < slice_len:
        following = ((position[0] + 1) % rows, *position[1:])
        env, number, episode = identity(position)
        go_on = mask[-1] and identity(following) == (env, number + 1, episode)
        position = following if go_on else position
        positions.append(position)
        mask.append(go_on)
    return positions, mask


def every_start(storage):
    grids = torch.meshgrid(*map(torch.arange, storage.shape), indexing="ij")
    return tuple(grid.flatten() for grid in grids)


def assert_like_oracle(sampler, storage, slice_len):
    starts = every_start(storage)
    index, mask = sampler.slices_from(storage, starts, slice_len)
    assert len(index) == storage.ndim
    for b, start in enumerate(zip(*(i.tolist() for i in starts), strict=True)):
        positions, real = slice_oracle(storage, start, slice_len)
        assert list(zip(*(i[b].tolist() for i in index), strict=True)) == positions
        assert mask[b].tolist() == real


# --- contract


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("kind", ["slice_len", "num_slices"])
@pytest.mark.parametrize("buffer_class", [TensorDictReplayBuffer, ReplayBuffer])
def test_a_batch_is_flat_and_rectangular(ndim, kind, buffer_class):
    sampler = TransitionSliceSampler(**{kind: 5 if kind == "slice_len" else 4})
    buffer = buffer_class(storage=LazyTensorStorage(60, ndim=ndim), sampler=sampler, batch_size=20)
    data = Stream(2, [3, 7]).take(25)
    buffer.extend(data if ndim == 2 else data.reshape(-1))
    batch, info = buffer.sample(return_info=True)
    assert isinstance(sampler, SliceSampler)
    assert batch.batch_size == (20,)
    assert info[MASK].shape == (20, 1) and info[MASK].dtype == torch.bool
    assert set(info) == {MASK, "index"}
    if buffer_class is TensorDictReplayBuffer:
        assert batch[MASK].shape == (20, 1)
        stored = buffer.storage[tuple(batch["index"].unbind(-1))]
        assert (batch["number"] == stored["number"]).all()
    slices = batch.reshape(4, 5)
    steps = slices["number"] - slices["number"][:, :1]
    mask = info[MASK].reshape(4, 5)
    assert (steps == torch.minimum(torch.arange(5), mask.sum(-1, keepdim=True) - 1)).all()
    assert (slices["episode_of_step"] == slices["episode_of_step"][:, :1]).all()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("slice_len", [1, 4])
def test_shapes_and_dtypes_of_sample_slices(n, slice_len):
    buffer = filled_buffer(Stream(3, [4]), 30, [8], ndim=2)
    index, mask = buffer.sampler.sample_slices(buffer.storage, n, slice_len)
    assert [i.shape for i in index] == [(n, slice_len)] * 2
    assert {i.dtype for i in index} == {torch.long}
    assert mask.shape == (n, slice_len) and mask.dtype == torch.bool and mask[:, 0].all()


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("prefetch", [None, 2])
def test_what_is_stored_comes_out_untouched(storage, prefetch):
    buffer = filled_buffer(
        Stream(1, [1, 5, 2]),
        40,
        [37],
        storage=storage,
        prefetch=prefetch,
        batch_size=64,
        sampler=TransitionSliceSampler(slice_len=4),
    )
    before = buffer.storage[:].clone()
    for _ in range(3):
        batch = buffer.sample()
        stored = before[batch["index"].squeeze(-1)]
        for key in (*ENDS, "is_init", TRAJ):
            assert (batch[key] == stored[key]).all()
    assert (buffer.storage[:] == before).all()


def test_flags_without_a_feature_dim():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(9), batch_size=1)
    done = torch.tensor([False, True, False, False, True, False, False])
    buffer.extend(TensorDict({"next": {"done": done}}, [7]))
    starts = (torch.arange(7),)
    _, mask = TransitionSliceSampler(slice_len=1).slices_from(buffer.storage, starts, 3)
    assert mask.sum(-1).tolist() == [2, 1, 3, 2, 1, 2, 1]


# --- oracle


@st.composite
def buffers(draw):
    ndim, n_env = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3)]))
    stream = Stream(n_env, draw(st.lists(st.integers(1, 8), min_size=1, max_size=5)))
    names = sorted(SIGNALS)
    if ndim == 1 and n_env > 1:  # only an id tells flattened rows apart
        names = [name for name in names if {TRAJ, "episode"} & set(SIGNALS[name])]
    rows = draw(st.integers(1, 30))
    chunks = draw(st.lists(st.integers(1, rows), min_size=1, max_size=6))
    return filled_buffer(stream, rows * n_env, chunks, draw(st.sampled_from(names)), ndim)


@settings(max_examples=150, deadline=None)
@given(buffers(), st.integers(1, 12))
def test_slices_from_every_start_match_the_oracle(buffer, slice_len):
    assert_like_oracle(buffer.sampler, buffer.storage, slice_len)


@settings(max_examples=50, deadline=None)
@given(buffers(), st.integers(1, 12), st.integers(1, 9))
def test_sampled_slices_are_those_of_their_starts(buffer, slice_len, n):
    index, mask = buffer.sampler.sample_slices(buffer.storage, n, slice_len)
    starts = tuple(i[:, 0] for i in index)
    again, mask_again = buffer.sampler.slices_from(buffer.storage, starts, slice_len)
    assert all((a == b).all() for a, b in zip(index, again, strict=True))
    assert (mask == mask_again).all()


@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize(("ndim", "n_env"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("chunks", [[17], [20, 9]], ids=["not full", "wrapped"])
def test_every_signal_matches_the_oracle(signals, ndim, n_env, chunks):
    buffer = filled_buffer(Stream(n_env, [3, 1, 5]), 20 * n_env, chunks, signals, ndim)
    assert_like_oracle(buffer.sampler, buffer.storage, 7)


@pytest.mark.parametrize(
    ("capacity", "chunks"),
    [
        pytest.param(10, [1], id="one transition"),
        pytest.param(1, [1], id="capacity one"),
        pytest.param(10, [10], id="exactly full"),
        pytest.param(10, [10, 1], id="one over"),
        pytest.param(10, [10, 10], id="written twice"),
        pytest.param(10, [6, 6, 6], id="wrapped"),
    ],
)
@pytest.mark.parametrize("lengths", [[1], [3, 1, 2], [100]], ids=str)
@pytest.mark.parametrize("ndim", [1, 2])
def test_edges_of_the_ring_match_the_oracle(capacity, chunks, lengths, ndim):
    buffer = filled_buffer(Stream(1, lengths), capacity, chunks, ndim=ndim)
    for slice_len in (1, 2, 9, 10, 11, 25):
        assert_like_oracle(buffer.sampler, buffer.storage, slice_len)


def test_a_storage_given_at_construction_does_not_wrap():
    data = Stream(1, [100]).take(6).reshape(-1).select(*SIGNALS["done"])
    _, mask = TransitionSliceSampler(slice_len=1).slices_from(
        TensorStorage(data), (torch.arange(6),), 4
    )
    assert mask.sum(-1).tolist() == [4, 4, 4, 3, 2, 1]


@pytest.mark.parametrize("ndim", [1, 2])
def test_real_collector_with_two_envs_matches_the_oracle(ndim):
    env = SerialEnv(2, lambda: TransformedEnv(GymEnv("CartPole-v1"), InitTracker()))
    collector = Collector(env, frames_per_batch=60, total_frames=240)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(200, ndim=ndim),
        sampler=TransitionSliceSampler(slice_len=6),
        batch_size=60,
    )
    counters = torch.zeros(2, dtype=torch.long)
    for data in collector:
        assert data.shape == (2, 30)
        data["env"] = torch.arange(2).unsqueeze(-1).expand(2, 30)
        data["number"] = counters.unsqueeze(-1) + torch.arange(30)
        data["episode_of_step"] = data[TRAJ]
        counters += 30
        buffer.extend(data if ndim == 2 else data.reshape(-1))
    collector.shutdown()
    assert_like_oracle(buffer.sampler, buffer.storage, 6)
    batch = buffer.sample().reshape(10, 6)
    real = batch[MASK][:, 1:].squeeze(-1)
    following, now = batch["observation"][:, 1:], batch["next", "observation"][:, :-1]
    assert real.any() and torch.equal(following[real], now[real])


# --- property


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("chunks", [[17], [20, 13]], ids=["not full", "wrapped"])
def test_starts_are_uniform_over_stored_transitions(ndim, chunks):
    torch.manual_seed(0)
    buffer = filled_buffer(Stream(2, [4, 1, 6]), 40, chunks, ndim=ndim)
    stored = buffer.storage.shape.numel()
    n = 500 * stored
    index, mask = buffer.sampler.sample_slices(buffer.storage, n, 5)
    first = [i[:, 0] for i in index]
    flat = first[0] if ndim == 1 else first[0] * 2 + first[1]
    counts = torch.bincount(flat, minlength=stored).double()
    assert counts.shape == (stored,)
    chi_square = ((counts - 500) ** 2 / 500).sum().item()
    # 99.9 % quantile, Wilson and Hilferty's approximation
    df = stored - 1
    assert chi_square < df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3
    # the last steps of episodes included: a slice with j real steps starts j - 1 before the end
    _, expected = buffer.sampler.slices_from(buffer.storage, every_start(buffer.storage), 5)
    share = torch.bincount(expected.sum(-1), minlength=6) / stored
    assert torch.allclose(torch.bincount(mask.sum(-1), minlength=6) / n, share, atol=0.02)
    assert share[1] > 0.1


@pytest.mark.parametrize("ndim", [1, 2])
def test_stored_padding_is_never_real_nor_a_start(ndim):
    torch.manual_seed(0)
    # two rows of 5 and 3 real steps, padded to 8, as split_trajectories pads
    data = TensorDict(
        {
            "next": {"done": torch.zeros(2, 8, 1, dtype=torch.bool)},
            "collector": {"mask": torch.arange(8) < torch.tensor([[5], [3]])},
        },
        batch_size=[2, 8],
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(30, ndim=ndim),
        sampler=TransitionSliceSampler(slice_len=3),
        batch_size=3 * 4000,
    )
    buffer.extend(data if ndim == 2 else data.reshape(-1))
    stored = buffer.storage[:][MASK]
    index, mask = buffer.sampler.slices_from(buffer.storage, every_start(buffer.storage), 3)
    assert (stored[index][mask]).all()
    assert not mask[~stored.flatten()].any()
    assert mask.sum() == (3 + 3 + 3 + 2 + 1) + (3 + 2 + 1)
    _, single = buffer.sampler.slices_from(buffer.storage, every_start(buffer.storage), 1)
    assert torch.equal(single[:, 0], stored.flatten())
    batch = buffer.sample()
    starts = batch.reshape(-1, 3)[:, 0]
    assert starts[MASK].all()
    flat = starts["index"].squeeze(-1) if ndim == 1 else starts["index"] @ torch.tensor([1, 8])
    counts = torch.bincount(flat, minlength=16)
    assert ((counts[counts > 0] - 500).abs() < 100).all() and (counts > 0).sum() == 8


def test_a_buffer_of_nothing_but_padding_is_wholly_masked():
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(5), sampler=TransitionSliceSampler(slice_len=2), batch_size=4
    )
    no = torch.zeros(5, 1, dtype=torch.bool)
    buffer.extend(TensorDict({"next": {"done": no}, "collector": {"mask": no}}, [5]))
    assert not buffer.sample()[MASK].any()


@pytest.mark.parametrize("changed", ["init_key", "traj_key", "end_keys"])
def test_each_signal_alone_is_a_boundary(changed):
    no = torch.zeros(6, 1, dtype=torch.bool)
    mark = torch.arange(6).unsqueeze(-1) == 3
    data = {
        "first": mark if changed == "init_key" else no,
        "last": mark.roll(-1, 0) if changed == "end_keys" else no,
        "id": mark.cumsum(0) if changed == "traj_key" else no.long(),
    }
    sampler = TransitionSliceSampler(
        slice_len=1, end_keys=["last", "absent"], traj_key="id", init_key="first"
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(9), batch_size=1)
    buffer.extend(TensorDict(data, [6]))
    _, mask = sampler.slices_from(buffer.storage, (torch.arange(6),), 9)
    assert mask.sum(-1).tolist() == [3, 2, 1, 3, 2, 1]


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("chunks", [[600], [600, 600]], ids=["not full", "wrapped"])
def test_cost_does_not_depend_on_the_size_of_the_buffer(ndim, chunks):
    buffer = filled_buffer(Stream(2, [9]), 2000, chunks, ndim=ndim)
    with LargestNewTensor() as largest:
        buffer.sampler.sample_slices(buffer.storage, 8, 4)
    assert 0 < largest.numel <= 8 * 4


# --- errors


def _buffer_of(data, storage=LazyTensorStorage, **kwargs):
    buffer = TensorDictReplayBuffer(
        storage=storage(8, **kwargs), sampler=TransitionSliceSampler(slice_len=2), batch_size=4
    )
    buffer.extend(data)
    return buffer


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({}, TypeError, "exactly one of slice_len and num_slices"),
        ({"slice_len": 2, "num_slices": 2}, TypeError, "slice_len=2 and num_slices=2"),
        ({"slice_len": 0}, ValueError, "slice_len must be at least 1, got 0"),
        ({"num_slices": -1}, ValueError, "num_slices must be .* got -1"),
        ({"slice_len": 2.0}, TypeError, "slice_len must be an integer, got 2.0"),
        ({"slice_len": 2, "end_keys": []}, ValueError, "end_keys is empty"),
        ({"slice_len": 2, "end_keys": "done"}, TypeError, r"end_keys must be .* as in \['done'\]"),
        ({"slice_len": 2, "end_keys": [3]}, TypeError, r"end_keys\[0\] must be a string or"),
        ({"slice_len": 2, "traj_key": 3}, TypeError, "traj_key must be a string or a tuple"),
        ({"slice_len": 2, "init_key": ["x"]}, TypeError, "init_key must be a string or a tuple"),
    ],
)
def test_bad_arguments(kwargs, error, text):
    with pytest.raises(error, match=text):
        TransitionSliceSampler(**kwargs)


def test_help_shows_the_arguments_and_not_those_of_a_metaclass():
    names = list(inspect.signature(TransitionSliceSampler).parameters)
    assert names == ["slice_len", "num_slices", "end_keys", "traj_key", "init_key"]


def test_an_empty_storage_is_an_error():
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(8), sampler=TransitionSliceSampler(slice_len=2), batch_size=4
    )
    assert not buffer.can_sample()
    with pytest.raises(ValueError, match="storage of the replay buffer is empty"):
        buffer.sample()
    buffer.extend(Stream(1, [3]).take(4).reshape(-1))
    assert buffer.can_sample() and buffer.sample().shape == (4,)
    buffer.empty()
    assert not buffer.can_sample()
    with pytest.raises(ValueError, match="empty"):
        buffer.sample()


@pytest.mark.parametrize("kwargs", [{"slice_len": 3}, {"num_slices": 3}])
def test_a_batch_size_that_does_not_divide_is_an_error(kwargs):
    buffer = filled_buffer(Stream(1, [3]), 9, [5], sampler=TransitionSliceSampler(**kwargs))
    text = f"multiple of {next(iter(kwargs))}=3, got 2"
    with pytest.raises(ValueError, match=text):
        buffer.sample()
    with pytest.raises(ValueError, match=text):
        buffer.can_sample()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({}, r"next.*done.*traj_ids.*episode.*there are \[.*observation"),
        ({"end_keys": ["over"]}, r"end_keys \['over'\]"),
        ({"traj_key": ("a", "b")}, r"traj_key \('a', 'b'\).*there are"),
    ],
)
def test_no_stored_key_that_tells_the_end(kwargs, text):
    buffer = _buffer_of(TensorDict({"observation": torch.zeros(4, 1)}, [4]))
    with pytest.raises(KeyError, match=text):
        TransitionSliceSampler(slice_len=2, **kwargs).sample(buffer.storage, 4)


def test_list_storage_is_an_error():
    with pytest.raises(TypeError, match=r"LazyTensorStorage.*got ListStorage"):
        _buffer_of(Stream(1, [3]).take(4).reshape(-1), ListStorage).sample()


def test_elements_that_are_batches_are_an_error():
    with pytest.raises(ValueError, match=r"batch size \[8, 3\].*ndim=1.*ndim=2"):
        _buffer_of(Stream(3, [3]).take(4).transpose(0, 1)).sample()


@pytest.mark.parametrize(
    ("start", "error", "text"),
    [
        (torch.tensor([0]), TypeError, "tuple of 1 LongTensor"),
        ((torch.tensor([0]), torch.tensor([0])), TypeError, "tuple of 1 LongTensor"),
        ((torch.tensor([0.0]),), TypeError, "tuple of 1 LongTensor"),
        ((torch.tensor([4]),), IndexError, r"within the stored \[4\]"),
        ((torch.tensor([-1, 2]),), IndexError, "got -1 to 2"),
    ],
)
def test_bad_starts(start, error, text):
    buffer = _buffer_of(Stream(1, [3]).take(4).reshape(-1))
    with pytest.raises(error, match=text):
        buffer.sampler.slices_from(buffer.storage, start, 2)


# --- state


@pytest.mark.parametrize("way", ["state_dict", "dumps", "pickle"])
@pytest.mark.parametrize("ndim", [1, 2])
def test_no_slice_crosses_the_cursor_of_a_ring_restored_from_a_checkpoint(way, ndim, tmp_path):
    buffer = filled_buffer(Stream(1, [100]), 10, [7, 6], "done", ndim)
    if way == "pickle":
        restored = pickle.loads(pickle.dumps(buffer))
    else:
        # it had another cursor before
        restored = filled_buffer(Stream(1, [100]), 10, [10], "done", ndim)
        if way == "state_dict":
            restored.load_state_dict(buffer.state_dict())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                buffer.dumps(tmp_path)
                restored.loads(tmp_path)
    starts = every_start(restored.storage)
    index, mask = restored.sampler.slices_from(restored.storage, starts, 10)
    number = restored.storage[:]["number"][index]
    assert (number.diff() == 1)[mask[:, 1:]].all()


def test_sampler_state():
    sampler = TransitionSliceSampler(slice_len=3, end_keys=[("next", "done")], init_key=None)
    sampler.load_state_dict(sampler.state_dict())
    again = pickle.loads(pickle.dumps(sampler))
    assert repr(again) == repr(sampler)
    assert "slice_len=3" in repr(again) and "('next', 'done')" in repr(again)


def test_the_generator_of_the_buffer_is_used():
    def draw():
        generator = torch.Generator().manual_seed(3)
        buffer = filled_buffer(Stream(1, [3]), 50, [40], generator=generator, batch_size=20)
        return buffer.sample()["number"]

    torch.manual_seed(0)
    first = draw()
    assert torch.equal(first, draw())


@pytest.mark.gpu
@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
@pytest.mark.parametrize("ndim", [1, 2])
def test_storage_on_cuda(device, ndim):
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(40, ndim=ndim, device="cuda:0"),
        sampler=TransitionSliceSampler(slice_len=4),
        batch_size=32,
        generator=None if device is None else torch.Generator(device).manual_seed(0),
    )
    data = Stream(2, [3, 5]).take(15)
    buffer.extend(data if ndim == 2 else data.reshape(-1))
    assert buffer.sample().device.type == "cuda"
    index, mask = buffer.sampler.sample_slices(buffer.storage, 8, 4)
    assert mask.is_cuda and all(i.is_cuda for i in index)
