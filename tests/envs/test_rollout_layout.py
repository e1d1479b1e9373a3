"""TorchRL's layout of a rollout: root and "next" are one step apart, views of one tensor."""

import pytest
import torch

from layeredrl_trl.envs.rollout_layout import as_rollout
from tests.envs.imagined import BATCH_SHAPES

N_STEPS = 4


def outcome(n):
    """Entries after each of some steps."""
    return {
        "latent": torch.randn(n, N_STEPS, 3, 2),
        ("deep", "x"): torch.randn(n, N_STEPS, 1),
        "reward": torch.randn(n, N_STEPS, 1),
        "truncated": torch.zeros(n, N_STEPS, 1, dtype=torch.bool),
        "done": torch.rand(n, N_STEPS, 1) < 0.5,
    }


def lay_out(batch=(5,), known=(), set_truncated=False):
    batch = torch.Size(batch)
    n = batch.numel()
    following, actions = outcome(n), torch.randn(n, N_STEPS, 2)
    known = {key: torch.randn(n, *following[key].shape[2:]) for key in known}
    out = as_rollout(
        following,
        known,
        (("agent", "action"), actions),
        batch,
        device=torch.device("cpu"),
        set_truncated=set_truncated,
    )
    return out, following, known, actions


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_entries_and_their_shapes(batch):
    out, following, _, actions = lay_out(batch)
    both = set(following) - {"reward"}
    assert set(out.keys(True, True)) == {
        ("agent", "action"),
        *both,
        *(("next", *(key if isinstance(key, tuple) else (key,))) for key in following),
    }
    assert out.batch_size == out["next"].batch_size == (*batch, N_STEPS)
    assert out.names == out["next"].names == [None] * len(batch) + ["time"]
    assert torch.equal(out["agent", "action"].reshape(actions.shape), actions)
    for key, x in following.items():
        assert torch.equal(out["next"][key].reshape(x.shape), x), key


def test_root_and_next_are_one_step_apart_in_one_tensor():
    out, following, known, _ = lay_out(known=["latent"])
    for key in set(following) - {"reward"}:
        before, after = out[key], out["next"][key]
        assert torch.equal(before[:, 1:], after[:, :-1]), key
        assert before[:, 1:].data_ptr() == after.data_ptr(), key
    assert torch.equal(out["latent"][:, 0], known["latent"])


def test_what_is_not_known_before_the_first_step_is_zero():
    out, following, known, _ = lay_out(known=["latent"])
    for key in set(following) - {"reward", *known}:
        assert not out[key][:, 0].any(), key
        assert out[key].dtype == following[key].dtype


def test_what_is_known_is_cast_to_what_comes_after():
    following, actions = outcome(5), torch.randn(5, N_STEPS, 2)
    known = {"latent": torch.ones(5, 3, 2, dtype=torch.float64)}
    out = as_rollout(
        following, known, ("action", actions), torch.Size([5]), device=None, set_truncated=False
    )
    assert out["latent"].dtype == torch.float32 and (out["latent"][:, 0] == 1).all()


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_the_last_step_is_truncated_where_it_is_asked_for(batch):
    out, following, *_ = lay_out(batch, set_truncated=True)
    for key in ("truncated", "done"):
        after, given = (x.reshape(-1, N_STEPS) for x in (out["next", key], following[key]))
        assert after[:, -1].all() and torch.equal(after[:, :-1], given[:, :-1])
        assert torch.equal(out[key].reshape(-1, N_STEPS)[:, 1:], given[:, :-1])
    assert not following["truncated"].any()  # what was given stays


def test_gradient_flows_through_the_layout():
    following, actions = outcome(5), torch.randn(5, N_STEPS, 2, requires_grad=True)
    first, latent = (x.requires_grad_() for x in (torch.randn(5, 3, 2), following["latent"]))
    out = as_rollout(
        following,
        {"latent": first},
        ("action", actions),
        torch.Size([5]),
        device=None,
        set_truncated=True,
    )
    (out["latent"].sum() + out["next", "latent"].sum() + out["action"].sum()).backward()
    assert (first.grad == 1).all() and (actions.grad == 1).all()
    assert (latent.grad[:, :-1] == 2).all() and (latent.grad[:, -1] == 1).all()
