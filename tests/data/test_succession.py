"""Warnings of data whose consecutive rows are no consecutive steps, from real collectors."""

import warnings

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs import GymEnv, SerialEnv

from layeredrl_trl.data import TransitionSliceSampler, warn_of_gaps
from layeredrl_trl.data.succession import describe_gaps
from tests.small_predictors import learn, small_predictor

JOINED = "Slices join steps that do not follow each other"
SINGLE = "Most slices have a single step"
NEXT = ("next", "observation")


def episode(first: float, n: int = 50) -> TensorDict:
    """Steps of an unfinished episode that nothing marks; observations are numbers of steps."""
    number = torch.arange(first, first + n + 1.0).unsqueeze(-1).repeat(1, 3)
    flags = {key: torch.zeros(n, 1).bool() for key in ("terminated", "truncated", "done")}
    reached = {"observation": number[1:], "reward": torch.zeros(n, 1), **flags}
    data = {"observation": number[:-1], "action": torch.zeros(n, 1), "next": reached}
    return TensorDict(data, batch_size=[n])


def envs(n: int, length: int = 10) -> TensorDict:
    """Steps ``[n, length]`` of n envs."""
    return torch.stack([episode(1000.0 * i, length) for i in range(n)])


def buffer_of(*data: TensorDict, storage=LazyTensorStorage, size=500, **options):
    buffer = TensorDictReplayBuffer(storage=storage(size, **options))
    for one in data:
        buffer.extend(one)
    return buffer


def gaps(buffer, **options):
    sampler = TransitionSliceSampler(slice_len=1, **options)
    return describe_gaps(buffer.storage, sampler, "observation", NEXT)


def collected(n, frames_per_batch, ids=True, ndim=1, total=240, kind=TensorDictReplayBuffer):
    env = SerialEnv(n, lambda: GymEnv("Pendulum-v1")) if n > 1 else GymEnv("Pendulum-v1")
    buffer = kind(storage=LazyTensorStorage(1000, ndim=ndim))
    for data in Collector(env, None, frames_per_batch=frames_per_batch, total_frames=total):
        data = data if ids else data.exclude("collector")
        buffer.extend(data if ndim == 2 else data.reshape(-1))
    return buffer


# --- what is right is passed over


@pytest.mark.parametrize(
    "make",
    [
        lambda: collected(1, 20),
        lambda: collected(1, 1, total=40),
        lambda: collected(1, 20, ids=False),
        lambda: collected(4, 40, ndim=2),
        lambda: collected(4, 8, ndim=2),
        lambda: collected(4, 4, ndim=2, kind=ReplayBuffer),
        lambda: collected(4, 120),  # rows of 30 steps
        lambda: buffer_of(episode(0)),
        lambda: buffer_of(episode(0), storage=LazyMemmapStorage),
        lambda: buffer_of(episode(0, 400), episode(400, 300)),  # a ring that was written over
        lambda: buffer_of(envs(4), ndim=2),
        lambda: buffer_of(episode(0, 1)),
    ],
)
def test_data_stored_as_they_should_be_give_no_warning(make):
    assert gaps(make()) == ""


def test_ends_that_are_marked_are_no_gaps():
    one_step_episodes = torch.cat([episode(100.0 * i, 1) for i in range(50)])
    one_step_episodes["next", "terminated"].fill_(True)
    assert gaps(buffer_of(one_step_episodes)) == ""
    rollouts = torch.cat([episode(100.0 * i, 20) for i in range(5)])
    rollouts["next", "truncated"][19::20] = True
    assert gaps(buffer_of(rollouts)) == ""


def test_nan_is_the_same_as_nan():
    data = episode(0)
    data["observation"][10] = torch.nan
    data["next", "observation"][9] = torch.nan
    assert gaps(buffer_of(data)) == ""


def test_made_up_data_say_nothing_of_what_follows_what():
    data = episode(0)
    for key in ("observation", NEXT):
        data[key] = torch.randn(50, 3)
    assert gaps(buffer_of(data)) == ""


# --- what is wrong is named


def test_steps_of_several_envs_in_turn_have_slices_of_one_step():
    text = gaps(collected(20, 20))
    assert text.startswith(SINGLE) and "ndim=2" in text


def test_steps_of_several_envs_in_turn_without_ids_were_joined():
    text = gaps(collected(20, 20, ids=False))
    assert text.startswith(JOINED) and "of the row 20 further on" in text and "ndim=2" in text


