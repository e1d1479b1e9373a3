"""Finding out what lies at a path, and reading it: TorchRL's folders, dumps, buffers."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    Bounded,
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.data.datasets import D4RLExperienceReplay, MinariExperienceReplay
from torchrl.data.replay_buffers import ImmutableDatasetWriter
from torchrl.envs import CatTensors

from layeredrl_trl.data.buffers import check_buffer
from layeredrl_trl.data.datasets import read_dataset
from tests.data.datasets_on_disk import box, episodes_of, steps, write_minari

LENGTHS = (3, 5, 4, 6)
SPACES = {
    "observation_space": {"type": "Dict", "subspaces": {}},
    "action_space": {"type": "Discrete", "dtype": "int64", "n": 4, "shape": []},
    "env_spec": {"id": "Maze-v0"},
}


def check_same(dataset, data):
    got = dataset.buffer[:]
    for key in ("observation", ("next", "observation"), "action", ("next", "reward")):
        torch.testing.assert_close(got[key].float(), data[key].float(), rtol=0, atol=0)
    for key in ("terminated", "truncated", "done"):
        assert torch.equal(got["next", key], data["next", key])


# --- buffers that were dumped, or are given


def number(start, n, n_envs=None):
    """Endless trajectories of 7 steps each, one per env; what is stored tells env and time."""
    time = torch.arange(start, start + n).double()
    env = torch.arange(n_envs or 1).double().unsqueeze(-1)
    state = torch.stack(torch.broadcast_tensors(env + 1, time), -1)
    last = time.remainder(7).eq(6).expand(state.shape[:2]).unsqueeze(-1)
    data = TensorDict(
        {
            "observation": state,
            "action": state[..., :1] / 9,
            "next": {
                "observation": state + torch.tensor([0.0, 1.0]),
                "reward": state.sum(-1, keepdim=True),
                "terminated": torch.zeros_like(last),
                "truncated": last.clone(),
                "done": last.clone(),
            },
        },
        batch_size=state.shape[:2],
    )
    return data if n_envs else data[0]


def expected_rows(rows, n_envs):
    """The rows of time ``rows``, env after env, the last one of each env being its last."""
    data = number(rows.start, len(rows), n_envs or 1).clone()
    data["next", "truncated"][:, -1] = data["next", "done"][:, -1] = True
    return data.reshape(-1)


CAPACITY = 20
FILLS = {"part": 12, "full": 20, "wrapped": 33}


def filled(n, n_envs, storage=LazyTensorStorage):
    size = CAPACITY * (n_envs or 1)
    ndim = 2 if n_envs else 1
    buffer = TensorDictReplayBuffer(storage=storage(size, ndim=ndim), batch_size=4)
    for start in range(0, n, 3):
        buffer.extend(number(start, min(3, n - start), n_envs))
    return buffer


@pytest.mark.parametrize("n_envs", [None, 2])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("how", ["dumps", "object"])
def test_a_buffer_is_read_oldest_first(how, fill, n_envs, tmp_path):
    n = FILLS[fill]
    buffer = filled(n, n_envs)
    if how == "dumps":
        buffer.dumps(tmp_path)
    dataset = read_dataset(tmp_path if how == "dumps" else buffer)
    check_same(dataset, expected_rows(range(max(0, n - CAPACITY), n), n_envs))


def test_a_buffer_that_was_extended_along_time_is_read_env_after_env():
    storage = LazyTensorStorage(CAPACITY * 2, ndim=2)
    buffer = TensorDictReplayBuffer(storage=storage, dim_extend=0)
    for start in range(0, 33, 3):
        buffer.extend(number(start, 3, 2).transpose(0, 1).contiguous())
    check_same(read_dataset(buffer), expected_rows(range(13, 33), 2))


def test_a_memory_mapped_buffer_is_read_by_its_dumps(tmp_path):
    filled(33, None, LazyMemmapStorage).dumps(tmp_path)
    check_same(read_dataset(tmp_path), expected_rows(range(13, 33), None))


def test_the_buffer_that_was_given_stays_as_it_is():
    buffer = filled(33, None)
    before = buffer.storage[:].clone()
    read_dataset(buffer).buffer[:].apply_(torch.zeros_like)
    assert (buffer.storage[:] == before).all()


def test_transforms_of_a_given_buffer_are_applied():
    buffer = filled(12, None)
    for key in ((), ("next",)):
        name = "observation"
        buffer.append_transform(
            CatTensors([(*key, name), "action"], (*key, name) if key else name, del_keys=False)
        )
    assert read_dataset(buffer).observation_spec.shape == (3,)


def test_a_given_buffer_must_hold_tensors():
    with pytest.raises(TypeError, match="ReplayBuffer with a ListStorage"):
        read_dataset(ReplayBuffer(storage=ListStorage(10)))
    with pytest.raises(TypeError, match="or nothing in it"):
        read_dataset(TensorDictReplayBuffer(storage=LazyTensorStorage(10)))


def test_a_damaged_dump_is_one_clear_error(tmp_path):
    filled(12, None).dumps(tmp_path)
    (tmp_path / "writer" / "metadata.json").write_text('{"cursor": 77}')
    with pytest.raises(ValueError, match="20 rows, len=12, cursor=77"):
        read_dataset(tmp_path)


# --- TorchRL's dataset classes


def torchrl_minari(folder):
    """A maze as TorchRL's MinariExperienceReplay keeps it, and the same with one vector."""
    data = steps(LENGTHS)
    sizes = {"place": 3, "goal": 1}
    subspaces = {
        key: {"type": "Box", "dtype": "float64", "shape": [n], "low": [-1] * n, "high": [1] * n}
        for key, n in sizes.items()
    }
    metadata = SPACES | {"observation_space": {"type": "Dict", "subspaces": subspaces}}
    flat = data.clone()
    for key in ((), ("next",)):
        place, goal = data[(*key, "observation")], torch.full((18, 1), 2.0)
        data[(*key, "observation")] = {"goal": goal, "place": place}
        flat[(*key, "observation")] = torch.cat([place, goal], -1)
    choice = torch.arange(18).remainder(3)
    data["action"] = choice
    flat["action"] = torch.nn.functional.one_hot(choice, 4).double()
    data["info"] = {"success": data["next", "done"].squeeze(-1)}
    data.memmap(folder)
    (folder / "env_metadata.json").write_text(json.dumps(metadata))
    return flat


