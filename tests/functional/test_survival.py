"""Survival: against a loop over steps, and what is not finite of the dead."""

import math

import pytest
import torch

from layeredrl_trl.functional import survival, zero_if_dead

NAN, INF = math.nan, math.inf


def alive_after(alive, probs):
    """The same, one number after the other: what is dead stays dead."""
    steps = []
    for p in probs:
        alive = 0.0 if alive == 0 else alive * (1 - p)
        steps.append(alive)
    return steps


@pytest.mark.parametrize(
    ("alive", "probs"),
    [
        (1.0, [0.2, 0.5, 0.0, 1.0, 0.3]),
        (0.4, [0.2, 1.0, NAN, 0.5, NAN]),
        (0.0, [NAN, NAN, 0.5, 0.1, 0.1]),
        (1.0, [0.2, NAN, 0.5, 1.0, 0.1]),
        (0.7, [1.0, 0.3, NAN, NAN, 1.0]),
        (NAN, [1.0, 0.3, 0.2, 0.1, 1.0]),
    ],
)
def test_the_dead_stay_dead_like_in_a_loop(alive, probs):
    found = survival(torch.tensor([[alive]]), torch.tensor(probs)[None, :, None])
    assert found.shape == (1, 5, 1)
    expected = torch.tensor(alive_after(alive, probs))
    torch.testing.assert_close(found.flatten(), expected, equal_nan=True)


def test_gradient_with_nan_behind_the_end():
    prob = torch.tensor([[0.5, 1.0, NAN]], requires_grad=True)
    survival(torch.ones(1), prob).sum().backward()
    assert prob.grad.tolist() == [[-1.0, -1.0, 0.0]]


def test_only_what_is_not_finite_of_the_dead_is_0():
    alive = torch.tensor([0.0, 0.0, 0.0, 0.1, NAN, -0.0])
    x = torch.tensor([2.0, INF, NAN, INF, NAN, -INF])
    assert zero_if_dead(alive, x).isnan().tolist() == [False] * 4 + [True, False]
    assert zero_if_dead(alive, x)[[0, 1, 2, 3, 5]].tolist() == [2.0, 0.0, 0.0, INF, 0.0]
