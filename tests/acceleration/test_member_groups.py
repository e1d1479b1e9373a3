"""Sorting particles by the member that moves them, and back."""

import pytest
import torch

from layeredrl_trl.acceleration import MemberGroups, member_groups
from layeredrl_trl.acceleration.host_reads import without_reading
from layeredrl_trl.acceleration.member_groups import block_size

N, P, E = 7, 2, 3


def members(kind, n_envs=N, n_models=E):
    """One member for each env, or None for particles of every member."""
    return {
        "all": lambda: None,
        "even": lambda: torch.arange(n_envs)[:, None] % n_models,
        "mixed": lambda: torch.randint(n_models, (n_envs, 1)),
        "one-only": lambda: torch.full((n_envs, 1), n_models - 1),  # the others get no env at all
    }[kind]()


@pytest.fixture
def without_waiting(monkeypatch):
    """As on a GPU, for any number of envs."""
    monkeypatch.setattr(member_groups, "_LEAST_SAVED_ROWS", -(2**30))
    monkeypatch.setattr(member_groups, "_LEAST_ROWS", 1)
    with without_reading():
        yield


@pytest.mark.parametrize("lead", [(), (4,)])
@pytest.mark.parametrize("kind", ["all", "even", "mixed", "one-only"])
@pytest.mark.parametrize("way", ["read", "blocks", "all members"])
def test_rows_are_moved_by_their_member_and_come_back_in_their_order(kind, way, lead, request):
    if way != "read":
        request.getfixturevalue("without_waiting")
    if way == "all members":
        request.getfixturevalue("monkeypatch").setattr(member_groups, "_LEAST_SAVED_ROWS", 2**30)
    member = members(kind)
    x = torch.randn(*lead, N, E if member is None else 1, P, 5)
    groups = MemberGroups(N, P, E, member)
    gathered = groups.gather(x)
    assert gathered.shape[: len(lead)] == lead and gathered.shape[-1] == 5
    own = torch.arange(E) if groups.group_member is None else groups.group_member
    assert gathered.shape[-3] == len(own)
    moved = gathered + 1000 * own[:, None, None]
    expected = torch.arange(E)[:, None, None] if member is None else member[..., None, None]
    each = moved.reshape(-1, *moved.shape[-3:]), x.reshape(-1, *x.shape[-4:])
    for one, other in zip(*each, strict=True):
        torch.testing.assert_close(groups.scatter(one), other + 1000 * expected)


def test_envs_that_are_spread_evenly_are_not_padded():
    groups = MemberGroups(12, P, 3, members("even", 12))
    assert groups.gather(torch.zeros(12, 1, P, 5)).shape == (3, 4 * P, 5)


def test_groups_are_padded_to_the_largest():
    groups = MemberGroups(6, P, 3, torch.tensor([0, 0, 0, 0, 2, 2])[:, None])
    assert groups.gather(torch.zeros(6, 1, P, 5)).shape == (3, 4 * P, 5)


def test_gradients_go_to_the_rows_they_came_from():
    x = torch.randn(N, 1, P, 2, requires_grad=True)
    groups = MemberGroups(N, P, E, members("mixed"))
    (gradient,) = torch.autograd.grad((groups.scatter(groups.gather(x)) ** 2).sum(), x)
    torch.testing.assert_close(gradient, 2 * x)


# --- blocks, where the host must not wait for what members there are


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("n_envs", "n_models"), [(1, 1), (1, 5), (5, 5), (24, 3), (41, 4), (3, 9)])
@pytest.mark.parametrize("kind", ["even", "mixed", "one-only"])
def test_blocks_hold_envs_of_one_member(n_envs, n_models, size, kind, without_waiting, monkeypatch):
    monkeypatch.setattr(member_groups, "block_size", lambda *_: size)
    member = members(kind, n_envs, n_models)
    x = torch.arange(n_envs * P).reshape(n_envs, 1, P, 1) + 1.0
    groups = MemberGroups(n_envs, P, n_models, member)
    gathered = groups.gather(x)
    assert gathered.shape == (len(groups.group_member), size * P, 1)
    assert torch.equal(groups.scatter(gathered), x)
    moved = gathered + 1000 * groups.group_member[:, None, None]
    assert torch.equal(groups.scatter(moved), x + 1000 * member[:, None, None])
    assert gathered.shape[0] <= -(-n_envs // size) + min(n_envs, n_models)


def test_blocks_that_nobody_needs_are_of_a_member_that_there_is(without_waiting, monkeypatch):
    monkeypatch.setattr(member_groups, "block_size", lambda *_: 8)
    groups = MemberGroups(64, 1, 3, torch.full((64, 1), 2))
    assert len(groups.group_member) > 8 and groups.group_member.max() == 2


@pytest.mark.parametrize("n_models", [5, 20, 100])
def test_on_a_gpu_a_larger_ensemble_cost_more(n_models):
    """On "meta" no number can be read, as none may be on a GPU."""
    n_envs = 2**16
    member = torch.zeros(n_envs, 1, dtype=torch.long, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        MemberGroups(n_envs, 1, n_models, member)
    with without_reading():
        groups = MemberGroups(n_envs, 1, n_models, member)
    x = torch.zeros(n_envs, 1, 1, 3, device="meta")
    gathered = groups.gather(x)
    assert groups.scatter(gathered).shape == x.shape
    assert gathered.shape[:2].numel() <= 1.26 * n_envs


def test_where_blocks_save_little_all_members_get_all_envs():
    assert block_size(128, 1, 5) is None and block_size(1, 1, 1) is None
    assert block_size(2**16, 1, 1) is None
    for n_envs, n_particles, n_models in [(2**14, 1, 5), (1024, 4, 20), (1024, 1, 100)]:
        size = block_size(n_envs, n_particles, n_models)
        assert size * n_particles >= 64
