"""The one form that offline data are brought to."""

import pytest
import torch
from tensordict import TensorDict

from layeredrl_trl.data.datasets import read_dataset
from layeredrl_trl.data.slice_sampler import TransitionSliceSampler
from tests.data.datasets_on_disk import steps

LENGTHS = (3, 5, 4, 6)
FLAGS = [("next", name) for name in ("done", "terminated", "truncated")]


def read(data, folder, **options):
    data.memmap(folder)
    return read_dataset(folder, **options)


def padded(data, length=6):
    """Episodes ``[episodes, T]`` with a mask, and junk in the padding."""
    episodes = torch.full((len(LENGTHS), length), -7.0)
    out = TensorDict(batch_size=[*episodes.shape])
    first = 0
    for key in data.keys(True, True):
        shape = data[key].shape[1:]
        out[key] = torch.full((*episodes.shape, *shape), 1).to(data[key].dtype)
    mask = torch.zeros(*episodes.shape, 1, dtype=torch.bool)
    for row, n in enumerate(LENGTHS):
        out[row, :n] = data[first : first + n]
        mask[row, :n] = True
        first += n
    out["collector", "mask"] = mask
    return out


def check_same(dataset, data):
    """Check that a dataset holds these steps, converted."""
    got = dataset.buffer[:]
    assert dataset.num_steps == len(data) == len(got)
    for key in ("observation", ("next", "observation"), "action", ("next", "reward")):
        assert got[key].dtype is torch.float32
        torch.testing.assert_close(got[key], data[key].float(), rtol=0, atol=0)
    for key in ("terminated", "truncated", "done"):
        assert got["next", key].dtype is torch.bool and got["next", key].shape == (len(data), 1)
        assert torch.equal(got["next", key], data["next", key])
    assert torch.equal(got["episode"], data["episode"])


# --- layouts


def test_flat_rows(tmp_path):
    data = steps(LENGTHS)
    dataset = read(data, tmp_path)
    check_same(dataset, data)
    assert dataset.num_episodes == 4 and dataset.env_id is None
    assert dataset.layout == {"observation": range(3)}
    assert dataset.observation_spec.shape == (3,) and dataset.action_spec.shape == (2,)


def test_padded_episodes(tmp_path):
    data = steps(LENGTHS)
    check_same(read(padded(data), tmp_path), data)


def test_padding_alone_ends_an_episode(tmp_path):
    data = steps(LENGTHS)
    dataset = read(padded(data).exclude(*FLAGS, "episode"), tmp_path)
    got = dataset.buffer[:]
    assert torch.equal(got["next", "truncated"], data["next", "done"])
    assert torch.equal(got["episode"], data["episode"])


def test_rows_of_envs_without_a_mask(tmp_path):
    data = steps((6, 6, 6))
    stacked = data.reshape(3, 6)
    stacked["next", "done"][1] = stacked["next", "terminated"][1] = False
    stacked["next", "truncated"][1] = False
    dataset = read(stacked.exclude("episode"), tmp_path)
    data["next", "terminated"][11], data["next", "truncated"][11] = False, True
    data["next", "done"][11] = True
    check_same(dataset, data)


KNOWN = {
    "ids of the collector": lambda d: d.exclude(*FLAGS, "episode").set(
        ("collector", "traj_ids"), d["episode"] * 5 + 2
    ),
    "numbers of episodes": lambda d: d.exclude(*FLAGS),
    "first steps": lambda d: d.exclude(*FLAGS, "episode").set(
        "is_init", torch.cat([torch.ones(1, 1).bool(), d["next", "done"][:-1]])
    ),
    "done alone": lambda d: d.exclude(*FLAGS[1:], "episode"),
    "flags without a dim": lambda d: d.exclude(*FLAGS, "episode").update(
        {"next": {name: d["next", name].squeeze(-1) for _, name in FLAGS}}
    ),
}


@pytest.mark.parametrize("known", KNOWN)
def test_whatever_tells_where_episodes_end_is_used(known, tmp_path):
    data = steps(LENGTHS)
    dataset = read(KNOWN[known](data), tmp_path)
    done, terminated = data["next", "done"], data["next", "terminated"].clone()
    if known == "done alone":  # TorchRL: what is done without being truncated is terminated
        terminated = done
    elif known != "flags without a dim":
        terminated = torch.zeros_like(done)
    got = dataset.buffer[:]
    assert torch.equal(got["next", "done"], done)
    assert torch.equal(got["next", "terminated"], terminated)
    assert torch.equal(got["next", "truncated"], done & ~terminated)
    assert torch.equal(got["episode"], data["episode"])


