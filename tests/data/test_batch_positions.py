"""Which rows of a batch make a slice, and where they are stored, as HindsightGoals sees it."""

import pytest
import torch
from torchrl.data import (
    LazyTensorStorage,
    RandomSampler,
    ReplayBuffer,
    RoundRobinWriter,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
    TensorStorage,
)

from layeredrl_trl import keys
from layeredrl_trl.data import HindsightGoals, TransitionSliceSampler, read_slices
from tests.data.goal_episodes import (
    ACHIEVED,
    GOAL,
    NEXT_GOAL,
    distance,
    first_positions,
    goals_to_come,
    make_buffer,
    steps_of,
    stored_rows,
)

# --- slices of several lengths


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 12])
def test_the_length_of_slices_is_found_if_it_is_not_given(ndim, length):
    buffer = make_buffer(n_env=2, ndim=ndim, capacity=80, her_ratio=1.0, slice_len_asked=None)
    sampler = TransitionSliceSampler(slice_len=length)
    read = read_slices(buffer, sampler, 24, length, [GOAL, NEXT_GOAL])
    assert read[GOAL].shape == (24, length, 2)
    assert (read[GOAL] == read[GOAL][:, :1]).all()
    assert len(read[GOAL][:, 0].unique(dim=0)) > 8  # slices do not share a goal


@pytest.mark.parametrize("ndim", [1, 2])
def test_a_sample_that_was_drawn_before_can_be_relabelled(ndim):
    """Then ``index`` holds whole positions, of all storage dims."""
    buffer = make_buffer(n_env=2, ndim=ndim, her_ratio=0.0, capacity=90)
    hindsight = HindsightGoals(buffer.storage, 3, distance, her_ratio=1.0)
    sample = buffer.sample()
    out = hindsight(sample)
    for b, start in enumerate(first_positions(buffer, sample, 3)):
        assert tuple(out[GOAL][3 * b].tolist()) in goals_to_come(buffer.storage, start)


def test_a_storage_of_given_data():
    data = steps_of(1, 20).reshape(-1).set("index", torch.arange(20))
    hindsight = HindsightGoals(TensorStorage(data), 1, distance, her_ratio=1.0)
    out = hindsight(data)
    assert torch.equal(out[GOAL][:, 0], data[ACHIEVED][:, 0])
    assert "HindsightGoals(slice_len=1, her_ratio=1.0, strategy='future'" in repr(hindsight)


def test_a_ring_of_a_single_row():
    """Its row follows itself, and is an episode's end as well."""
    buffer = make_buffer(3, capacity=1, chunks=(1, 1), her_ratio=1.0)
    assert (buffer.sample()[GOAL] == torch.tensor([0.0, 2.0])).all()


# --- a race: what is stored goes on after a batch was drawn


def test_rows_that_are_overwritten_before_they_are_relabelled_are_no_error():
    """A buffer that reads ahead (``prefetch``) runs its transforms while it is extended."""
    buffer = make_buffer(3, capacity=20, chunks=(20,), her_ratio=1.0)
    rows = stored_rows(buffer, torch.tensor([4, 5, 6]))
    buffer.extend(steps_of(1, 6, start=20).reshape(-1))  # the cursor is within the slice now
    out = buffer.transform[0](rows)
    assert (out[GOAL] == out[GOAL][0]).all()
    assert torch.equal(out[keys.NEXT_REWARD], distance(out).float())


@pytest.mark.parametrize("ndim", [1, 2])
def test_a_buffer_that_reads_ahead(ndim):
    storage = LazyTensorStorage(60, ndim=ndim)
    sampler = TransitionSliceSampler(slice_len=3)
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, prefetch=3, batch_size=30)
    buffer.append_transform(HindsightGoals(storage, 3, distance, her_ratio=1.0))
    for start in range(0, 200, 8):
        data = steps_of(2, 8, start=start)
        buffer.extend(data if ndim == 2 else data.reshape(-1))
        goals = buffer.sample()[GOAL].reshape(10, 3, 2)
        assert (goals == goals[:, :1]).all()


# --- errors


@pytest.mark.parametrize("ndim", [1, 2])
def test_rows_that_do_not_follow_each_other_are_refused(ndim):
    data = {"n_env": 2, "ndim": ndim, "capacity": 90}
    for sampler in (RandomSampler(), TransitionSliceSampler(slice_len=2)):
        buffer = make_buffer(3, sampler=sampler, **data, batch_size=96)
        with pytest.raises(ValueError, match=r"slice_len=3 consecutive steps.*slice_len=None"):
            buffer.sample()
    buffer = make_buffer(4, slice_len_asked=3, **data, batch_size=64)
    with pytest.raises(ValueError, match="slice_len=3 steps, got a batch of 64 steps"):
        buffer.sample()


@pytest.mark.parametrize("rows", [[0, 1, 3], [5, 4, 3], [4, 4, 5], [39, 0, 1], [4, 5, 4]], ids=str)
def test_what_is_no_slice(rows):
    buffer = make_buffer(3)  # of 40 rows, not full: none comes after the last
    with pytest.raises(ValueError, match="slice_len=3 consecutive steps"):
        buffer.transform[0](stored_rows(buffer, torch.tensor(rows)))


