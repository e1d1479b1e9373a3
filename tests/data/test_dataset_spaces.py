"""Actions as they are stored, and what they are taken for."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.envs import GymEnv

from layeredrl_trl.data.dataset_spaces import action_and_spec, to_vector

INDEX = torch.tensor([0, 2, 1, 2])
ROWS = torch.nn.functional.one_hot(INDEX, 3)
IN_BOX = torch.tensor([[0.5, -1.0], [0.1, 0.0], [1.0, 0.3], [0.2, 0.1]])


def guess(action, space=None, spec=None):
    return action_and_spec(action, space, spec, "data")


# --- guesses


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_one_hot_rows_are_one_choice(dtype):
    action, spec = guess(ROWS.to(dtype))
    assert type(spec) is OneHot and spec.shape == (3,)
    assert torch.equal(action, ROWS) and spec.is_in(action)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_integers_are_one_choice(shape):
    action, spec = guess(INDEX.reshape(shape))
    assert torch.equal(action, ROWS) and spec.shape == (3,)


def test_the_choice_is_that_of_torchrls_env():
    spec = GymEnv("CartPole-v1").action_spec
    action, guessed = guess(torch.tensor([0, 1, 1]))
    assert guessed == spec and action.dtype == spec.rand().dtype


def test_numbers_within_one_are_bounded_by_one():
    action, spec = guess(IN_BOX.double())
    assert action.dtype is torch.float32 and torch.equal(action, IN_BOX)
    assert spec == Bounded(-torch.ones(2), torch.ones(2), (2,), dtype=torch.float32)


def test_other_numbers_are_bounded_by_the_data():
    _, spec = guess(IN_BOX * 3)
    assert spec.space.low.tolist() == pytest.approx([0.3, -3.0])
    assert spec.space.high.tolist() == pytest.approx([3.0, 0.9])


def test_numbers_without_a_dim_of_features_get_one():
    action, spec = guess(torch.tensor([0.0, 0.5, -0.2]))
    assert action.shape == (3, 1) and spec.shape == (1,)


def test_several_integers_are_refused():
    with pytest.raises(ValueError, match="several choices at once"):
        guess(torch.tensor([[1, 2], [0, 1]]))


def test_negative_choices_are_refused():
    with pytest.raises(ValueError, match="choices among"):
        guess(torch.tensor([-1, 2]))


# --- what files say


def test_entries_are_joined_with_their_bounds():
    space = {
        "type": "Dict",
        "subspaces": {
            "turn": {"type": "Box", "shape": [1], "low": [-3.0], "high": [2.0]},
            "go": {"type": "Box", "shape": [2], "low": [0.0, 0.0], "high": [1.0, 5.0]},
        },
    }
    stored = TensorDict(go=torch.rand(4, 2), turn=torch.rand(4, 1), batch_size=[4])
    action, spec = guess(stored, space)
    assert torch.equal(action, torch.cat([stored["turn"], stored["go"]], -1))
    assert spec.space.low.tolist() == [-3, 0, 0] and spec.space.high.tolist() == [2, 1, 5]


def test_a_space_without_bounds_is_unbounded():
    space = {"type": "Box", "shape": [2], "low": [-1, -float("inf")], "high": [1, 1]}
    assert type(guess(IN_BOX, space)[1]) is type(Unbounded((2,)))


# --- what the caller says


def test_the_callers_spec_goes_before_everything():
    spec = Bounded(-5.0, 5.0, (2,))
    action, got = guess(IN_BOX.double(), {"type": "Discrete", "n": 9}, spec)
    assert got is spec and torch.equal(action, IN_BOX)
    action, _ = guess(INDEX, None, OneHot(7, dtype=torch.bool))
    assert action.shape == (4, 7) and action.dtype is torch.bool
    assert torch.equal(guess(INDEX, None, Categorical(4))[0], INDEX)


@pytest.mark.parametrize(
    "action", [IN_BOX[:, :1], TensorDict(a=IN_BOX, batch_size=[4])], ids=["size", "entries"]
)
def test_a_spec_of_another_shape_is_refused(action):
    with pytest.raises(ValueError, match=r"action_spec is for actions of shape \[2\]"):
        guess(action, None, Bounded(-1.0, 1.0, (2,)))


def test_a_kind_without_a_vector_is_refused():
    with pytest.raises(ValueError, match="'Graph' has no vector"):
        to_vector(IN_BOX, {"type": "Graph"}, "data")
