"""N-step targets of slices: a loop over whole episodes, what is valued behind them, errors."""

import pytest
import torch

from layeredrl_trl.objectives import Slices
from layeredrl_trl.objectives.targets import n_step_returns, value_target
from tests.oracles import n_step_target

K, N, GAMMA = 3, 4, 0.9
NAN = float("nan")

every_value = pytest.mark.parametrize("needs_action", [False, True], ids=["state-value", "q"])


def make_slices(rewards, *, terminated, needs_action, dtype=torch.float32, planned=None) -> Slices:
    """A slice from each step of an episode. The observation of step ``t`` is ``t``.

    Padding holds garbage in what is summed; what stands for a position is in range.
    """
    n, length = len(rewards), K + N - 1 + needs_action
    step = torch.arange(n)[:, None] + torch.arange(length)
    mask = (step < n).unsqueeze(-1)
    position = step.clamp_max(n - 1).unsqueeze(-1)
    reward = torch.tensor(rewards, dtype=dtype)[position]
    return Slices(
        observation=position,
        action=10 * position,
        next_observation=position + 1,
        terminated=(position == n - 1) & terminated,
        reward=torch.where(mask, reward, NAN),
        mask=mask,
        planned=torch.rand(n, length, 1) < 0.5 if planned is None else planned[position],
        index=step,
    )


def returns_of(slices, *, needs_action, **options) -> Slices:
    sizes = {"k_steps": K, "n_steps": N, "gamma": GAMMA}
    return n_step_returns(slices, **{**sizes, **options}, needs_action=needs_action)


@every_value
def test_only_the_first_steps_are_left(needs_action):
    slices = make_slices([1.0] * 8, terminated=False, needs_action=needs_action)
    first = returns_of(slices, needs_action=needs_action)
    for name in ("observation", "action", "next_observation", "reward", "planned", "index"):
        expected = getattr(slices, name)[:, :K]
        torch.testing.assert_close(getattr(first, name), expected, rtol=0, atol=0, equal_nan=True)
    assert first.weight is None
    returns = first.returns
    assert returns.total.shape == returns.discount.shape == returns.bootstraps.shape == (8, K, 1)
    assert returns.exists.shape == (8, K, 1) if needs_action else returns.exists is None
    assert returns.total.dtype == returns.discount.dtype == torch.float64
    assert returns.observation.shape == (8, K, 1)


@every_value
@pytest.mark.parametrize("terminated", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0], ids=lambda x: f"{x} planned")
def test_targets_like_a_loop_over_the_episode(n, terminated, needs_action, share):
    rewards, planned = torch.randn(n).tolist(), torch.rand(n) < share
    values = torch.randn(n + 1)  # of each position
    slices = make_slices(rewards, terminated=terminated, needs_action=needs_action, planned=planned)
    first = returns_of(slices, needs_action=needs_action)
    if needs_action:
        assert torch.equal(first.returns.action, 10 * first.returns.observation)
        known = {"action_values": values[:-1].tolist()}
    else:
        assert first.returns.action is None
        known = {"state_values": values[1:].tolist()}
    known["planned"] = planned.tolist()
    value = torch.where(first.returns.bootstraps, values[first.returns.observation], 0.0)
    target = value_target(first, value)
    assert target.dtype == torch.float32
    for start in range(n):
        for j in range(K):
            expected = None
            if start + j < n:
                expected = n_step_target(rewards, terminated, start + j, N, GAMMA, **known)
            assert first.mask[start, j].item() is (start + j < n)
            if needs_action:
                assert first.returns.exists[start, j].item() is (expected is not None)
            assert target[start, j].item() == pytest.approx(expected or 0.0, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_target_has_the_dtype_of_the_reward(dtype):
    slices = make_slices([1.0] * 4, terminated=False, needs_action=False, dtype=dtype)
    assert value_target(returns_of(slices, needs_action=False), torch.zeros(4, K, 1)).dtype is dtype


@every_value
def test_the_reward_itself_stays_as_it_was(needs_action):
    """The reward loss reads it, also on the step that has no target of a Q-function."""
    slices = make_slices([1.0, 2.0], terminated=False, needs_action=needs_action)
    first = returns_of(slices, needs_action=needs_action)
    assert first.reward[0, :2, 0].tolist() == [1.0, 2.0]


@every_value
def test_slices_that_are_too_short(needs_action):
    slices = make_slices([1.0] * 4, terminated=False, needs_action=needs_action)
    length = K + N + needs_action
    with pytest.raises(ValueError, match=f"need slices of {length} steps, got {length - 1}"):
        returns_of(slices, needs_action=needs_action, n_steps=N + 1)
