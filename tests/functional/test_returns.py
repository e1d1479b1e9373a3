"""N-step targets: a loop over whole episodes, garbage on padding, gradients, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layeredrl_trl.functional import (
    add_bootstrap,
    discounted_window_sum,
    n_step_sums,
    n_step_window,
)
from tests.oracles import n_step_target

GAMMAS = [0.0, 0.3, 0.9, 0.99, 1.0]
NAN = float("nan")


def n_step_targets(reward, window, value, *, gamma, n_steps):
    """Targets as the loss puts them together: sums, and the value where it counts."""
    total, discount = n_step_sums(reward, window, gamma=gamma, n_steps=n_steps)
    target = add_bootstrap(total, discount, torch.where(window.bootstrap, value, 0.0))
    dtype = reward.dtype if reward.is_floating_point() else torch.float32
    return torch.where(window.valid, target, 0.0).to(dtype)


def episodes(lengths, seed=0):
    """Episodes as lists: rewards, whether terminated, state values, action values."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(3, n, generator=generator).tolist() for n in lengths)
    return [(rewards, i % 2 == 0, v, q) for i, (rewards, v, q) in enumerate(draws)]


def slices_of(episode, k, n, *, next_action, extra=0, garbage=NAN):
    """A slice from every step of an episode: what a sampler would give, garbage on padding."""
    rewards, terminated, *values = episode
    width = k + n - 1 + next_action + extra
    rows = {"reward": [], "terminated": [], "mask": [], "value": []}
    for start in range(len(rewards)):
        real = min(width, len(rewards) - start)
        pad = width - real
        flags = [terminated and start + t == len(rewards) - 1 for t in range(real)]
        rows["reward"].append(rewards[start : start + real] + [garbage] * pad)
        rows["terminated"].append(flags + [garbage != garbage or not terminated] * pad)
        rows["mask"].append([True] * real + [False] * pad)
        rows["value"].append(values[next_action][start : start + real] + [garbage] * pad)
    return {key: torch.tensor(row) for key, row in rows.items()}


def targets_of(slices, k, n, gamma, *, next_action, garbage=NAN):
    flags = slices["terminated"], slices["mask"]
    planned = slices.get("planned")
    window = n_step_window(*flags, k, n, next_action=next_action, planned=planned)
    at = torch.arange(k) + window.steps - (0 if next_action else 1)
    value = torch.nn.functional.pad(slices["value"], (0, 1), value=garbage)
    value = value.gather(-1, at.clamp(0, value.shape[-1] - 1))
    value = torch.where(window.bootstrap, value, garbage)
    return n_step_targets(slices["reward"], window, value, gamma=gamma, n_steps=n), window


def assert_like_oracle(episode, k, n, gamma, *, next_action, extra=0, planned=None, reached=None):
    slices = slices_of(episode, k, n, next_action=next_action, extra=extra)
    step = torch.arange(len(episode[0]))[:, None] + torch.arange(slices["mask"].shape[-1])
    step = step.clamp_max(len(episode[0]) - 1)
    if planned is not None:
        slices["planned"] = planned[step]
    if reached is not None:
        slices["terminated"] |= reached[step] & slices["mask"]
    target, window = targets_of(slices, k, n, gamma, next_action=next_action)
    rewards, terminated, v, q = (
        torch.tensor(x).tolist() if isinstance(x, list) else x for x in episode
    )
    values = {"action_values": q} if next_action else {"state_values": v}
    values["planned"] = None if planned is None else planned.tolist()
    values["reached"] = None if reached is None else reached.tolist()
    expected, valid = torch.zeros(target.shape).double(), torch.zeros(target.shape).bool()
    for start in range(len(rewards)):
        for j in range(min(k, len(rewards) - start)):
            g = n_step_target(rewards, terminated, start + j, n, gamma, **values)
            if g is not None:
                expected[start, j], valid[start, j] = g, True
    assert torch.equal(window.valid & slices["mask"][:, :k], valid)
    torch.testing.assert_close(
        torch.where(valid, target, 0.0).double(), expected, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shapes_and_dtypes(batch):
    mask, terminated = torch.ones(*batch, 6).bool(), torch.zeros(*batch, 6).bool()
    window = n_step_window(terminated, mask, k_steps=4, n_steps=3)
    assert window.steps.shape == window.bootstrap.shape == window.valid.shape == (*batch, 4)
    assert window.summable.shape == (*batch, 6)
    for dtype in (torch.float32, torch.float64):
        reward = torch.zeros(*batch, 6, dtype=dtype)
        target = n_step_targets(reward, window, torch.zeros(*batch, 4), gamma=0.9, n_steps=3)
        assert target.shape == (*batch, 4) and target.dtype == dtype


@pytest.mark.parametrize("next_action", [False, True], ids=["state-value", "q-function"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 64), (64, 1), (64, 64), (5, 7), (3, 32)])
def test_targets_like_a_loop_over_episodes(k, n, gamma, next_action):
    for episode in episodes([1, 2, 7, 8, 40, 140]):
        assert_like_oracle(episode, k, n, gamma, next_action=next_action)


