"""HindsightGoals: contract, oracle, properties, errors, state."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.data import (
    LazyTensorStorage,
    ListStorage,
    RandomSampler,
    SliceSampler,
    TensorDictReplayBuffer,
)
from torchrl.envs import GymWrapper, TransformedEnv

from layeredrl_trl import keys
from layeredrl_trl.data import HindsightGoals, TransitionSliceSampler
from tests.data.goal_episodes import (
    ACHIEVED,
    CHANGED,
    ENDS,
    GOAL,
    LAYOUTS,
    NEXT_ACHIEVED,
    NEXT_GOAL,
    distance,
    each_layout,
    first_positions,
    goals_to_come,
    make_buffer,
    steps_of,
    stored_rows,
)
from tests.largest_tensor import LargestNewTensor
from tests.toy_envs import GoalEnv

# --- contract


@each_layout
@pytest.mark.parametrize("slice_len", [1, 4])
def test_a_slice_has_one_goal_and_everything_else_is_as_it_was(layout, slice_len):
    buffer = make_buffer(slice_len, **layout, her_ratio=0.5)
    sample = buffer.sample()
    assert sample.batch_size == (32 * slice_len,)
    stored = stored_rows(buffer, sample["index"])
    slices, before = sample.reshape(-1, slice_len), stored.reshape(-1, slice_len)
    for key in (GOAL, NEXT_GOAL):
        assert (slices[key] == slices[GOAL][:, :1]).all()
        assert slices[key].dtype == before[key].dtype == torch.float64
    relabelled = (slices[GOAL] != before[GOAL]).any(-1)
    assert (relabelled == relabelled[:, :1]).all()
    assert 0 < relabelled[:, 0].sum() < 32
    assert torch.equal(slices[keys.NEXT_REWARD].isfinite().squeeze(-1), relabelled)
    for key in set(before.keys(True, True)) - CHANGED - {keys.INDEX}:
        assert torch.equal(slices[key], before[key]), key
    assert set(sample.keys(True, True)) == {*stored.keys(True, True), keys.MASK}
    kept, was = slices[~relabelled[:, 0]], before[~relabelled[:, 0]]
    for key in CHANGED:
        torch.testing.assert_close(kept[key], was[key], rtol=0, atol=0, equal_nan=True)


@each_layout
def test_the_storage_is_never_changed(layout):
    buffer = make_buffer(**layout)
    before = buffer.storage[:].clone()
    for _ in range(3):
        buffer.sample()
    after = buffer.storage[:]
    for key in before.keys(True, True):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0, equal_nan=True)


def test_a_batch_with_a_dim_of_time_and_the_argument_that_stays_as_it_was():
    buffer = make_buffer(her_ratio=1.0)
    hindsight = buffer.transform[0]
    slices = stored_rows(buffer, torch.tensor([4, 5, 6, 20, 21, 22])).reshape(2, 3)
    before = slices.clone()
    torch.manual_seed(5)
    out = hindsight(slices)
    torch.manual_seed(5)
    flat = hindsight(slices.reshape(-1))
    assert out.shape == (2, 3)
    assert (out[GOAL] == out[GOAL][:, :1]).all() and (out[GOAL] != before[GOAL]).any(-1).all()
    for key in CHANGED:
        assert torch.equal(out[key].reshape_as(flat[key]), flat[key])
        torch.testing.assert_close(slices[key], before[key], rtol=0, atol=0, equal_nan=True)


def test_nested_keys():
    names = {
        GOAL: ("goals", "wanted"),
        ACHIEVED: ("goals", "reached"),
        "reward": ("agent", "gain"),
        "terminated": ("agent", "terminated"),
        "done": ("agent", "done"),
        "truncated": ("agent", "truncated"),
    }

    def rename(data):
        for old, new in names.items():
            for prefix in ((), ("next",)):
                if (*prefix, old) in data.keys(True):
                    data.rename_key_((*prefix, old), (*prefix, *new))
        return data

    def reward(slices):
        change = slices["next", "goals", "reached"] - slices["next", "goals", "wanted"]
        return change.abs().sum(-1, keepdim=True)

    buffer = make_buffer(
        change=rename,
        reward_fn=reward,
        goal_key=("goals", "wanted"),
        achieved_goal_key=("goals", "reached"),
        reward_key=("next", "agent", "gain"),
        terminated_fn=lambda slices: reward(slices) == 0,
        terminated_key=("next", "agent", "terminated"),
        her_ratio=1.0,
        sampler=TransitionSliceSampler(slice_len=3, end_keys=[("next", "agent", "done")]),
    )
    sample = buffer.sample()
    assert torch.equal(sample["next", "agent", "gain"], reward(sample).float())
    assert torch.equal(sample["next", "agent", "terminated"], reward(sample) == 0)
    assert sample["next", "agent", "done"][sample["next", "agent", "terminated"]].all()
    stored = buffer.storage[:].select("collector", "number", ("next", "goals", "reached"))
    stored.rename_key_(("next", "goals", "reached"), NEXT_ACHIEVED)
    for b, start in enumerate(first_positions(buffer, sample, 3)):
        goal = tuple(sample["goals", "wanted"][3 * b].tolist())
        assert goal in goals_to_come(stored, start)


# --- oracle: a walk through the episodes


@each_layout
@pytest.mark.parametrize("slice_len", [1, 2, 5])
def test_the_goal_is_one_that_the_episode_achieves_later(layout, slice_len):
    buffer = make_buffer(slice_len, **layout, her_ratio=1.0)
    for _ in range(3):
        sample = buffer.sample()
        goals = sample[GOAL].reshape(-1, slice_len, 2)[:, 0].tolist()
        starts = first_positions(buffer, sample, slice_len)
        for goal, start in zip(goals, starts, strict=True):
            assert tuple(goal) in goals_to_come(buffer.storage, start)


@each_layout
def test_final_is_the_last_stored_step_of_the_episode(layout):
    buffer = make_buffer(**layout, her_ratio=1.0, strategy="final")
    sample = buffer.sample()
    for b, start in enumerate(first_positions(buffer, sample, 3)):
        assert tuple(sample[GOAL][3 * b].tolist()) == goals_to_come(buffer.storage, start)[-1]


@pytest.mark.parametrize("layout", ["plain", "ring, full", "two dims, full"])
def test_every_later_step_is_as_likely(layout):
    buffer = make_buffer(2, **LAYOUTS[layout], her_ratio=1.0)
    hindsight, storage = buffer.transform[0], buffer.storage
    n, seen_several = 4000, 0
    for start in ((4, 0), (8, 1), (13, 2), (24, 0)):
        start = start[: storage.ndim]
        if start[0] >= storage.shape[0]:
            continue
        row = storage[:][tuple(torch.tensor([i]) for i in start)]
        batch = row.expand(n, 2).reshape(-1)  # the step and its repetition
        drawn = hindsight(batch)[GOAL].reshape(n, 2, 2)[:, 0]
        goals = torch.tensor(goals_to_come(storage, start))
        count = (drawn.unsqueeze(1) == goals).all(-1).sum(0)
        assert count.sum() == n
        expected = n / len(goals)
        chi_squared = ((count - expected) ** 2 / expected).sum()
        bound = (len(goals) - 1) + 5 * (2 * len(goals)) ** 0.5  # mean and 5 std
        assert chi_squared < bound, count
        seen_several += len(goals) > 1
    assert seen_several >= 2


def test_an_episode_longer_than_every_look_ahead():
    n = 1500
    data = steps_of(1, n, lengths=(n,)).reshape(-1)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(2000))
    buffer.extend(data)
    final = HindsightGoals(buffer.storage, 1, distance, her_ratio=1.0, strategy="final")
    assert (final(buffer[:])[GOAL] == torch.tensor([0.0, n])).all()
    future = HindsightGoals(buffer.storage, 1, distance, her_ratio=1.0)
    ahead = (future(buffer[:])[GOAL] - buffer[:][ACHIEVED])[:, 1]
    left = n - torch.arange(n)
    assert ahead.min() >= 1 and (ahead <= left).all()
    mean = (ahead / (left + 1)).mean().item()
    assert mean == pytest.approx(0.5, abs=0.04)


def test_rewards_are_those_of_the_stored_states_and_the_goal():
    buffer = make_buffer(4, her_ratio=0.7)
    sample = buffer.sample()
    stored = stored_rows(buffer, sample["index"])
    again = stored.clone()
    for key in (GOAL, NEXT_GOAL):
        again[key] = sample[GOAL]
    relabelled = (sample[GOAL] != stored[GOAL]).any(-1)
    expected = distance(again).float()[relabelled]
    assert torch.equal(sample[keys.NEXT_REWARD][relabelled], expected)
    assert len(expected) and (expected == 0).any()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_her_ratio_is_the_share_of_slices(ratio):
    buffer = make_buffer(2, her_ratio=ratio, batch_size=2 * 5000)
    relabelled = buffer.sample()[keys.NEXT_REWARD].isfinite().reshape(-1, 2)[:, 0].float()
    bound = 4 * (ratio * (1 - ratio) / 5000) ** 0.5
    assert abs(relabelled.mean().item() - ratio) <= bound
    if 0 < ratio < 1:  # slices are drawn independently, not the first so many
        pairs = (relabelled[1:] * relabelled[:-1]).mean().item()
        assert abs(pairs - ratio**2) < 4 * ratio / 5000**0.5
        assert relabelled[2500:].mean().item() == pytest.approx(ratio, abs=0.05)


def test_a_function_is_not_called_if_nothing_is_relabelled():
    buffer = make_buffer(her_ratio=0.0, reward_fn=lambda slices: 1 / 0)
    assert buffer.sample()[keys.NEXT_REWARD].isnan().all()


def test_stored_padding_is_no_goal_and_gets_none():
    data = steps_of(1, 40).reshape(-1)
    mask = torch.ones(40, 1).bool()
    mask[5:9] = mask[17:19] = False
    data.set(keys.MASK, mask)
    data[NEXT_ACHIEVED][~mask.squeeze(-1)] = torch.nan
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40))
    buffer.extend(data)
    hindsight = HindsightGoals(buffer.storage, 1, distance, her_ratio=1.0)
    for _ in range(5):
        out = hindsight(buffer[:])
        changed = (out[GOAL] != data[GOAL]).any(-1)
        assert torch.equal(changed, mask.squeeze(-1))
        assert out[GOAL].isfinite().all()
    assert (out[GOAL][4] == torch.tensor([1.0, 2.0])).all()  # the step before the padding


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 6),
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.integers(0, 2**31),
)
@settings(max_examples=30)
def test_any_episodes_in_a_ring_match_the_oracle(lengths, slice_len, chunks, seed):
    torch.manual_seed(seed)
    sampler = TransitionSliceSampler(slice_len=slice_len)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(23), sampler=sampler)
    buffer.append_transform(HindsightGoals(buffer.storage, slice_len, distance, her_ratio=1.0))
    for start, n in zip(itertools.accumulate((0, *chunks)), chunks, strict=False):
        buffer.extend(steps_of(1, n, tuple(lengths), start).reshape(-1))
    sample = buffer.sample(16 * slice_len)
    goals = sample[GOAL].reshape(16, slice_len, 2)
    assert (goals == goals[:, :1]).all()
    for goal, start in zip(goals[:, 0], first_positions(buffer, sample, slice_len), strict=True):
        assert tuple(goal.tolist()) in goals_to_come(buffer.storage, start)


# --- terminations


@pytest.mark.parametrize("missing", [[], [keys.NEXT_DONE], [keys.NEXT_TRUNCATED]], ids=str)
def test_terminations_by_the_new_goal(missing):
    def reached(slices):
        assert torch.equal(slices[keys.NEXT_REWARD], distance(slices).float())
        return slices[keys.NEXT_REWARD] == 0

    buffer = make_buffer(4, her_ratio=0.6, terminated_fn=reached, exclude=missing)
    sample = buffer.sample()
    stored = stored_rows(buffer, sample["index"])
    relabelled = sample[keys.NEXT_REWARD].isfinite()
    terminated, before = sample[keys.NEXT_TERMINATED], stored[keys.NEXT_TERMINATED]
    assert torch.equal(terminated[relabelled], sample[keys.NEXT_REWARD][relabelled] == 0)
    assert terminated[relabelled].any() and (before & relabelled & ~terminated).any()
    for key in set(ENDS) - set(missing):
        assert torch.equal(sample[key][~relabelled], stored[key][~relabelled])
        assert sample[key].dtype == torch.bool
    if keys.NEXT_DONE not in missing:
        assert torch.equal(sample[keys.NEXT_DONE], stored[keys.NEXT_DONE] | terminated)
    if keys.NEXT_TRUNCATED not in missing:  # an end that is no termination any more
        expected = stored[keys.NEXT_TRUNCATED] | (before & ~terminated)
        assert torch.equal(sample[keys.NEXT_TRUNCATED], expected)


# --- randomness


def test_torch_manual_seed_reproduces_a_batch():
    buffer = make_buffer()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(buffer.sample())
    for key in CHANGED:
        torch.testing.assert_close(drawn[0][key], drawn[1][key], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(drawn[0][GOAL], drawn[2][GOAL])


def test_a_generator_of_its_own():
    buffer = make_buffer(her_ratio=0.0)
    rows = buffer[:15]
    options = {"her_ratio": 0.5, "generator": torch.Generator().manual_seed(3)}
    hindsight = HindsightGoals(buffer.storage, 1, distance, **options)
    before = torch.get_rng_state()
    first = hindsight(rows)
    assert torch.equal(torch.get_rng_state(), before)
    options["generator"].manual_seed(3)
    torch.manual_seed(99)
    assert torch.equal(hindsight(rows)[GOAL], first[GOAL])
    assert not torch.equal(hindsight(rows)[GOAL], first[GOAL])


# --- cost


@pytest.mark.parametrize("ndim", [1, 2])
def test_cost_does_not_depend_on_the_size_of_the_buffer(ndim):
    sizes = []
    for capacity in (400, 8000):
        chunks = (capacity // 2 - 20,)
        options = {"n_env": 2, "ndim": ndim, "her_ratio": 1.0}
        buffer = make_buffer(2, capacity=capacity, chunks=chunks, **options)
        rows = buffer.storage[:][(torch.arange(8), torch.zeros(8).long())[:ndim]]
        with LargestNewTensor() as largest:
            buffer.transform[0](rows)
        sizes.append(largest.numel)
    assert sizes[0] == sizes[1] < 8 * 100


# --- errors


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"storage": ListStorage(9)}, TypeError, "keeps TensorDicts as tensors.*ListStorage"),
        ({"storage": LazyTensorStorage(9, ndim=3)}, ValueError, "one or two dims, got ndim=3"),
        ({"slice_len": 0}, ValueError, "slice_len must be at least 1, got 0"),
        ({"slice_len": 2.0}, TypeError, "slice_len must be an integer"),
        ({"reward_fn": None}, TypeError, "reward_fn must be a function, got None"),
        ({"terminated_fn": True}, TypeError, "terminated_fn must be a function, got True"),
        ({"her_ratio": 1.5}, ValueError, r"her_ratio must be in \[0, 1\], got 1.5"),
        ({"her_ratio": "all"}, TypeError, "her_ratio must be a number"),
        ({"strategy": "episode"}, ValueError, "strategy must be one of .*future.*got 'episode'"),
        ({"goal_key": 3}, TypeError, "goal_key must be a string"),
        ({"achieved_goal_key": ()}, TypeError, "achieved_goal_key must be a string"),
        ({"reward_key": ["next", "reward"]}, TypeError, "reward_key must be a string"),
        ({"terminated_key": None}, TypeError, "terminated_key must be a string"),
        ({"sampler": RandomSampler()}, TypeError, "expected a TransitionSliceSampler.*Random"),
        ({"generator": 3}, TypeError, "expected a torch.Generator, got 3"),
    ],
)
def test_bad_arguments(options, error, text):
    needed = {"storage": LazyTensorStorage(9), "slice_len": 2, "reward_fn": distance}
    with pytest.raises(error, match=f"HindsightGoals: .*{text}"):
        HindsightGoals(**{**needed, **options})


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        (lambda x: distance(x).squeeze(-1), ValueError, r"\[32, 3, 1\].*has, got \[32, 3\]"),
        (lambda x: distance(x).mean(), ValueError, r"got \[\]"),
        (lambda x: 1.0, TypeError, "must return a tensor, got 1.0"),
    ],
)
@pytest.mark.parametrize("name", ["reward_fn", "terminated_fn"])
def test_bad_results(name, result, error, text):
    buffer = make_buffer(her_ratio=1.0, **{name: result})
    with pytest.raises(error, match=f"{name} .*{text}"):
        buffer.sample()


def test_a_termination_that_is_no_flag():
    buffer = make_buffer(her_ratio=1.0, terminated_fn=distance)
    with pytest.raises(ValueError, match="terminated_fn must return bool, got"):
        buffer.sample()


def test_no_achieved_goal_is_stored():
    buffer = make_buffer(exclude=[NEXT_ACHIEVED])
    with pytest.raises(KeyError, match=r"storage has no \('next', 'achieved_goal'\); it has"):
        buffer.sample()


def test_it_is_no_transform_of_envs():
    hindsight = HindsightGoals(LazyTensorStorage(9), 2, distance)
    with pytest.raises(TypeError, match="HindsightGoals is a transform of replay buffers"):
        TransformedEnv(GymWrapper(GoalEnv()), hindsight).rollout(3)


# --- samplers and state


def test_ends_are_those_of_the_sampler():
    """By default that of the buffer; the data have no other flag that tells."""

    def rename(data):
        return data.exclude(*ENDS, "is_init", "collector").set("over", data[keys.NEXT_DONE])

    data = rename(steps_of(1, 40).reshape(-1))
    ids = steps_of(1, 40).reshape(-1)[NEXT_ACHIEVED][:, 0]
    ending = TransitionSliceSampler(slice_len=3, end_keys=["over"])
    torchrls = SliceSampler(slice_len=1, end_key="over", cache_values=False)
    for sampler, asked in ((ending, None), (torchrls, None), (RandomSampler(), ending)):
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40), sampler=sampler)
        options = {"her_ratio": 1.0, "sampler": asked}
        buffer.append_transform(HindsightGoals(buffer.storage, None, distance, **options))
        buffer.extend(data)
        sample = buffer.sample(12)
        assert torch.equal(sample[GOAL][:, 0], ids[sample["index"].flatten()])


def test_copies_and_checkpoints_go_on(tmp_path):
    buffer = make_buffer()
    for copied in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert copied.transform[0].storage is copied.storage is not buffer.storage
        torch.manual_seed(7)
        expected = buffer.sample()[GOAL]
        torch.manual_seed(7)
        assert torch.equal(copied.sample()[GOAL], expected)
    fresh = make_buffer(chunks=(9,))
    fresh.load_state_dict(buffer.state_dict())
    torch.manual_seed(7)
    assert torch.equal(fresh.sample()[GOAL], expected)