def test_a_step_that_is_terminated_and_truncated_stays_so(tmp_path):
    data = steps(LENGTHS)
    data["next", "truncated"] |= data["next", "terminated"]
    check_same(read(data, tmp_path), data)


def test_slices_stay_within_episodes(tmp_path):
    buffer = read(steps(LENGTHS).exclude(*FLAGS), tmp_path).buffer
    start = (torch.arange(len(buffer)),)
    _, mask = TransitionSliceSampler(slice_len=4).slices_from(buffer.storage, start, 4)
    assert mask.sum(-1).tolist() == [min(4, n - t) for n in LENGTHS for t in range(n)]


def test_other_entries_are_kept_and_those_of_the_root_that_mean_nothing_are_not(tmp_path):
    data = steps(LENGTHS)
    data["info"] = {"speed": torch.rand(18, 1, dtype=torch.float64)}
    data["planned"] = torch.ones(18, 1, dtype=torch.bool)
    data["done"], data["reward"] = data["next", "done"], data["next", "reward"]
    data["index"] = torch.arange(18).flip(0)
    got = read(data, tmp_path).buffer[:]
    torch.testing.assert_close(got["info", "speed"], data["info", "speed"].float())
    assert "planned" in got.keys()
    assert not {"done", "reward", "index"} & set(got.keys())


# --- observations


def maze():
    data = steps(LENGTHS)
    nested = {"goal": torch.full((18, 2), 4.0), "position": data["observation"]}
    reached = {"goal": torch.full((18, 2), 4.0), "position": data["next", "observation"]}
    data["observation"], data["next", "observation"] = nested, reached
    return data


def test_nested_entries_are_joined_in_their_order(tmp_path):
    data = maze()
    dataset = read(data, tmp_path)
    order = list(dataset.layout)
    assert sorted(order) == ["goal", "position"]
    expected = torch.cat([data["observation", key].float() for key in order], -1)
    torch.testing.assert_close(dataset.buffer[:]["observation"], expected)
    assert [len(dims) for dims in dataset.layout.values()] == [expected.shape[-1] - 3, 3][
        :: 1 if order[0] == "goal" else -1
    ]


def test_entries_are_joined_in_the_order_that_is_asked_for(tmp_path):
    data = steps(LENGTHS)
    for key in ((), ("next",)):
        data[(*key, "pixels")] = torch.zeros(18, 8, 8, 3, dtype=torch.uint8)
        data[(*key, "speed")] = data[(*key, "observation")].sum(-1)
    dataset = read(data, tmp_path, join_observations=["speed", "observation"])
    got = dataset.buffer[:]
    assert dataset.layout == {"speed": range(1), "observation": range(1, 4)}
    torch.testing.assert_close(got["next", "observation"][:, 0], data["next", "speed"].float())
    assert "speed" not in got.keys() and got["pixels"].dtype is torch.uint8


def test_images_keep_their_shape(tmp_path):
    data = steps(LENGTHS)
    image = torch.randint(1, 255, (19, 8, 8, 3), dtype=torch.uint8)
    data["observation"], data["next", "observation"] = image[:-1], image[1:].clone()
    data["next", "observation"][data["next", "done"].squeeze(-1)] = 7
    dataset = read(data, tmp_path)
    assert torch.equal(dataset.buffer[:]["observation"], image[:-1])
    assert dataset.observation_spec.shape == (8, 8, 3) and dataset.layout == {}


# --- what is not stored


def test_zeros_after_the_last_step_are_not_learned(tmp_path):
    """TorchRL's D4RL and OpenX readers fill the unknown observation with zeros."""
    data = steps(LENGTHS)
    done, terminated = data["next", "done"].squeeze(-1), data["next", "terminated"].squeeze(-1)
    data["next", "observation"][done] = 0
    with pytest.warns(
        UserWarning, match="2 that are truncated are left out, 2 that are terminat"
    ) as warned:
        dataset = read(data, tmp_path)
    assert warned[0].filename == __file__
    expected = data.clone()
    expected["next", "observation"][terminated] = expected["observation"][terminated]
    cut = (done & ~terminated).nonzero().squeeze(-1)
    expected["next", "truncated"][cut - 1] = expected["next", "done"][cut - 1] = True
    keep = torch.ones(18, dtype=torch.bool)
    keep[cut] = False
    check_same(dataset, expected[keep])