@given(
    length=st.integers(1, 30),
    k=st.integers(1, 12),
    n=st.integers(1, 12),
    gamma=st.sampled_from(GAMMAS) | st.floats(0, 1),
    extra=st.integers(0, 9),
    next_action=st.booleans(),
    terminated=st.booleans(),
    share=st.sampled_from([None, 0.0, 0.5, 0.9, 1.0]),
    reaching=st.sampled_from([None, 0.1, 0.5]),
)
def test_any_slice_like_a_loop_over_episodes(
    length, k, n, gamma, extra, next_action, terminated, share, reaching
):
    (rewards, _, v, q), *_ = episodes([length], seed=length)
    generator = torch.Generator().manual_seed(length)
    planned = reached = None
    if share is not None:
        planned = torch.rand(length, generator=generator) < share
    if reaching is not None:
        reached = torch.rand(length, generator=generator) < reaching
        reached[-1] = False
    assert_like_oracle(
        (rewards, terminated, v, q),
        k,
        n,
        gamma,
        next_action=next_action,
        extra=extra,
        planned=planned,
        reached=reached,
    )


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 31, 63, 64, 100])
def test_window_sum_like_a_loop(gamma, n):
    reward = torch.randn(2, 70, dtype=torch.float64)
    expected = torch.zeros(2, 70, dtype=torch.float64)
    for b in range(2):
        for t in range(70):
            for i in range(min(n, 70 - t)):
                expected[b, t] += gamma**i * reward[b, t + i]
    torch.testing.assert_close(discounted_window_sum(reward, gamma, n), expected)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_bootstrap_value_is_added_with_its_discount(batch):
    total, discount = torch.randn(2, *batch, 4, dtype=torch.float64)
    value = 1e4 * torch.randn(*batch, 4)
    out = add_bootstrap(total, discount, value)
    assert out.shape == (*batch, 4) and out.dtype == torch.float64
    torch.testing.assert_close(out, total + discount * value.double(), rtol=1e-12, atol=1e-12)


def test_targets_are_sums_with_a_bootstrap_value_added():
    reward, length = torch.randn(5, 8), torch.randint(1, 9, (5, 1))
    mask, terminated = torch.arange(8) < length, torch.rand(5, 8) < 0.5
    window, value = n_step_window(terminated, mask, 5, 4), torch.randn(5, 5)
    target = n_step_targets(reward, window, value, gamma=0.9, n_steps=4)
    sums = n_step_sums(reward, window, gamma=0.9, n_steps=4)
    expected = add_bootstrap(*sums, torch.where(window.bootstrap, value, 0.0)).float()
    assert torch.equal(target, torch.where(window.valid, expected, 0.0))


def test_gamma_0_is_the_reward():
    reward, mask = torch.randn(4, 8), torch.ones(4, 8).bool()
    window = n_step_window(~mask, mask, k_steps=5, n_steps=4)
    target = n_step_targets(reward, window, torch.randn(4, 5), gamma=0.0, n_steps=4)
    assert torch.equal(target, reward[:, :5])


@pytest.mark.parametrize("next_action", [False, True])
def test_garbage_where_nothing_counts_changes_nothing(next_action):
    for episode in episodes([1, 3, 9]):
        results = []
        for garbage in (NAN, float("inf"), 1e30, 0.0):
            slices = slices_of(episode, 4, 3, next_action=next_action, garbage=garbage)
            results.append(targets_of(slices, 4, 3, 0.9, next_action=next_action, garbage=garbage))
        for target, window in results:
            assert torch.equal(target, results[0][0])
            assert torch.equal(window.valid, results[0][1].valid)


