"""Plain tensors of batches: to TensorDicts and back, and cut into the batches of many steps."""

from __future__ import annotations

import pytest
import torch

from layeredrl_trl.objectives.columns import Targets, TransitionParts, Transitions, split
from layeredrl_trl.objectives.slices import SliceKeys

NAMES = SliceKeys(action="move", reward="gain", mask="real", planned=("plan", "made"))
ENCODED = [("deep", "z"), "c"]


def make_targets(*batch, **entries):
    return Targets(
        latent=torch.randn(*batch, 3),
        context=torch.randn(*batch, 0),
        action=torch.randn(*batch, 2),
        reward=torch.randn(*batch, 1),
        terminated=torch.rand(*batch, 1) < 0.5,
        value_target=torch.randn(*batch, 1),
        valid=torch.rand(*batch, 1) < 0.5,
        planned=torch.rand(*batch, 1) < 0.5,
    )._replace(**entries)


def make_transitions(*batch):
    entries = [torch.randn(*batch, dim) for dim in (3, 0, 2, 3)]
    return Transitions(*entries, terminated=torch.rand(*batch, 1) < 0.5)


def assert_same(one, other):
    for name in one._fields:
        x, y = getattr(one, name), getattr(other, name)
        assert (x is None and y is None) or torch.equal(x, y), name


@pytest.mark.parametrize("batch", [(4, 2), (1, 1)])
def test_targets_there_and_back(batch):
    targets = make_targets(*batch)
    tensordict = targets.to_tensordict(ENCODED, NAMES)
    assert tensordict.batch_size == batch
    back = Targets.read(tensordict, ENCODED, NAMES, has_reward=True, has_value=True)
    assert_same(back._replace(terminated=targets.terminated), targets)
    assert torch.equal(tensordict["next", "terminated"], targets.terminated)


def test_targets_that_say_nothing_of_plans_are_planned():
    tensordict = make_targets(4, 2, planned=None).to_tensordict(ENCODED, NAMES)
    assert tensordict["plan", "made"].all() and tensordict["plan", "made"].shape == (4, 2, 1)


def test_targets_without_a_reward():
    tensordict = make_targets(4, 2, reward=None).to_tensordict(ENCODED, NAMES)
    assert ("next", "gain") not in tensordict.keys(True)
    assert Targets.read(tensordict, ENCODED, NAMES, has_reward=False, has_value=True).reward is None
    with pytest.raises(KeyError, match="gain"):
        Targets.read(tensordict, ENCODED, NAMES, has_reward=True, has_value=True)


def test_targets_without_a_value():
    targets = make_targets(4, 2, value_target=None)
    tensordict = targets.to_tensordict(ENCODED, NAMES).exclude(("plan", "made"))
    back = Targets.read(tensordict, ENCODED, NAMES, has_reward=True, has_value=False)
    assert back.value_target is None and back.planned is None


def test_a_latent_called_like_the_observation_is_the_latent():
    encoded, transitions = ["observation", "c"], make_transitions(5)
    there = transitions._replace(observation=torch.zeros(5, 3), next_observation=torch.zeros(5, 3))
    for given in (transitions, there):
        back = Transitions.read(given.to_tensordict(encoded, NAMES), encoded, NAMES)
        assert_same(back, transitions)


def test_transitions_there_and_back():
    transitions = make_transitions(5)
    tensordict = transitions.to_tensordict(ENCODED, NAMES)
    assert tensordict.batch_size == (5,) and ("next", "deep", "z") in tensordict.keys(True)
    assert_same(Transitions.read(tensordict, ENCODED, NAMES), transitions)
    whole = transitions._replace(
        weight=torch.rand(5, 1),
        index=torch.arange(5),
        mask=torch.ones(5, 1).bool(),
        observation=torch.randn(5, 4),
        next_observation=torch.randn(5, 4),
    )
    assert_same(Transitions.read(whole.to_tensordict(ENCODED, NAMES), ENCODED, NAMES), whole)


@pytest.mark.parametrize("missing", [("deep", "z"), "move", ("next", "deep", "z")])
def test_a_missing_entry_is_named(missing):
    tensordict = make_transitions(5).to_tensordict(ENCODED, NAMES).exclude(missing)
    with pytest.raises(KeyError, match="move" if missing == "move" else "z"):
        Transitions.read(tensordict, ENCODED, NAMES)


@pytest.mark.parametrize("n", [1, 3])
def test_pieces_are_the_rows_in_order(n):
    parts = TransitionParts(
        observation=torch.randn(6, 2, 2),
        action=torch.arange(6),
        next_observation=torch.randn(6, 2, 2),
        terminated=torch.zeros(6, 1).bool(),
        weight=None,
        index=torch.arange(12).reshape(6, 2),
    )
    pieces = list(split(parts, n))
    assert len(pieces) == n
    for i, piece in enumerate(pieces):
        assert isinstance(piece, TransitionParts) and piece.weight is None
        rows = slice(i * 6 // n, (i + 1) * 6 // n)
        assert_same(piece, TransitionParts(*(x if x is None else x[rows] for x in parts)))


@pytest.mark.parametrize("n", [1, 3])
def test_pieces_are_contiguous(n):
    """They are compiled and recorded for their strides, and copied together if these agree."""
    parts = make_transitions(6)._replace(latent=torch.randn(6, 9)[:, 2:5])
    for piece in split(parts, n):
        assert all(x is None or x.is_contiguous() for x in piece)
