"""Rolling an ensemble out: the same as one step after the other, for the same random numbers."""

import pytest
import torch
from torch import nn

from layeredrl_trl.functional import without_reading
from layeredrl_trl.modules import DynamicsModel, open_loop
from layeredrl_trl.modules.open_loop import MemberRows, block_size
from tests.oracles import random_ensemble

VARIANTS = {
    "default": {},
    "one-member": {"n_models": 1},
    "two-modes": {"n_modes": 2},
    "one-dim": {"latent_dim": 1},
    "all-one": {"n_models": 1, "n_modes": 1, "latent_dim": 1},
    "context-unseen": {"context_dim": 2},
    "context-seen": {"context_dim": 2, "condition_on_context": True},
    "absolute": {"predict_delta": False, "n_modes": 2},
    "no-hidden-layer": {"hidden_sizes": ()},
    "learned-bounds": {"learn_std_bounds": True, "n_modes": 2},
    "custom-network": {"network": nn.Linear},
}
N, P, H = 7, 2, 4


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request):
    return random_ensemble(**request.param)


def members(kind, model):
    """One member for each env, or None for particles of every member."""
    if kind == "all":
        return None
    if kind == "one-only":  # the others get no env at all
        return torch.full((N, 1), model.n_models - 1)
    return torch.randint(model.n_models, (N, 1))


def start(model, member):
    rows = model.n_models if member is None else 1
    latent = torch.randn(N, rows, P, model.latent_state_dim)
    return latent, torch.randn(N, model.context_dim), torch.randn(N, H, model.action_dim)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", ["all", "mixed", "one-only"])
def test_equals_one_step_after_the_other(model, kind, deterministic):
    member = members(kind, model)
    given = start(model, member)
    torch.manual_seed(3)
    expected = DynamicsModel.propagate(model, *given, member, deterministic=deterministic)
    torch.manual_seed(3)
    found = model.propagate(*given, member, deterministic=deterministic)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_terminations_that_nobody_asks_for_change_nothing(model):
    given = start(model, None)
    for propagate in (type(model).propagate, DynamicsModel.propagate):
        torch.manual_seed(3)
        expected, _ = propagate(model, *given)
        torch.manual_seed(3)
        found, nothing = propagate(model, *given, terminations=False)
        assert nothing is None
        assert torch.equal(found, expected)


