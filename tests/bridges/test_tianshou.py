"""The data of tianshou's buffers: all that is stored, once, in order, and ends where ends are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from layeredrl_trl.bridges import from_tianshou
from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.predictors import RewardPredictor
from tests.bridges.tianshou_rings import Rings, record

SIZES = [7, 4, 9, 5]
RECORDED = [
    [(3, "terminated"), (2, "truncated"), (4, "unfinished")],  # wraps in mid-episode
    [(2, "truncated"), (2, "both")],  # exactly full
    [(3, "terminated"), (2, "unfinished")],  # not full
    [(30, "unfinished")],  # wraps often, no end
]


def recorded(**options):
    return record(Rings(SIZES, **options), RECORDED)


def expected_steps(rings):
    """The steps that a buffer must hold, episode by episode, by a loop: the oracle."""
    episodes = []
    for steps in rings.episodes():
        rows = []
        for t, step in enumerate(steps):
            row = dict(step, weight=1.0)
            if "obs_next" not in rings.arrays:
                if t + 1 < len(steps):
                    row["obs_next"] = steps[t + 1]["obs"]
                elif step["terminated"]:
                    row["obs_next"], row["weight"] = step["obs"], 0.0
                else:
                    break  # what it leads to is unknown
            rows.append(row)
        if rows:
            rows[-1]["done"] = True
            rows[-1]["truncated"] = rows[-1]["truncated"] or not rows[-1]["terminated"]
            episodes.append(rows)
    return episodes


def stored(buffer):
    """All rows of a buffer."""
    return buffer[:]


def assert_holds(buffer, rings):
    data, episodes = stored(buffer), expected_steps(rings)
    rows = [row for rows in episodes for row in rows]
    assert len(buffer) == len(rows)
    keys = {
        "obs": "observation",
        "obs_next": ("next", "observation"),
        "act": "action",
        "rew": ("next", "reward"),
        "terminated": ("next", "terminated"),
        "truncated": ("next", "truncated"),
        "done": ("next", "done"),
    }
    if "obs_next" not in rings.arrays:
        keys["weight"] = "weight"
    for name, key in keys.items():
        expected = torch.tensor(np.array([row[name] for row in rows]))
        expected = expected.reshape(len(rows), -1).to(data[key].dtype)
        assert torch.equal(data[key], expected), name
    ids = [i for i, rows in enumerate(episodes) for _ in rows]
    assert data["collector", "traj_ids"].unique_consecutive(return_inverse=True)[1].tolist() == ids
    assert len(data["collector", "traj_ids"].unique()) == len(episodes)


# ---- layout


@pytest.mark.parametrize("ignore_obs_next", [False, True])
def test_entries_shapes_and_dtypes(ignore_obs_next):
    rings = recorded(ignore_obs_next=ignore_obs_next)
    buffer = from_tianshou(rings.arrays, **rings.numbers())
    assert type(buffer) is TensorDictReplayBuffer
    data = stored(buffer)
    n, flag = len(data), torch.bool
    expected = {
        "observation": ((n, 2), torch.float32),
        "action": ((n, 1), torch.float32),
        ("next", "observation"): ((n, 2), torch.float32),
        ("next", "reward"): ((n, 1), torch.float32),
        ("next", "terminated"): ((n, 1), flag),
        ("next", "truncated"): ((n, 1), flag),
        ("next", "done"): ((n, 1), flag),
        ("collector", "traj_ids"): ((n,), torch.int64),
    }
    if ignore_obs_next:
        expected["weight"] = ((n, 1), torch.float32)
    found = {key: (tuple(x.shape), x.dtype) for key, x in data.items(True, True) if key != "index"}
    assert found == expected


@pytest.mark.parametrize(
    ("act", "shape", "dtype"),
    [
        (np.arange(3), (3,), torch.int64),
        (np.arange(3)[:, None], (3, 1), torch.int64),
        (np.arange(3.0), (3, 1), torch.float32),
        (np.zeros((3, 2), np.float32), (3, 2), torch.float32),
    ],
    ids=["indices", "indices in a column", "one number", "vectors"],
)
def test_actions(act, shape, dtype):
    buffer = from_tianshou(arrays() | {"act": act})
    action = stored(buffer)["action"]
    assert action.shape == shape and action.dtype is dtype
    assert action.flatten().tolist() == act.flatten().tolist()


def test_images_keep_their_dtype():
    obs = np.arange(3 * 3 * 4 * 4, dtype=np.uint8).reshape(3, 3, 4, 4)
    data = stored(from_tianshou(arrays() | {"obs": obs, "obs_next": obs[::-1]}))
    assert data["observation"].dtype is torch.uint8
    assert np.array_equal(data["next", "observation"], obs[::-1])


def test_a_mapping_of_observations_keeps_its_names():
    obs = {"goal": np.arange(3.0)[:, None], "inner": {"pixels": np.zeros((3, 2, 2), np.uint8)}}
    data = stored(from_tianshou(arrays() | {"obs": obs, "obs_next": obs}))
    assert data["goal"].tolist() == data["next", "goal"].tolist() == [[0.0], [1.0], [2.0]]
    assert data["next", "inner", "pixels"].shape == (3, 2, 2) and "observation" not in data


# ---- oracle


@pytest.mark.parametrize("ignore_obs_next", [False, True])
def test_holds_what_was_recorded(ignore_obs_next):
    rings = recorded(ignore_obs_next=ignore_obs_next)
    assert_holds(from_tianshou(rings.arrays, **rings.numbers()), rings)


ENDS = st.sampled_from(["terminated", "truncated", "both"])
EPISODES = st.tuples(st.lists(st.tuples(st.integers(1, 6), ENDS), max_size=4), st.integers(0, 12))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 8), EPISODES), min_size=1, max_size=4),
    st.booleans(),
)
def test_holds_what_was_recorded_of_any_length(drawn, ignore_obs_next):
    rings = Rings([size for size, _ in drawn], ignore_obs_next=ignore_obs_next)
    episodes = [[*ended, (open_, "unfinished")] for _, (ended, open_) in drawn]
    record(rings, episodes)
    if expected_steps(rings):
        assert_holds(from_tianshou(rings.arrays, **rings.numbers()), rings)
    else:
        with pytest.raises(ValueError, match="no step is left"):
            from_tianshou(rings.arrays, **rings.numbers())


@pytest.mark.parametrize("ignore_obs_next", [False, True])
def test_one_ring_that_is_full_or_not(ignore_obs_next):
    for n in (3, 8, 13):  # of 8 rows
        rings = Rings([8], ignore_obs_next=ignore_obs_next)
        record(rings, [[(n, "unfinished")]])
        last = None if n < 8 else rings.last_index
        buffer = from_tianshou(rings.arrays, lengths=rings.lengths, last_index=last)
        assert_holds(buffer, rings)


@pytest.mark.parametrize("ignore_obs_next", [False, True])
def test_no_slice_crosses_an_end(ignore_obs_next):
    rings = recorded(ignore_obs_next=ignore_obs_next)
    source = from_tianshou(rings.arrays, **rings.numbers())
    buffer = TensorDictReplayBuffer(
        storage=source.storage, sampler=TransitionSliceSampler(slice_len=4), batch_size=4 * 400
    )
    following = {}
    for rows in expected_steps(rings):
        names = [row["obs"][0] for row in rows]
        following |= dict(zip(names, [*names[1:], None], strict=True))
    batch = buffer.sample().reshape(400, 4)
    real = batch["collector", "mask"].squeeze(-1)
    obs = batch["observation"][..., 0]
    assert set(obs[:, 0].tolist()) == set(following)
    for row, mask in zip(obs.tolist(), real.tolist(), strict=True):
        expected = [row[0]]
        while len(expected) < 4 and following[expected[-1]] is not None:
            expected.append(following[expected[-1]])
        assert [x for x, is_real in zip(row, mask, strict=True) if is_real] == expected


def test_a_predictor_learns_from_it():
    rings = recorded()
    buffer = from_tianshou(rings.arrays, **rings.numbers())
    parts = ProbabilisticEnsemble(2, 0, 1, hidden_sizes=(8,)), ValueNet(2, 0), RewardNet(2, 0, 1)
    predictor = RewardPredictor(*parts, IdentityEncoder(2), 2, 0, n_steps=3, encoder_warm_up=0)
    loss, info = predictor.learn(buffer, 3, 16, 16, 100)
    assert loss.isfinite() and info["skipped"] == 0


def test_room_for_more():
    buffer = from_tianshou(arrays(), capacity=5)
    assert len(buffer) == 3 and buffer.storage.max_size == 5
    buffer.extend(stored(buffer).exclude("index").clone())
    assert len(buffer) == 5


def test_the_arrays_are_copied():
    given_arrays = arrays_of_numbers()
    before = {key: x.copy() for key, x in given_arrays.items()}
    buffer = from_tianshou(given_arrays)
    stored(buffer)["observation"].fill_(9.0)
    buffer.storage.get(slice(None))["observation"].fill_(9.0)
    for key, x in before.items():
        assert np.array_equal(given_arrays[key], x), key


# ---- errors


def arrays():
    return {
        "obs": np.arange(6.0).reshape(3, 2),
        "act": np.ones((3, 1)),
        "rew": np.arange(3.0),
        "terminated": np.array([0, 0, 1]),
        "truncated": np.zeros(3, bool),
        "done": np.array([False, False, True]),
        "obs_next": np.arange(6.0).reshape(3, 2) + 2,
        "info": {"whatever": object()},
        "policy": None,
    }


def arrays_of_numbers():
    return {key: x for key, x in arrays().items() if key not in ("info", "policy")}


BAD = {
    "no mapping": (lambda a: [1], {}, TypeError, "buffer_arrays: expected a mapping"),
    "missing": (lambda a: a.pop("truncated") is None or a, {}, KeyError, "truncated is missing"),
    "unknown": (lambda a: a | {"weights": 1}, {}, ValueError, r"unknown entries \['weights'\]"),
    "objects": (
        lambda a: a | {"obs": np.array([{}, {}, {}])},
        {},
        TypeError,
        "obs: expected an array of numbers, got object",
    ),
    "a number": (lambda a: a | {"rew": 1.0}, {}, ValueError, "rew: expected an array with a row"),
    "mapping of actions": (lambda a: a | {"act": {}}, {}, TypeError, "act: expected an array, got"),
    "rows": (lambda a: a | {"act": np.ones(4)}, {}, ValueError, "act: expected 3 rows, as in rew"),
    "rows of a mapping": (
        lambda a: a | {"obs": {"x": np.ones(3), "y": np.ones(2)}},
        {},
        ValueError,
        "obs.y: expected 3 rows",
    ),
    "rewards of two": (
        lambda a: a | {"rew": np.ones((3, 2))},
        {},
        ValueError,
        r"rew: expected shape \[3\], got \[3, 2\]",
    ),
    "flags": (
        lambda a: a | {"terminated": np.array([0, 0, 2])},
        {},
        ValueError,
        "terminated: expected only 0 and 1",
    ),
    "contradiction": (
        lambda a: a | {"done": np.array([0, 1, 1])},
        {},
        ValueError,
        r"done: expected terminated or truncated, not so in 1 row\(s\), the first of them 1",
    ),
    "another next observation": (
        lambda a: a | {"obs_next": np.ones((3, 3))},
        {},
        ValueError,
        "obs_next: expected the shapes of obs",
    ),
    "reserved name": (
        lambda a: a | {"obs": {"action": np.ones(3)}, "obs_next": {"action": np.ones(3)}},
        {},
        ValueError,
        r"obs cannot have entries named \['action'\]",
    ),
    "sizes": (lambda a: a, {"sizes": [2, 2]}, ValueError, "sizes: expected 3 rows in total"),
    "sizes of floats": (lambda a: a, {"sizes": [3.0]}, TypeError, r"sizes\[0\] must be an integer"),
    "one size": (lambda a: a, {"sizes": 3}, TypeError, "sizes: expected a sequence of integers"),
    "lengths": (lambda a: a, {"lengths": [4]}, ValueError, "lengths: a sub-buffer of 3 rows has 4"),
    "two lengths": (lambda a: a, {"lengths": [1, 1]}, ValueError, "lengths: expected 1, one for"),
    "outside": (lambda a: a, {"last_index": [3]}, ValueError, "last_index: expected 0 to 2"),
    "not full": (
        lambda a: a,
        {"lengths": [2], "last_index": [0]},
        ValueError,
        "last_index: expected 1, as it is not full",
    ),
    "empty": (lambda a: a, {"lengths": [0]}, ValueError, "no step is left of 0"),
    "capacity": (lambda a: a, {"capacity": 2}, ValueError, "capacity must be at least 3, got 2"),
}


@pytest.mark.parametrize(("change", "options", "error", "text"), BAD.values(), ids=BAD)
def test_bad_input(change, options, error, text):
    with pytest.raises(error, match=f"from_tianshou: {text}"):
        from_tianshou(change(arrays()), **options)


def test_unfilled_rows_may_hold_anything():
    given_arrays = arrays_of_numbers()
    for x in given_arrays.values():
        x[2:] = 7
    buffer = from_tianshou(given_arrays, lengths=[2])
    assert stored(buffer)["next", "reward"].flatten().tolist() == [0.0, 1.0]
    assert isinstance(stored(buffer), TensorDict)