def test_rows_of_two_envs_are_no_slice():
    buffer = make_buffer(2, n_env=2, ndim=2)
    rows = buffer.storage[:][torch.tensor([4, 5]), torch.tensor([0, 1])]
    with pytest.raises(ValueError, match="slice_len=2 consecutive steps"):
        buffer.transform[0](rows)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x: x.exclude("index"), KeyError, "no 'index'.*TensorDictRoundRobinWriter"),
        (lambda x: x.exclude(GOAL), KeyError, "the batch has no 'desired_goal'; it has"),
        (lambda x: x.exclude(keys.NEXT_REWARD), KeyError, r"no \('next', 'reward'\)"),
        (lambda x: x.exclude(keys.NEXT_TERMINATED), KeyError, r"no \('next', 'terminated'\)"),
        (lambda x: x.set("index", x["index"] + 900), ValueError, "not the position of the rows"),
        (lambda x: x.set("index", -x["index"] - 1), ValueError, "not the position of the rows"),
        (lambda x: x.set("index", x["index"].expand(3, 3)), ValueError, r"shape \[3\], got \[3, 3"),
        (lambda x: x.set(GOAL, x[GOAL][:, :1]), ValueError, r"achieved goal, \[2\], got \[1\]"),
        (lambda x: x.reshape(1, 1, 3), ValueError, r"got batch size \[1, 1, 3\]"),
        (lambda x: x[0], ValueError, r"got batch size \[\]"),
        (lambda x: x.reshape(3, 1), ValueError, "slice_len=3, but.*slices of 1 steps"),
    ],
)
def test_bad_batches(change, error, text):
    buffer = make_buffer(3, her_ratio=1.0, terminated_fn=lambda x: x[keys.NEXT_DONE])
    rows = stored_rows(buffer, torch.tensor([10, 11, 12]))
    with pytest.raises(error, match=text):
        buffer.transform[0](change(rows))


def test_a_writer_that_stores_no_positions():
    storage, sampler = LazyTensorStorage(60), TransitionSliceSampler(slice_len=3)
    buffer = ReplayBuffer(storage=storage, sampler=sampler, batch_size=6, writer=RoundRobinWriter())
    buffer.append_transform(HindsightGoals(storage, 3, distance))
    buffer.extend(steps_of(1, 40).reshape(-1))
    with pytest.raises(KeyError, match="TensorDictRoundRobinWriter"):
        buffer.sample()


def test_positions_that_are_those_of_another_buffer():
    """A writer that keeps ``index`` as it comes would have goals of other episodes drawn."""
    source = make_buffer()
    storage, sampler = LazyTensorStorage(60), TransitionSliceSampler(slice_len=3)
    buffer = ReplayBuffer(storage=storage, sampler=sampler, batch_size=6, writer=RoundRobinWriter())
    buffer.append_transform(HindsightGoals(storage, 3, distance))
    buffer.extend(source.storage[:][5:35])
    with pytest.raises(ValueError, match="'index' is not the position of the rows"):
        buffer.sample()


def test_two_dims_need_the_transform_before_the_data():
    buffer = make_buffer(n_env=2, ndim=2)
    late = TensorDictReplayBuffer(
        storage=LazyTensorStorage(60, ndim=2),
        sampler=TransitionSliceSampler(slice_len=3),
        batch_size=6,
    )
    late.extend(steps_of(2, 20))
    late.append_transform(HindsightGoals(late.storage, 3, distance))
    with pytest.raises(KeyError, match=r"\('hindsight', 'lane'\).*append it to the buffer before"):
        late.sample()
    buffer.sample()


@pytest.mark.parametrize("dim_extend", [0, 1])
def test_lanes_in_every_way_of_storing_envs(dim_extend):
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(60, ndim=2),
        sampler=TransitionSliceSampler(slice_len=3),
        dim_extend=dim_extend,
        batch_size=30,
    )
    buffer.append_transform(HindsightGoals(buffer.storage, 3, distance, her_ratio=1.0))
    data = steps_of(3, 12)
    buffer.extend(data if dim_extend else data.transpose(0, 1).contiguous())
    assert (buffer.storage[:]["hindsight", "lane"] == torch.arange(3)).all()
    assert buffer.storage.shape == (12, 3)
    sample = buffer.sample()
    for b, start in enumerate(first_positions(buffer, sample, 3)):
        assert tuple(sample[GOAL][3 * b].tolist()) in goals_to_come(buffer.storage, start)


@pytest.mark.filterwarnings("ignore:Using `add\\(\\)` with a TensorDict")
def test_steps_of_several_envs_that_are_added_one_at_a_time():
    storage, sampler = LazyTensorStorage(60, ndim=2), TransitionSliceSampler(slice_len=3)
    writer = TensorDictRoundRobinWriter()
    buffer = ReplayBuffer(storage=storage, sampler=sampler, batch_size=30, writer=writer)
    buffer.append_transform(HindsightGoals(storage, 3, distance, her_ratio=1.0))
    for i in range(12):
        buffer.add(steps_of(3, 1, start=i)[:, 0])
    assert (storage[:]["hindsight", "lane"] == torch.arange(3)).all()
    goals = buffer.sample()[GOAL].reshape(10, 3, 2)
    assert (goals == goals[:, :1]).all() and (goals >= 0).all()