@pytest.mark.parametrize("how", ["folder", "object"])
def test_a_minari_dataset_of_torchrl(how, tmp_path):
    flat = torchrl_minari(tmp_path / "maze-v0")
    source = tmp_path / "maze-v0"
    if how == "object":
        source = MinariExperienceReplay("maze-v0", batch_size=4, root=tmp_path)
    dataset = read_dataset(source)
    assert dataset.env_id == "Maze-v0" and dataset.num_episodes == 4
    assert dataset.action_spec.shape == (4,)  # as in the space: only 3 choices are in the data
    assert list(dataset.layout) == ["place", "goal"]  # as in the space, not as stored
    check_same(dataset, flat)


@pytest.mark.parametrize("how", ["folder", "object"])
def test_split_trajectories_of_torchrl(how, tmp_path):
    flat = torchrl_minari(tmp_path / "maze-v0")
    replay = MinariExperienceReplay("maze-v0", batch_size=4, root=tmp_path, split_trajs=True)
    assert replay.storage[:].batch_size == (4, 6)
    source = replay
    if how == "folder":
        source = tmp_path / "maze-v0_split"
    dataset = read_dataset(
        source, join_observations=[("observation", k) for k in ("place", "goal")]
    )
    assert dataset.num_steps == 18
    torch.testing.assert_close(dataset.buffer[:]["observation"], flat["observation"].float())
    assert torch.equal(dataset.buffer[:]["next", "done"], flat["next", "done"])


