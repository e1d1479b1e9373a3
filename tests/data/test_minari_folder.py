"""Minari's datasets, read as they lie on disk."""

import json
from collections import OrderedDict

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from layeredrl_trl.data import minari_folder
from layeredrl_trl.data.datasets import read_dataset
from layeredrl_trl.data.slice_sampler import TransitionSliceSampler
from tests.data.datasets_on_disk import (
    Episode,
    box,
    episodes_of,
    read_slowly,
    to_json,
    write_minari,
)
from tests.extras import needs

h5py = pytest.importorskip("h5py")

MAZE = spaces.Dict(
    OrderedDict(observation=box(4), achieved_goal=box(2), desired_goal=box(2, dtype=np.float32))
)  # not in alphabetical order, as an env may have it
ODD = spaces.Tuple(
    (
        spaces.Discrete(3, start=-1),
        spaces.MultiBinary(4),
        spaces.Dict(a=spaces.MultiDiscrete([2, 3], start=[1, 0]), b=box(2, 2)),
    )
)
CASES = {
    "box": (box(3), box(2, bound=2.0)),
    "discrete actions": (box(3, dtype=np.float32), spaces.Discrete(3)),
    "discrete actions from 2": (box(1), spaces.Discrete(4, start=2)),
    "maze": (MAZE, box(2, bound=1.0, dtype=np.float32)),
    "odd": (ODD, spaces.Dict(OrderedDict(turn=box(1, bound=3.0), go=box(2, bound=1.0)))),
    "discrete observations": (spaces.Discrete(5), spaces.Discrete(2)),
    "a number": (box(), box(bound=1.0)),
    "matrices of actions": (spaces.Box(0, 255, (7, 7, 3), np.uint8), box(2, 2, bound=1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_a_slow_reader(case, tmp_path):
    observation_space, action_space = CASES[case]
    episodes = episodes_of(observation_space, action_space)
    write_minari(tmp_path, episodes, observation_space, action_space)
    dataset = read_dataset(tmp_path)
    expected = read_slowly(episodes, observation_space, action_space)
    data = dataset.buffer[:]
    torch.testing.assert_close(data["observation"], expected["observation"], rtol=0, atol=0)
    torch.testing.assert_close(data["next", "observation"], expected["next"], rtol=0, atol=0)
    torch.testing.assert_close(data["action"].float(), expected["action"], rtol=0, atol=0)
    torch.testing.assert_close(data["next", "reward"], expected["reward"], rtol=0, atol=0)
    assert torch.equal(data["next", "terminated"], expected["terminated"])
    assert torch.equal(data["next", "truncated"], expected["truncated"])
    assert torch.equal(data["next", "done"], expected["terminated"] | expected["truncated"])
    assert torch.equal(data["episode"], expected["episode"])
    assert (dataset.num_episodes, dataset.num_steps) == (4, 18)
    assert dataset.observation_spec.shape == data["observation"].shape[1:]
    assert dataset.action_spec.shape == data["action"].shape[1:]
    assert dataset.action_spec.dtype == data["action"].dtype
    assert dataset.action_spec.is_in(data["action"])
    assert set(data.keys(True, True)) == {
        "observation",
        "action",
        "episode",
        *(("next", k) for k in ("observation", "reward", "terminated", "truncated", "done")),
    }


def test_the_layout_says_where_each_entry_is(tmp_path):
    write_minari(tmp_path, episodes_of(*CASES["maze"]), *CASES["maze"])
    dataset = read_dataset(tmp_path)
    assert dataset.layout == {
        "observation": range(4),
        "achieved_goal": range(4, 6),
        "desired_goal": range(6, 8),
    }
    assert dataset.env_id == "Hand-v0"  # and nothing was imported to make it


def test_entries_are_kept_on_request(tmp_path):
    episodes = episodes_of(*CASES["maze"])
    write_minari(tmp_path, episodes, *CASES["maze"])
    dataset = read_dataset(tmp_path, join_observations=False)
    joined = read_slowly(episodes, *CASES["maze"])["observation"]
    goal = dataset.buffer[:]["observation", "desired_goal"]
    torch.testing.assert_close(goal, joined[:, 6:])
    assert dataset.observation_spec["observation", "achieved_goal"].shape == (2,)
    assert dataset.layout == {}


def test_episodes_are_in_the_order_of_their_numbers(tmp_path):
    episodes = episodes_of(*CASES["box"], ends=("truncated",) * 12)
    write_minari(tmp_path, episodes, *CASES["box"])
    data = read_dataset(tmp_path).buffer[:]
    expected = read_slowly(episodes, *CASES["box"])
    torch.testing.assert_close(data["observation"], expected["observation"])


def test_no_slice_crosses_the_end_of_an_unfinished_episode(tmp_path):
    write_minari(tmp_path, episodes_of(*CASES["box"], ends=("", "", "")), *CASES["box"])
    buffer = read_dataset(tmp_path).buffer
    index, mask = TransitionSliceSampler(slice_len=5).slices_from(
        buffer.storage, (torch.arange(len(buffer)),), 5
    )
    episode = buffer[:]["episode"]
    assert (episode[index[0]] == episode[index[0][:, :1]]).all()
    lengths = [3, 4, 5]
    expected = [min(5, length - t) for length in lengths for t in range(length)]
    assert mask.sum(-1).tolist() == expected


def test_images_are_read_as_they_are_or_refused(tmp_path):
    image = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    episodes = episodes_of(image, spaces.Discrete(2), ends=("terminated",))
    write_minari(tmp_path / "raw", episodes, image, spaces.Discrete(2), jpeg_encoding=False)
    dataset = read_dataset(tmp_path / "raw")
    pixels = dataset.buffer[:]["observation"]
    assert pixels.dtype is torch.uint8
    assert np.array_equal(pixels.numpy(), np.stack(episodes[0].observations[:-1]))
    assert dataset.observation_spec.shape == (32, 32, 3)
    write_minari(tmp_path / "jpeg", episodes, image, spaces.Discrete(2))
    with pytest.raises(ValueError, match="images stored as JPEG"):
        read_dataset(tmp_path / "jpeg")


def test_images_do_not_become_part_of_a_vector(tmp_path):
    space = spaces.Dict(image=spaces.Box(0, 255, (32, 32, 3), np.uint8), speed=box(2))
    episodes = episodes_of(space, box(1, bound=1.0), ends=("terminated",))
    write_minari(tmp_path, episodes, space, box(1, bound=1.0), jpeg_encoding=False)
    with pytest.raises(ValueError, match="images and cannot be joined"):
        read_dataset(tmp_path)
    chosen = read_dataset(tmp_path, join_observations=[("observation", "speed")])
    assert chosen.observation_spec.shape == (2,)


# --- Minari's own writer


def play(env, seeds, n_steps=30, cut=()):
    """Episodes of random actions, of at most ``n_steps``; those of ``cut`` have no flag."""
    played = []
    env.action_space.seed(0)
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        observations, taken = [observation], []
        for t in range(n_steps):
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            is_last = t == n_steps - 1 and seed not in cut
            observations.append(observation)
            taken.append((action, float(reward), terminated, truncated or is_last))
            if terminated or truncated:
                break
        played.append(Episode(observations, *map(list, zip(*taken, strict=True))))
    return played


@needs("minari")
@pytest.mark.filterwarnings("ignore:.*is set to None:UserWarning")
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_what_minari_wrote_is_read_by_its_folder_and_by_its_id(env_id, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    buffers = pytest.importorskip("minari.data_collector")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gymnasium.make(env_id)
    episodes = play(env, range(4), cut=(2,))
    written = [
        buffers.EpisodeBuffer(
            id=number,
            observations=np.stack(x.observations),
            actions=np.stack(x.actions),
            rewards=x.rewards,
            terminations=x.terminations,
            truncations=x.truncations,
        )
        for number, x in enumerate(episodes)
    ]
    name = "mine/play-v0"
    minari.create_dataset_from_buffers(
        name, written, env=env, author="a", author_email="b", code_permalink="c", algorithm_name="d"
    )
    expected = read_slowly(episodes, env.observation_space, env.action_space)
    folder = tmp_path / name
    for source in (name, folder, str(folder / "data"), folder / "data" / "main_data.hdf5"):
        dataset = read_dataset(source)
        data = dataset.buffer[:]
        torch.testing.assert_close(data["observation"], expected["observation"])
        torch.testing.assert_close(data["next", "observation"], expected["next"])
        torch.testing.assert_close(data["action"].float(), expected["action"])
        torch.testing.assert_close(data["next", "reward"], expected["reward"])
        assert torch.equal(data["next", "truncated"], expected["truncated"])
        assert dataset.env_id == env_id


# --- errors


def write_json(data, **changes):
    content = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps(content | changes))


def change(name, values=None):
    def apply(data):
        with h5py.File(data / "main_data.hdf5", "a") as file:
            del file[name]
            if values is not None:
                file[name] = values

    return apply


def cut_file(data):
    whole = (data / "main_data.hdf5").read_bytes()
    (data / "main_data.hdf5").write_bytes(whole[: len(whole) // 2])


DAMAGE = {
    "no metadata": (lambda d: (d / "metadata.json").unlink(), "metadata.json cannot be read"),
    "no JSON": (lambda d: (d / "metadata.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda d: (d / "metadata.json").write_text("[]"), "no dictionary, but a list"),
    "no space": (lambda d: write_json(d, action_space=None), "action_space: expected a space in"),
    "half a space": (
        lambda d: write_json(d, action_space='{"type": "Discrete"}'),
        r"action_space: expected a Discrete with \['n'\]",
    ),
    "half an inner space": (
        lambda d: write_json(
            d, observation_space='{"type": "Dict", "subspaces": {"goal": {"type": "Box"}}}'
        ),
        "observation_space, entry 'goal': expected a Box with",
    ),
    "a list for a space": (
        lambda d: write_json(d, action_space="[1]"),
        r"action_space: expected a space, got '\[1\]'",
    ),
    "episodes lost": (lambda d: write_json(d, total_episodes=9), "total_episodes=9, .* holds 4"),
    "steps lost": (lambda d: write_json(d, total_steps=99), "total_steps=99, .* holds 18"),
    "half a file": (cut_file, "cannot be read as HDF5"),
    "no rewards": (change("episode_1/rewards"), "no array 'rewards'"),
    "no observations": (change("episode_1/observations"), "episode 1 has no array 'observations'"),
    "no last observation": (
        change("episode_1/observations", np.ones((4, 3))),
        "expected 5 rows of 'observations', got 4",
    ),
    "other observations": (change("episode_1/observations", np.ones((5, 2))), "changes its shape"),
    "words": (change("episode_1/actions", ["go"] * 4), "no array of numbers"),
    "no number": (change("episode_1/actions", np.full((4, 2), np.nan)), "4 of 18 rows of 'action'"),
    "beyond float32": (
        change("episode_1/observations", np.full((5, 3), 1e300)),
        "rows of 'observation' .* not finite in float32, the first is row 3",
    ),
    "two rewards": (change("episode_1/rewards", np.ones((4, 2))), "rewards of 2 numbers"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error(damage, tmp_path):
    data = write_minari(tmp_path, episodes_of(*CASES["box"]), *CASES["box"])
    apply, text = DAMAGE[damage]
    apply(data)
    with pytest.raises(ValueError, match=text):
        read_dataset(tmp_path)


def test_a_text_is_no_observation(tmp_path):
    data = write_minari(tmp_path, episodes_of(box(2), box(1)), box(2), box(1))
    write_json(data, observation_space=json.dumps(to_json(spaces.Dict(mission=spaces.Text(9)))))
    with pytest.raises(ValueError, match="type 'Text', which is no vector"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("space", [spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)])
def test_several_choices_at_once_are_refused(space, tmp_path):
    write_minari(tmp_path, episodes_of(box(3), space), box(3), space)
    with pytest.raises(ValueError, match="one choice"):
        read_dataset(tmp_path)


def test_a_choice_out_of_range_is_refused(tmp_path):
    data = write_minari(
        tmp_path, episodes_of(box(3), spaces.Discrete(2)), box(3), spaces.Discrete(2)
    )
    change("episode_0/actions", np.array([0, 1, 2]))(data)
    with pytest.raises(ValueError, match=r"choices among \[2\]"):
        read_dataset(tmp_path)


def test_a_dataset_without_steps_is_refused(tmp_path):
    write_minari(tmp_path, [], box(3), box(2))
    with pytest.raises(ValueError, match="no episode has a step"):
        read_dataset(tmp_path)


def test_another_format_is_named(tmp_path):
    data = write_minari(tmp_path, episodes_of(*CASES["box"]), *CASES["box"], data_format="arrow")
    (data / "main_data.hdf5").unlink()
    with pytest.raises(ValueError, match="in the format 'arrow'"):
        read_dataset(tmp_path)


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    write_minari(tmp_path, episodes_of(*CASES["box"]), *CASES["box"])
    monkeypatch.setattr(minari_folder, "h5py", None)
    with pytest.raises(ImportError, match=r"layeredrl_trl\[offline\]"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("key", ["observation", "reward"])
def test_a_wrong_reading_is_noticed(key, tmp_path, monkeypatch):
    """As TorchRL 0.14.1 reads: into memory that nobody looks at again."""
    write_minari(tmp_path, episodes_of(*CASES["box"]), *CASES["box"])
    compare = minari_folder._compare

    def lose(data, *args):
        data[("next", "reward") if key == "reward" else ("observation",)].zero_()
        return compare(data, *args)

    monkeypatch.setattr(minari_folder, "_compare", lose)
    with pytest.raises(ValueError, match="was read wrongly"):
        read_dataset(tmp_path)


def test_returns_that_moved_to_another_episode_are_noticed(tmp_path, monkeypatch):
    write_minari(tmp_path, episodes_of(*CASES["box"]), *CASES["box"])
    compare = minari_folder._compare

    def roll(data, *args):
        data["next", "reward"] = data["next", "reward"].roll(1, 0)  # the same sum over all
        return compare(data, *args)

    monkeypatch.setattr(minari_folder, "_compare", roll)
    with pytest.raises(ValueError, match="episode 0 was read wrongly: it has a return"):
        read_dataset(tmp_path)
