"""Splitting a dataset by whole episodes."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl.data.datasets import read_dataset
from layeredrl_trl.data.episodes import split_episodes
from tests.data.datasets_on_disk import steps

LENGTHS = (3, 5, 4, 6, 2, 7, 3, 4, 5, 6)


@pytest.fixture
def buffer(tmp_path):
    steps(LENGTHS).memmap(tmp_path)
    return read_dataset(tmp_path).buffer


@pytest.mark.parametrize(("fraction", "n_held"), [(0.01, 1), (0.1, 1), (0.3, 3), (0.99, 9)])
def test_every_episode_is_on_one_side(buffer, fraction, n_held):
    train, held_out = split_episodes(buffer, fraction)
    sides = [set(part[:]["episode"].tolist()) for part in (train, held_out)]
    assert len(sides[1]) == n_held
    assert sides[0] | sides[1] == set(range(10)) and not sides[0] & sides[1]
    for part in (train, held_out):
        for episode in set(part[:]["episode"].tolist()):
            got = part[:][part[:]["episode"] == episode]
            assert (got == buffer[:][buffer[:]["episode"] == episode]).all()


def test_the_split_is_the_generators(buffer):
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return split_episodes(buffer, 0.3, generator=generator)[1][:]["episode"].tolist()

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(10)}) > 5


def test_the_parts_have_rows_of_their_own(buffer):
    before = buffer[:].clone()
    train, held_out = split_episodes(buffer, 0.5)
    train[:]["observation"].zero_()
    held_out[:]["observation"].zero_()
    assert (buffer[:] == before).all()
    with pytest.raises(RuntimeError, match="doesn't allow writing"):
        train.extend(before)


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 1.5])
def test_a_fraction_is_between_zero_and_one(buffer, fraction):
    with pytest.raises(ValueError, match="fraction must be between 0 and 1"):
        split_episodes(buffer, fraction)


def test_what_cannot_be_split(tmp_path):
    with pytest.raises(TypeError, match="got TensorDict"):
        split_episodes(steps())
    plain = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
    plain.extend(TensorDict(x=torch.zeros(5), batch_size=[5]))
    with pytest.raises(KeyError, match=r"read_dataset\(buffer\).buffer has it"):
        split_episodes(plain)
    steps((4,)).memmap(tmp_path)
    with pytest.raises(ValueError, match="1 episode cannot be split"):
        split_episodes(read_dataset(tmp_path).buffer)