@pytest.mark.parametrize("end", ["truncated", "terminated"])
def test_the_next_episodes_first_observation_is_not_learned(end, tmp_path):
    """Rows that were shifted by one, whatever ends there."""
    data = steps(LENGTHS, ends=(end,))
    data["next", "observation"][:-1] = data["observation"][1:]
    with pytest.warns(UserWarning, match="what 3 last steps of episodes lead to is not stored"):
        dataset = read(data, tmp_path)
    got, n_left = dataset.buffer[:], 18 - 3 * (end == "truncated")
    assert dataset.num_steps == n_left and dataset.num_episodes == 4
    change = got["next", "observation"] - got["observation"]
    assert (change >= 0).all() and change.max() <= 1  # none to another episode, in these data


def test_episodes_that_go_on_in_the_next_row_are_complete(tmp_path):
    """One trajectory that was cut into pieces: each next observation is right."""
    data = steps((18,))
    cut = torch.arange(18).remainder(6).eq(5).unsqueeze(-1)
    data["next", "truncated"] = data["next", "done"] = cut
    data["next", "terminated"] = torch.zeros_like(cut)
    data["episode"] = torch.arange(18) // 6
    check_same(read(data, tmp_path), data)


def test_a_state_of_zeros_is_a_state(tmp_path):
    data = steps(LENGTHS)
    data["observation"][4] = data["next", "observation"][3] = 0
    data["next", "observation"][2] = 0
    check_same(read(data, tmp_path), data)


def test_a_gap_between_rows_ends_an_episode(tmp_path):
    data = steps(LENGTHS)
    data = data[torch.arange(18) != 5]  # within the second episode
    with pytest.warns(
        UserWarning, match="1 steps do not lead to the observation of the next row"
    ) as warned:
        dataset = read(data, tmp_path)
    assert warned[0].filename == __file__
    done = data["next", "done"].clone()
    done[4] = True
    assert torch.equal(dataset.buffer[:]["next", "done"], done)
    assert dataset.num_episodes == 5


def test_noisy_observations_say_nothing_about_gaps(tmp_path):
    data = steps(LENGTHS)
    data["next", "observation"] += 0.01 * torch.rand(18, 3)
    check_same(read(data, tmp_path), data)


# --- errors


def poisoned(key, value):
    def change(data):
        data[key][7] = value
        return data

    return change


WRONG = {
    "no action": (lambda d: d.exclude("action"), r"expected the entries \['action'\]"),
    "no reward": (
        lambda d: d.exclude(("next", "reward")),
        r"expected the entries \[\('next', 'reward'\)\]",
    ),
    "no observation": (lambda d: d.exclude("observation"), "observation entry 'observation'"),
    "no next observation": (
        lambda d: d.exclude(("next", "observation")),
        r"observation entry \('next', 'observation'\)",
    ),
    "no ends": (lambda d: d.exclude(*FLAGS, "episode"), "nothing tells where episodes end"),
    "two rewards": (
        lambda d: d.set(("next", "reward"), torch.ones(18, 2)),
        r"one reward for each of 18 steps, got \[18, 2\]",
    ),
    "two flags": (
        lambda d: d.set(("next", "done"), torch.zeros(18, 2, dtype=torch.bool)),
        r"flags of one number per step, \[18, 1\], got \[18, 2\]",
    ),
    "three dims": (lambda d: d.reshape(1, 3, 6), r"\[N\] or \[episodes, T\], got \[1, 3, 6\]"),
    "no dims": (
        lambda d: TensorDict(dict(d.items()), batch_size=[]),
        r"\[N\] or \[episodes, T\], got \[\]",
    ),
    "not a number": (poisoned("observation", torch.nan), "1 of 18 rows of 'observation'"),
    "infinite": (poisoned("action", torch.inf), "1 of 18 rows of 'action' .* row 7"),
    "beyond float32": (poisoned(("next", "reward"), 1e39), r"rows of \('next', 'reward'\)"),
    "zeros": (
        lambda d: d.apply(torch.zeros_like).set(("next", "done"), d["next", "done"]),
        "every observation is 0",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_learned_from_is_one_clear_error(wrong, tmp_path):
    change, text = WRONG[wrong]
    with pytest.raises(ValueError, match=text):
        read(change(steps(LENGTHS)), tmp_path)


@pytest.mark.parametrize("key", ["action", ("next", "reward")])
def test_zeros_throughout_are_warned_of(key, tmp_path):
    data = steps(LENGTHS)
    data[key].zero_()
    with pytest.warns(UserWarning, match="is 0") as warned:
        read(data, tmp_path)
    assert warned[0].filename == __file__
