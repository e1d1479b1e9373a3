"""Episodes whose every state is a goal of its own, in buffers that relabel; the slow oracle."""

import itertools

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl import keys
from layeredrl_trl.data import HindsightGoals, TransitionSliceSampler

GOAL, NEXT_GOAL = "desired_goal", ("next", "desired_goal")
ACHIEVED, NEXT_ACHIEVED = "achieved_goal", ("next", "achieved_goal")
ENDS = (keys.NEXT_DONE, keys.NEXT_TERMINATED, keys.NEXT_TRUNCATED)
CHANGED = {GOAL, NEXT_GOAL, keys.NEXT_REWARD}


def steps_of(n_env, n, lengths=(3, 7, 1, 5), start=0):
    """Steps ``start .. start + n`` of endless envs, ``[n_env, n]``; a state is (episode, age)."""
    rows = []
    for env in range(n_env):
        every = (
            (1000 * env + number, age, age == length - 1)
            for number, length in enumerate(itertools.cycle(lengths[env:] + lengths[:env]))
            for age in range(length)
        )
        rows.append(list(itertools.islice(every, start, start + n)))
    episode, age, last = torch.tensor(rows).unbind(-1)
    achieved = torch.stack([episode, age], -1).double()
    last = last.bool().unsqueeze(-1)
    goal = torch.full_like(achieved, -1.0) - episode.unsqueeze(-1)  # that of the episode
    terminated = last & (episode % 2 == 0).unsqueeze(-1)
    return TensorDict(
        {
            ACHIEVED: achieved,
            GOAL: goal,
            "number": torch.arange(start, start + n).expand(n_env, n).clone(),
            "is_init": (age == 0).unsqueeze(-1),
            "collector": {"traj_ids": episode},
            "next": {
                ACHIEVED: achieved + torch.tensor([0.0, 1.0]),
                GOAL: goal,
                "reward": torch.full_like(achieved[..., :1], torch.nan).float(),
                "done": last,
                "terminated": terminated,
                "truncated": last & ~terminated,
            },
        },
        batch_size=[n_env, n],
    )


def distance(slices):
    """A reward that says which goal was pursued; states lie far enough apart."""
    change = slices[NEXT_ACHIEVED] - slices[NEXT_GOAL]
    return -(change * torch.tensor([100.0, 1.0])).abs().sum(-1, keepdim=True)


def make_buffer(
    slice_len=3,
    *,
    capacity=60,
    chunks=(40,),
    n_env=1,
    ndim=1,
    storage=LazyTensorStorage,
    sampler=None,
    batch_size=None,
    exclude=(),
    buffer_class=TensorDictReplayBuffer,
    change=lambda data: data,
    before=None,
    **options,
):
    """A buffer with HindsightGoals; with ndim 1 the rows of the envs lie one after the other."""
    sampler = sampler or TransitionSliceSampler(slice_len=slice_len)
    batch_size = batch_size or 32 * slice_len
    storage = storage(capacity, ndim=ndim)
    buffer = buffer_class(storage=storage, sampler=sampler, batch_size=batch_size)
    reward_fn = options.pop("reward_fn", distance)
    hindsight = HindsightGoals(
        buffer.storage, options.pop("slice_len_asked", slice_len), reward_fn, **options
    )
    buffer.append_transform(hindsight)
    for start, n in zip(itertools.accumulate((0, *chunks)), chunks, strict=False):
        data = change(steps_of(n_env, n, start=start).exclude(*exclude))
        buffer.extend(data if ndim == 2 else data.reshape(-1))
    return buffer


def stored_rows(buffer, index):
    """The stored rows at the positions of a sample."""
    index = index.unbind(-1) if buffer.storage.ndim == 2 else (index.flatten(),)
    return buffer.storage[:][tuple(index)].clone()


def goals_to_come(storage, position):
    """Follow the episode step by step from a position; the goals that it achieves, in order."""
    data, goals = storage[:], []
    while True:
        goals.append(tuple(data[NEXT_ACHIEVED][position].tolist()))
        following = ((position[0] + 1) % data.shape[0], *position[1:])

        def at(where):
            episode = data["collector", "traj_ids"][where].item()
            return episode, data["number"][where].item()

        episode, number = at(position)
        if at(following) != (episode, number + 1):
            return goals
        position = following


def first_positions(buffer, sample, slice_len):
    index = sample["index"].reshape(-1, slice_len, buffer.storage.ndim)[:, 0]
    return [tuple(i) for i in index.tolist()]


LAYOUTS = {
    "plain": {},
    "ring, full": {"capacity": 25, "chunks": (20, 13)},
    "ring, unfinished": {"capacity": 25, "chunks": (25, 1)},
    "envs one after the other": {"n_env": 2, "chunks": (15, 11), "capacity": 52},
    "two dims": {"n_env": 3, "ndim": 2, "chunks": (9, 8), "capacity": 60},
    "two dims, full": {"n_env": 3, "ndim": 2, "chunks": (9, 8, 5), "capacity": 45},
    "memory-mapped": {"storage": LazyMemmapStorage},
    "trajectory ids alone": {"exclude": ENDS},
    "flags alone": {"exclude": ["is_init"]},
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