def test_a_few_unmarked_ends_are_found():
    text = gaps(buffer_of(episode(0), episode(1000), episode(2000)))
    assert text.startswith(f"{JOINED}: in 2 of 149 looked at") and "set_truncated" in text


@pytest.mark.parametrize(("length", "n_rows"), [(2, 8192), (8, 8192), (16, 16384), (4, 32768)])
def test_batches_of_a_regular_length_hid_their_joints(length, n_rows):
    """Rows that were looked at in even steps always fell on the same step of a batch."""
    batches = [
        torch.cat([episode(1e5 * env + i * length, length) for env in range(4)])
        for i in range(n_rows // (4 * length))
    ]
    assert gaps(buffer_of(torch.cat(batches), size=n_rows)).startswith(JOINED)


def test_all_envs_of_a_storage_of_two_dims_are_looked_at():
    data = envs(4, 4096)
    data[3]["observation"][:] = data[3]["observation"].roll(1, 0)
    assert gaps(buffer_of(data, size=4 * 4096, ndim=2)).startswith(JOINED)


def test_an_observation_that_transforms_make_is_looked_at_by_its_parts():
    """A goal that never changes tells nothing, a part that fits by chance too little."""
    in_turn = torch.cat([*envs(4, 20).unbind(1)])
    for data, expected in ((episode(0), ""), (in_turn, JOINED)):
        data.rename_key_("observation", "position").rename_key_(NEXT, ("next", "position"))
        data["desired_goal"] = data["next", "desired_goal"] = torch.zeros(len(data), 2)
        assert gaps(buffer_of(data)).startswith(expected)
        assert bool(gaps(buffer_of(data))) is bool(expected)


def test_single_steps_are_found_without_any_observation():
    data = collected(20, 20).storage[:].exclude("observation", NEXT)
    assert gaps(buffer_of(data)).startswith(SINGLE)


def test_shuffled_rows_are_found():
    text = gaps(buffer_of(episode(0)[torch.randperm(50)]))
    assert text.startswith(JOINED) and "further on" not in text


def test_columns_of_time_and_env_in_the_wrong_order_are_found():
    """Storages of two dims have time first; ``extend`` turns ``[N, T]`` round, not ``[T, N]``."""
    assert gaps(buffer_of(envs(4).transpose(0, 1), ndim=2)).startswith(JOINED)


def test_ids_that_change_at_each_row_cut_everything():
    data = episode(0)
    data["collector", "traj_ids"] = torch.arange(50)
    assert gaps(buffer_of(data)).startswith(SINGLE)


# --- when it is said


def test_learning_warns_once_of_a_storage_and_still_learns():
    buffer, predictor = collected(20, 20, ids=False), small_predictor(n_steps=3)
    with pytest.warns(UserWarning, match=JOINED):
        learn(predictor, buffer)
    learn(predictor, buffer)
    learn(small_predictor(n_steps=3), buffer)
    with pytest.warns(UserWarning, match=JOINED):
        learn(predictor, collected(20, 20, ids=False))


def test_learning_single_steps_needs_no_consecutive_rows():
    learn(small_predictor(), collected(20, 20, ids=False))


def test_what_comes_later_is_looked_at_when_the_data_have_doubled():
    buffer, predictor = buffer_of(episode(0)), small_predictor(n_steps=3)
    learn(predictor, buffer)
    buffer.extend(episode(1000, 40))
    learn(predictor, buffer)
    buffer.extend(episode(2000, 40))
    with pytest.warns(UserWarning, match=JOINED):
        learn(predictor, buffer)


def test_entries_of_another_name_are_looked_at():
    data = episode(0).rename_key_("observation", "state")
    data.rename_key_(NEXT, ("next", "state"))
    buffer = buffer_of(data, data.clone())
    sampler = TransitionSliceSampler(slice_len=1)
    with pytest.warns(UserWarning, match=r"\('next', 'state'\)' is not 'state'|is not 'state'"):
        warn_of_gaps(buffer, sampler, "state", ("next", "state"))


def test_looking_draws_no_random_number():
    buffer = buffer_of(episode(0), episode(1000))
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = TransitionSliceSampler(slice_len=1)
        warn_of_gaps(buffer, sampler, "observation", NEXT)
    assert torch.rand(()) == expected
