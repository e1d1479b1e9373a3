"""The blocks of docs/bridges.md run, each by itself, and do what the page says."""

import re
from functools import partial

import pytest
import torch

from layeredrl_trl import bridges
from layeredrl_trl.bridges import from_tianshou
from layeredrl_trl.predictors import RewardPredictor
from tests.bridges.tianshou_rings import Rings, record
from tests.extras import needs
from tests.pages import DOCS, blocks_of, namespace_of

PAGE = "bridges.md"
BLOCKS = blocks_of(PAGE)
namespace = partial(namespace_of, PAGE)


@pytest.mark.parametrize(
    "title", [pytest.param(x, marks=needs("onnxscript") if x == "ONNX" else ()) for x in BLOCKS]
)
def test_each_block_runs_by_itself(title):
    assert namespace(title)


def test_the_table_names_what_there_is():
    table = (DOCS / PAGE).read_text().partition("\n## ")[0]
    names = re.findall(r"^\|.*\| `(\w+)` \|$", table, re.M)
    assert sorted(names) == sorted(bridges.__all__)


def test_the_world_model_and_the_loss_have_the_parts_of_the_predictor():
    scope = namespace("TorchRL's WorldModel")
    own = {id(p) for p in scope["predictor"].parameters()}
    for module in (scope["world_model"], scope["loss"]):
        assert {id(p) for p in module.parameters()} <= own


def test_the_predictor_of_layeredrl_has_the_sizes_that_are_said():
    scope = namespace("Predictors of LayeredRL")
    assert isinstance(scope["predictor"], RewardPredictor)
    assert scope["mean"].shape == (7, 1, 1, 2)


def test_the_buffer_holds_the_rows_in_order():
    scope = namespace("Buffers of tianshou")
    data, order = scope["buffer"][:], [1, 2, 0, 3, 4]
    expected = torch.from_numpy(scope["arrays"]["obs"][order]).float()
    assert torch.equal(data["observation"], expected)
    assert data["next", "done"].flatten().tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("n_rings", [1, 3])
def test_the_arrays_of_a_buffer_of_tianshou(n_rings):
    rings = record(Rings([4] * n_rings), [[(3, "terminated"), (2, "unfinished")]] * n_rings)
    like = Ring(rings.arrays, rings.last_index, 4 * n_rings, sum(rings.lengths))
    if n_rings > 1:
        sizes = zip(rings.sizes, rings.lengths, strict=True)
        like.buffers = [Ring({}, None, size, length) for size, length in sizes]
    arrays, numbers = namespace("Buffers of tianshou")["arrays_of"](like)
    assert len(from_tianshou(arrays, **numbers)) == 4 * n_rings


class Ring:
    """The attributes of a tianshou buffer that the page reads."""

    def __init__(self, arrays, last_index, maxsize, length):
        self._meta, self.last_index, self.maxsize = arrays, last_index, maxsize
        self.length = length

    def __len__(self):
        return self.length