def test_all_padding_has_no_target():
    mask = torch.zeros(1, 5).bool()
    window = n_step_window(torch.ones(1, 5).bool(), mask, k_steps=3, n_steps=3)
    nan = torch.full((1, 5), NAN)
    target = n_step_targets(nan, window, torch.zeros(1, 3), gamma=0.9, n_steps=3)
    assert not window.valid.any() and torch.equal(target, torch.zeros(1, 3))


def test_flattening_the_batch_changes_nothing():
    reward, length = torch.randn(2, 3, 7), torch.randint(1, 8, (2, 3, 1))
    mask, terminated = torch.arange(7) < length, torch.rand(2, 3, 7) < 0.5
    value = torch.randn(2, 3, 4)

    def target(*tensors):
        r, m, t, v = tensors
        return n_step_targets(r, n_step_window(t, m, 4, 4), v, gamma=0.9, n_steps=4)

    together = target(reward, mask, terminated, value)
    flat = target(*(x.flatten(0, 1) for x in (reward, mask, terminated, value)))
    assert torch.equal(together.flatten(0, 1), flat)


def test_gradient_reaches_what_counts_and_garbage_gets_none():
    slices = slices_of(([1.0] * 4, False, [1.0] * 4, [1.0] * 4), 2, 2, next_action=0)
    reward = slices["reward"].requires_grad_()
    window = n_step_window(slices["terminated"], slices["mask"], 2, 2)
    value = torch.where(window.bootstrap & window.valid, 1.0, NAN).requires_grad_()
    n_step_targets(reward, window, value, gamma=0.5, n_steps=2).sum().backward()
    assert torch.isfinite(reward.grad).all() and torch.isfinite(value.grad).all()
    assert (reward.grad[~slices["mask"]] == 0).all()
    # both targets of the first slice sum two rewards and a value
    assert reward.grad[0].tolist() == [1.0, 1.5, 0.5] and value.grad[0].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("k", "n", "steps", "next_action", "message"),
    [
        (0, 1, 5, False, "must be at least 1, got 0 and 1"),
        (1, 0, 5, False, "must be at least 1, got 1 and 0"),
        (3, 3, 4, False, "need slices of 5 steps, got 4"),
        (3, 3, 5, True, "need slices of 6 steps, got 5"),
    ],
)
def test_errors(k, n, steps, next_action, message):
    mask = torch.ones(2, steps).bool()
    with pytest.raises(ValueError, match=message):
        n_step_window(mask, mask, k, n, next_action=next_action)


def test_integer_rewards_cut_targets_off():
    mask, terminated = torch.ones(1, 2).bool(), torch.zeros(1, 2).bool()
    window = n_step_window(terminated, mask, k_steps=1, n_steps=2)
    reward, value = torch.tensor([[1, 1]]), torch.tensor([[1.0]])
    target = n_step_targets(reward, window, value, gamma=0.5, n_steps=2)
    assert target.dtype is torch.float32 and target.item() == 1.75


def test_a_goal_that_is_reached_in_mid_slice_ends_the_target():
    """Only the last step of a slice was asked whether it terminates."""
    mask, terminated = torch.ones(1, 3).bool(), torch.tensor([[False, True, False]])
    window = n_step_window(terminated, mask, 1, 3)
    total, _ = n_step_sums(torch.ones(1, 3), window, gamma=1.0, n_steps=3)
    assert total.item() == 2 and not window.bootstrap.any()


@pytest.mark.parametrize("next_action", [False, True], ids=["state-value", "q-function"])
def test_targets_of_planned_steps_hold_no_reward_of_random_steps_behind_them(next_action):
    planned = torch.tensor([[True, True, False, True, True, True]])
    reward, mask = torch.tensor([[1.0, 1.0, 100.0, 1.0, 1.0, 1.0]]), torch.ones(1, 6).bool()
    window = n_step_window(~mask, mask, 4, 2, next_action=next_action, planned=planned)
    assert window.steps.tolist() == [[2, 1, 2, 2]]
    assert window.bootstrap.all() and window.valid.all()
    total, discount = n_step_sums(reward, window, gamma=0.5, n_steps=2)
    assert total.tolist() == [[1.5, 1.0, 100.5, 1.5]]
    assert discount.tolist() == [[0.25, 0.5, 0.25, 0.25]]
