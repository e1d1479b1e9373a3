"""Sizes of spaces, and actions as network inputs."""

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)

from layeredrl_trl.modules import action_features, space_dim
from layeredrl_trl.modules.spaces import is_continuous


@pytest.mark.parametrize(
    ("space", "dims"),
    [
        (None, 0),
        (0, 0),
        (3, 3),
        (gymnasium.spaces.Box(-1, 1, (3,)), 3),
        (gymnasium.spaces.Box(-1, 1, (2, 3)), 6),
        (gymnasium.spaces.Box(-1, 1, ()), 1),
        (gymnasium.spaces.Discrete(4), 4),
        (Bounded(-1, 1, (3,)), 3),
        (Bounded(-1, 1, (5, 3)), 3),
        (Bounded(-1, 1, ()), 1),
        (Unbounded((3,)), 3),
        (OneHot(4), 4),
        (MultiOneHot([2, 3]), 5),
        (Categorical(4), 4),
        (Categorical(4, shape=(1,)), 4),
    ],
    ids=str,
)
def test_dims(space, dims):
    assert space_dim(space, "space") == dims


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_features_of_continuous_actions(batch):
    action = torch.randn(*batch, 2, dtype=torch.float64)
    out = action_features(action, torch.Size(batch), 2)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), action, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("batch", [(), (4,), (3, 4), (4, 4)])
def test_features_of_discrete_actions(batch, dtype):
    index = torch.randint(4, batch)
    expected = torch.eye(4)[index]
    for action in (index.to(dtype), index.to(dtype).unsqueeze(-1), expected.to(dtype)):
        out = action_features(action, torch.Size(batch), 4)
        assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_gradient_reaches_continuous_actions():
    action = torch.randn(3, 2, requires_grad=True)
    action_features(action, torch.Size([3]), 2).sum().backward()
    assert (action.grad == 1).all()


@pytest.mark.parametrize(
    "action",
    [
        torch.zeros(5, 1),
        torch.zeros(1, 2),
        torch.zeros(2),
        torch.zeros(5),
        torch.zeros(5, 3),
        torch.zeros(1).long(),
        torch.zeros(1, 1).long(),
        torch.zeros(5, 3).long(),
    ],
    ids=lambda a: f"{list(a.shape)}-{a.dtype}",
)
def test_no_broadcasting(action):
    with pytest.raises(ValueError, match=r"action: expected shape \[5, 2\] or indices .* \[5\]"):
        action_features(action, torch.Size([5]), 2)


@pytest.mark.parametrize(
    "space",
    [
        "3",
        3.0,
        True,
        Binary(5),
        MultiCategorical([2, 3]),
        gymnasium.spaces.MultiDiscrete([2, 3]),
        gymnasium.spaces.Dict(),
    ],
    ids=str,
)
def test_unknown_space(space):
    with pytest.raises(TypeError, match=r"action_space: expected .* got .*\w+\."):
        space_dim(space, "action_space")


def test_composite_gets_a_hint():
    with pytest.raises(TypeError, match=r"Composite \(pass one of its entries\)"):
        space_dim(Composite(action=OneHot(3)), "action_space")


def test_a_number_of_numpy():
    dim = space_dim(np.int64(3), "action_space")
    assert dim == 3 and type(dim) is int
    assert is_continuous(np.int64(1)) and not is_continuous(np.int64(2))


def test_negative_number():
    with pytest.raises(ValueError, match="context_space: expected at least 0 dims, got -1"):
        space_dim(-1, "context_space")


def test_a_bare_number_of_dims_says_nothing_unless_it_is_1():
    assert is_continuous(1) and is_continuous(gymnasium.spaces.Box(-1, 1, (2,)))
    assert not is_continuous(2) and not is_continuous(gymnasium.spaces.Discrete(1))