@pytest.mark.parametrize("how", ["folder", "object"])
def test_a_d4rl_dataset_of_torchrl(how, tmp_path):
    """As its reader leaves it: zeros after each end, flags of the step before at the root."""
    data = steps(LENGTHS)
    done = data["next", "done"]
    data["next", "observation"][done.squeeze(-1)] = 0
    for key in ("done", "terminated", "truncated", "reward"):
        data[key] = data["next", key].roll(1, 0)
    data.exclude("episode").memmap(tmp_path / "hopper-v2")
    source = tmp_path / "hopper-v2"
    if how == "object":
        source = D4RLExperienceReplay(
            "hopper-v2", batch_size=4, direct_download=True, download=False, root=tmp_path
        )
    with pytest.warns(UserWarning, match="2 that are truncated are left out"):
        dataset = read_dataset(source)
    assert dataset.num_steps == 16 and dataset.num_episodes == 4
    got = dataset.buffer[:]
    assert got["next", "observation"].any(-1).all()
    assert int(got["next", "terminated"].sum()) == int(data["next", "terminated"].sum())


def test_torchrls_own_local_reader_of_minari_is_found_out(tmp_path, monkeypatch):
    """It returns zeros (0.14.1)."""
    pytest.importorskip("h5py")
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    boxes = box(3, dtype=np.float32), box(2, dtype=np.float32, bound=1.0)
    episodes = episodes_of(*boxes)
    env_spec = gymnasium.spec("Pendulum-v1").to_json()  # which Minari wants to make
    metadata = {"dataset_id": "mine/box-v0", "minari_version": "0.5.4", "env_spec": env_spec}
    write_minari(tmp_path / "minari" / "mine" / "box-v0", episodes, *boxes, **metadata)
    replay = MinariExperienceReplay(
        "mine/box-v0", batch_size=4, root=tmp_path / "torchrl", load_from_local_minari=True
    )
    for source in (replay, tmp_path / "torchrl" / "mine" / "box-v0"):
        with pytest.raises(ValueError, match="every observation is 0"):
            read_dataset(source)
    assert read_dataset("mine/box-v0").num_steps == 18


def test_learning_asks_for_a_dataset_to_be_read(tmp_path):
    torchrl_minari(tmp_path / "maze-v0")
    replay = MinariExperienceReplay("maze-v0", batch_size=4, root=tmp_path)
    with pytest.raises(TypeError, match=r"Pass\s+read_dataset\(buffer\).buffer"):
        check_buffer(replay)
    check_buffer(read_dataset(replay).buffer)


def test_damaged_spaces_of_torchrl_are_one_clear_error(tmp_path):
    torchrl_minari(tmp_path)
    (tmp_path / "env_metadata.json").write_text('{"action_space": {"type": "Box"}}')
    with pytest.raises(ValueError, match=r"env_metadata.json: action_space: expected a Box with"):
        read_dataset(tmp_path)


# --- what it is and what it is not


def test_the_buffer_cannot_be_extended(tmp_path):
    steps().memmap(tmp_path)
    buffer = read_dataset(tmp_path).buffer
    with pytest.raises(RuntimeError, match="doesn't allow writing"):
        buffer.extend(buffer[:])
    assert buffer.sample(7)["index"].shape == (7,)


def test_a_fixed_buffer_of_a_user_is_read():
    storage = TensorStorage(steps())
    buffer = TensorDictReplayBuffer(storage=storage, writer=ImmutableDatasetWriter())
    check_same(read_dataset(buffer), steps())


def test_the_action_spec_that_is_given_is_kept(tmp_path):
    steps().memmap(tmp_path)
    spec = Bounded(-3.0, 3.0, (2,))
    assert read_dataset(tmp_path, action_spec=spec).action_spec is spec


def test_a_foreign_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"looked for data/main_data.hdf5 .*, meta.json .*storage"):
        read_dataset(tmp_path)


def test_a_place_that_is_not_there_says_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match=f"nothing at 'no/such-v0', and no Minari .* in {tmp_path}"
    ):
        read_dataset("no/such-v0")
    assert not list(tmp_path.iterdir())  # nothing was downloaded or made
    with pytest.raises(ValueError, match="holds no dataset"):
        read_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"source": 3}, "source: expected the path .* got builtins.int"),
        ({"action_spec": 2}, "action_spec: expected a TensorSpec, got int"),
        ({"join_observations": "observation"}, "join_observations must be a sequence of keys"),
    ],
)
def test_arguments_of_another_kind(options, text, tmp_path):
    steps().memmap(tmp_path)
    with pytest.raises(TypeError, match=text):
        read_dataset(**{"source": tmp_path, **options})