def test_gradients_equal_those_of_one_step_after_the_other(model):
    given = start(model, None)
    params = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for propagate in (type(model).propagate, DynamicsModel.propagate):
        latent = given[0].clone().requires_grad_()
        torch.manual_seed(3)
        after, term_logit = propagate(model, latent, *given[1:])
        total = after.square().mean() + term_logit.square().mean()
        gradients.append(torch.autograd.grad(total, [latent, *params], allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        else:  # the weights of a single mode move nothing
            assert all(x is None or not x.any() for x in (one, other))


def test_indices_of_discrete_actions():
    model = random_ensemble(action=3)
    model.accepts_indices = True
    latent, context, _ = start(model, None)
    actions = torch.randint(3, (N, H))
    one_hot = torch.nn.functional.one_hot(actions, 3).float()
    found = model.propagate(latent, context, actions, deterministic=True)
    expected = model.propagate(latent, context, one_hot, deterministic=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["all", "mixed", "one-only"])
def test_rows_come_back_in_their_order(kind):
    model = random_ensemble()
    member = members(kind, model)
    x = start(model, member)[0]
    rows = MemberRows(N, P, model.n_models, member)
    gathered = rows.gather(x)
    assert gathered.shape[::2] == (model.n_models, x.shape[-1])
    assert torch.equal(rows.scatter(gathered), x)


def test_envs_that_are_spread_evenly_are_not_padded():
    member = torch.arange(12)[:, None] % 3
    assert MemberRows(12, P, 3, member).gather(torch.zeros(12, 1, P, 5)).shape == (3, 4 * P, 5)


# --- blocks, where the host must not wait for what members there are


@pytest.fixture
def without_waiting(monkeypatch):
    """As on a GPU, for any number of envs."""
    monkeypatch.setattr(open_loop, "_LEAST_SAVED_ROWS", -(2**30))
    monkeypatch.setattr(open_loop, "_LEAST_ROWS", 1)
    with without_reading():
        yield


def outcomes(model, given, member):
    """What a rollout, a single step and the gradient of both give."""
    params = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    after, term_logit = model.propagate(*given, member)
    step = model.predict_particles(given[0], given[1], given[2][:, 0], member)
    total = after.square().mean() + term_logit.square().mean() + step.mean.square().mean()
    return [after, term_logit, *step, *torch.autograd.grad(total, params, allow_unused=True)]


@pytest.mark.parametrize("kind", ["mixed", "one-only"])
def test_blocks_change_no_number(model, kind, request):
    member = members(kind, model)
    given = start(model, member)
    expected = outcomes(model, given, member)
    request.getfixturevalue("without_waiting")
    rows = MemberRows(N, P, model.n_models, member)
    assert rows.group_member is not None
    for one, other in zip(outcomes(model, given, member), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("n_envs", "n_models"), [(1, 1), (1, 5), (5, 5), (24, 3), (41, 4), (3, 9)])
@pytest.mark.parametrize("kind", ["even", "random", "one-only"])
def test_blocks_hold_envs_of_one_member(n_envs, n_models, size, kind, without_waiting, monkeypatch):
    monkeypatch.setattr(open_loop, "block_size", lambda *_: size)
    member = {
        "even": torch.arange(n_envs) % n_models,
        "random": torch.randint(n_models, (n_envs,)),
        "one-only": torch.full((n_envs,), n_models - 1),
    }[kind][:, None]
    x = torch.arange(n_envs * P).reshape(n_envs, 1, P, 1) + 1.0
    rows = MemberRows(n_envs, P, n_models, member)
    gathered = rows.gather(x)
    assert gathered.shape == (len(rows.group_member), size * P, 1)
    assert torch.equal(rows.scatter(gathered), x)
    moved = gathered + 1000 * rows.group_member[:, None, None]
    assert torch.equal(rows.scatter(moved), x + 1000 * member[:, None, None])
    assert gathered.shape[0] <= -(-n_envs // size) + min(n_envs, n_models)


def test_blocks_that_nobody_needs_are_of_a_member_that_there_is(without_waiting, monkeypatch):
    monkeypatch.setattr(open_loop, "block_size", lambda *_: 8)
    rows = MemberRows(64, 1, 3, torch.full((64, 1), 2))
    assert len(rows.group_member) > 8 and rows.group_member.max() == 2


@pytest.mark.parametrize("n_models", [5, 20, 100])
def test_on_a_gpu_a_larger_ensemble_cost_more(n_models):
    """On "meta" no number can be read, as none may be on a GPU."""
    n_envs = 2**16
    member = torch.zeros(n_envs, 1, dtype=torch.long, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        MemberRows(n_envs, 1, n_models, member)
    with without_reading():
        rows = MemberRows(n_envs, 1, n_models, member)
    x = torch.zeros(n_envs, 1, 1, 3, device="meta")
    gathered = rows.gather(x)
    assert rows.scatter(gathered).shape == x.shape
    assert gathered.shape[:2].numel() <= 1.26 * n_envs


def test_where_blocks_save_little_all_members_get_all_envs():
    assert block_size(128, 1, 5) is None and block_size(1, 1, 1) is None
    assert block_size(2**16, 1, 1) is None
    for n_envs, n_particles, n_models in [(2**14, 1, 5), (1024, 4, 20), (1024, 1, 100)]:
        size = block_size(n_envs, n_particles, n_models)
        assert size * n_particles >= 64


def test_a_subclass_that_runs_its_networks_itself_is_not_asked_for_blocks(without_waiting):
    class Halved(type(random_ensemble())):
        def _run(self, inputs):
            assert inputs.shape[0] == self.n_models
            return 0.5 * super()._run(inputs)

    model = random_ensemble()
    model.__class__ = Halved
    member = members("mixed", model)
    given = start(model, member)
    assert model.propagate(*given, member)[0].shape == (N, H, 1, P, model.latent_state_dim)


def test_latent_of_a_wrong_size():
    model = random_ensemble()
    latent, context, actions = start(model, None)
    with pytest.raises(ValueError, match="latent: expected"):
        model.propagate(latent[..., :-1], context, actions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["all", "mixed"])
def test_on_a_gpu(kind):
    model = random_ensemble()
    member = members(kind, model)
    given = start(model, member)
    expected = model.propagate(*given, member, deterministic=True)
    model.cuda()
    found = model.propagate(
        *(x.cuda() for x in given), None if member is None else member.cuda(), deterministic=True
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_on_a_gpu_wait_for_nothing(monkeypatch):
    model = random_ensemble(n_modes=2)
    member = torch.randint(model.n_models, (N, 1))
    given = start(model, member)
    expected = model.propagate(*given, member, deterministic=True)
    monkeypatch.setattr(open_loop, "_LEAST_SAVED_ROWS", -(2**30))
    model.cuda()
    given, member = [x.cuda() for x in given], member.cuda()
    model.propagate(*given, member)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = model.propagate(*given, member, deterministic=True)
        assert MemberRows(N, P, model.n_models, member).group_member is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


def test_a_subclass_that_predicts_otherwise_is_asked():
    """Known physics on top of the ensemble were left out of rollouts."""

    class Residual(type(random_ensemble())):
        def predict_particles(self, latent, context, action, member=None):
            out = super().predict_particles(latent, context, action, member)
            return out._replace(mean=out.mean + 5.0)

    model = random_ensemble()
    model.__class__ = Residual
    given = start(model, None)
    found = model.propagate(*given, deterministic=True)
    expected = DynamicsModel.propagate(model, *given, deterministic=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["all", "mixed"])
def test_propagator_is_propagate(model, kind):
    member = members(kind, model)
    propagate = model.propagator()
    for _ in range(2):
        given = start(model, member)
        torch.manual_seed(3)
        expected = model.propagate(*given, member)
        torch.manual_seed(3)
        for one, other in zip(propagate(*given, member), expected, strict=True):
            assert torch.equal(one, other)


def test_propagator_asks_a_subclass_that_propagates_otherwise():
    class Frozen(type(random_ensemble())):
        def propagate(self, latent, *args, **kwargs):
            after, term_logit = super().propagate(latent, *args, **kwargs)
            return latent.unsqueeze(1).expand_as(after), term_logit

    model = random_ensemble()
    model.__class__ = Frozen
    latent, *rest = start(model, None)
    after, _ = model.propagator()(latent, *rest)
    assert torch.equal(after, latent.unsqueeze(1).expand_as(after))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_networks_are_called(register):
    model = random_ensemble(n_modes=2)
    member = members("mixed", model)
    given, seen = start(model, member), []
    handle = getattr(model.net, register)(lambda *_: seen.append(1))
    model.propagate(*given, member)
    model.propagator()(*given, member)
    assert len(seen) == 2 * H
    handle.remove()
    model.propagate(*given, member)
    assert len(seen) == 2 * H


def test_a_hook_of_the_networks_decides_what_comes_out():
    model = random_ensemble()
    given = start(model, None)
    model.net.register_forward_hook(lambda _, x, out: 0.5 * out)
    expected = DynamicsModel.propagate(model, *given, deterministic=True)
    found = model.propagate(*given, deterministic=True)
    torch.testing.assert_close(found, expected)
