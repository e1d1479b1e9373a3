"""Imagination: one imagined step on models with known answers, and against loops over particles."""

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

from layeredrl_trl.envs import Imagination, ImaginedState
from layeredrl_trl.modules import (
    DynamicsModel,
    ParticlePrediction,
    as_reward_module,
    as_termination_module,
)
from tests.oracles import mixture, random_ensemble, random_reward

READS = ["action", ("next", "latent")]


class Shift(DynamicsModel):
    """Member e moves every latent dim by 10**e and terminates with `term_probs[e]`."""

    latent_state_dim, context_dim, action_dim = 2, 0, 1
    n_modes = n_particles_per_model = 1

    def __init__(self, n_models=3, term_probs=None):
        super().__init__()
        self.n_models = n_models
        self.register_buffer("shift", 10.0 ** torch.arange(n_models))
        self.register_buffer("prob", torch.tensor(term_probs or [0.5] * n_models))

    def predict_particles(self, latent, context, action, member=None):
        row = torch.arange(self.n_models) if member is None else member
        mean = (latent + self.shift[row][..., None, None]).unsqueeze(-2)
        logit = self.prob[row][..., None, None].logit().expand_as(latent[..., :1])
        return ParticlePrediction(
            mean, torch.full_like(mean, 1e-6), torch.zeros_like(mean[..., 0]), logit
        )


class Position(nn.Module):
    """Rewards the sum of the latent state plus the action."""

    def forward(self, latent, context, action):
        return latent.sum(-1, keepdim=True) + action.sum(-1, keepdim=True)


def imagination(model, reward=None, **options):
    defaults = {"termination": "soft", "propagation": "fixed_model", "uncertainty": False}
    return Imagination(model, as_reward_module(reward), **{**defaults, **options})


def step(model, n=4, p=2, reward=None, deterministic=True, member=None, state=None, **options):
    rows = 1 if member is not None else model.n_models
    latent = torch.zeros(n, rows, p, model.latent_state_dim) if state is None else state
    alive = torch.ones(n, rows, p, 1)
    state = ImaginedState(latent, torch.zeros(n, model.context_dim), alive, member)
    action = torch.ones(n, model.action_dim)
    return imagination(model, reward, **options).step(state, action, deterministic=deterministic)


def members_that_moved(out):
    """The member that moved each particle of `Shift`, from latent state 0."""
    return out.latent[..., 0].log10().round().long()


@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("termination", ["soft", "sample"])
@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("with_member", [False, True])
def test_shapes(propagation, termination, uncertainty, with_member):
    model = random_ensemble(n_modes=2)
    member = torch.randint(3, (4, 1)) if with_member else None
    rows = 1 if with_member else 3
    out = step(
        model,
        reward=random_reward(model),
        member=member,
        deterministic=False,
        propagation=propagation,
        termination=termination,
        uncertainty=uncertainty,
    )
    assert out.latent.shape == (4, rows, 2, 3)
    assert out.alive.shape == out.particle_reward.shape == out.term_prob.shape == (4, rows, 2, 1)
    assert out.reward.shape == out.terminated.shape == (4, 1)
    assert out.terminated.dtype == torch.bool
    for variance in (out.epistemic_var, out.aleatoric_var):
        assert variance.shape == (4, 3) if uncertainty else variance is None


# --- reward, alive, termination


def test_reward_is_that_of_the_current_state_weighted_by_alive():
    model, n = Shift(), 5
    latent, alive = torch.randn(n, 3, 2, 2), torch.rand(n, 3, 2, 1)
    action = torch.randn(n, 1)
    state = ImaginedState(latent, torch.zeros(n, 0), alive)
    out = imagination(model, Position()).step(state, action, deterministic=True)
    for b in range(n):
        total = 0.0
        for e in range(3):
            for p in range(2):
                r = latent[b, e, p].sum() + action[b, 0]
                assert out.particle_reward[b, e, p].item() == pytest.approx(r.item(), abs=1e-6)
                total += (alive[b, e, p] * r).item()
        assert out.reward[b].item() == pytest.approx(total / 6, abs=1e-5)


def test_without_reward_it_is_0():
    out = step(Shift())
    assert (out.reward == 0).all() and (out.particle_reward == 0).all()


def test_soft_termination_multiplies_alive_and_never_ends():
    model, probs = Shift(term_probs=[0.1, 0.5, 1.0]), torch.tensor([0.1, 0.5, 1.0])
    alive = torch.rand(4, 3, 2, 1)
    state = ImaginedState(torch.zeros(4, 3, 2, 2), torch.zeros(4, 0), alive)
    out = imagination(model).step(state, torch.ones(4, 1), deterministic=True)
    torch.testing.assert_close(out.term_prob, probs[:, None, None].expand(4, 3, 2, 1))
    torch.testing.assert_close(out.alive, alive * (1 - probs[:, None, None]))
    assert not out.terminated.any()
    assert not step(Shift(term_probs=[1.0] * 3)).terminated.any()


def test_sampled_termination_draws_every_particle():
    probs = torch.tensor([0.0, 0.3, 1.0])
    out = step(Shift(term_probs=probs.tolist()), n=3000, termination="sample")
    assert ((out.alive == 0) | (out.alive == 1)).all()
    torch.testing.assert_close(out.alive.mean((0, 2, 3)), 1 - probs, rtol=0, atol=0.03)
    # particles of a member are drawn apart
    both = (out.alive[:, 1, :, 0] == 1).all(-1).float().mean().item()
    assert both == pytest.approx(0.49, abs=0.04)


def test_sampled_termination_ends_when_all_particles_are_dead():
    model = Shift(term_probs=[0.5] * 3)
    out = step(model, n=2000, p=1, termination="sample")
    dead = (out.alive == 0).flatten(1).all(1, keepdim=True)
    assert torch.equal(out.terminated, dead)
    assert dead.float().mean().item() == pytest.approx(1 / 8, abs=0.03)
    assert step(Shift(term_probs=[1.0] * 3), termination="sample").terminated.all()
    assert not step(Shift(term_probs=[1.0, 1.0, 0.0]), termination="sample").terminated.any()


def test_the_dead_stay_dead():
    model, alive = Shift(term_probs=[0.0] * 3), torch.zeros(4, 3, 2, 1)
    state = ImaginedState(torch.ones(4, 3, 2, 2), torch.zeros(4, 0), alive)
    imagined = imagination(model, Position(), termination="sample")
    out = imagined.step(state, torch.ones(4, 1), deterministic=True)
    assert (out.alive == 0).all() and out.terminated.all() and (out.reward == 0).all()


# --- propagation


def test_fixed_model_moves_each_row_by_its_member():
    out = step(Shift(), n=20, propagation="fixed_model")
    assert torch.equal(members_that_moved(out), torch.arange(3)[None, :, None].expand(20, 3, 2))


def test_random_model_moves_as_many_particles_by_each_member_in_every_order():
    probs = [0.1, 0.5, 0.9]
    out = step(Shift(term_probs=probs), n=3000, propagation="random_model")
    moved = members_that_moved(out)
    for e in range(3):
        assert ((moved == e).flatten(1).sum(1) == 2).all()  # P of E * P particles
        assert ((moved == e).float().mean(0) - 1 / 3).abs().max() < 0.05  # for each particle
    # the chance of termination is the same member's
    torch.testing.assert_close(out.term_prob[..., 0], torch.tensor(probs)[moved])
    again = members_that_moved(step(Shift(), n=3000, propagation="random_model"))
    assert (again == moved).float().mean().item() == pytest.approx(1 / 3, abs=0.03)


def test_random_model_moves_each_particle_from_its_own_state():
    state = torch.arange(4 * 3 * 2.0).reshape(4, 3, 2, 1).expand(4, 3, 2, 2) * 1000
    change = step(Shift(), state=state, propagation="random_model").latent - state
    assert set(change.round().unique().tolist()) == {1.0, 10.0, 100.0}


def test_expectation_moves_all_particles_to_the_mean_over_members():
    out = step(Shift(term_probs=[0.1, 0.2, 0.6]), propagation="expectation", deterministic=False)
    torch.testing.assert_close(out.latent, torch.full((4, 3, 2, 2), 37.0))
    torch.testing.assert_close(out.term_prob, torch.full((4, 3, 2, 1), 0.3))


@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
def test_with_a_member_all_particles_are_its_own(propagation):
    member = torch.tensor([[0], [2], [1], [2]])
    out = step(Shift(term_probs=[0.1, 0.2, 0.6]), member=member, propagation=propagation)
    if propagation == "expectation":
        torch.testing.assert_close(out.latent, torch.full((4, 1, 2, 2), 37.0))
        return
    assert torch.equal(members_that_moved(out), member[..., None].expand(4, 1, 2))
    expected = torch.tensor([0.1, 0.2, 0.6])[member][..., None, None].expand(4, 1, 2, 1)
    torch.testing.assert_close(out.term_prob, expected)


@pytest.mark.parametrize("uncertainty", [False, True])
def test_asking_for_uncertainty_does_not_change_the_step(uncertainty):
    model, member = random_ensemble(n_modes=2), torch.tensor([[0], [2], [1], [2]])
    plain, other = (
        step(model, member=member, state=torch.ones(4, 1, 2, 3), uncertainty=u)
        for u in (False, uncertainty)
    )
    torch.testing.assert_close(plain.latent, other.latent)
    torch.testing.assert_close(plain.term_prob, other.term_prob)


def test_a_drawn_step_has_the_moments_of_its_members_mixture():
    model, n = random_ensemble(n_modes=2), 8000
    state = torch.ones(n, 3, 1, 3)
    out = step(model, n=n, p=1, state=state, deterministic=False)
    mean, weights, std, _ = model.predict(*[torch.ones(1, k)[:, :k] for k in (3, 0, 2)])
    for e in range(3):
        reference = mixture(mean[0, e], std[0, e], weights[0, e])
        drawn = out.latent[:, e, 0].double()
        error = (reference.variance / n).sqrt()
        assert ((drawn.mean(0) - reference.mean).abs() < 4.5 * error).all()
        torch.testing.assert_close(drawn.var(0), reference.variance, rtol=0.1, atol=0)


def test_a_deterministic_step_is_the_mean_of_the_mixture():
    model = random_ensemble(n_modes=2)
    out = step(model, n=1, p=2, state=torch.ones(1, 3, 2, 3))
    mean, weights, std, _ = model.predict(*[torch.ones(1, k) for k in (3, 0, 2)])
    expected = mixture(mean[0], std[0], weights[0]).mean
    torch.testing.assert_close(out.latent[0, :, 1].double(), expected, rtol=1e-4, atol=1e-5)


# --- uncertainty


@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("with_member", [False, True])
def test_first_step_uncertainty_like_a_loop_over_members(propagation, with_member):
    model, state = random_ensemble(n_modes=2), torch.randn(4, 3)
    member = torch.randint(3, (4, 1)) if with_member else None
    rows = 1 if with_member else 3
    out = step(
        model,
        member=member,
        state=state[:, None, None].expand(4, rows, 2, 3),
        propagation=propagation,
        uncertainty=True,
        deterministic=False,
    )
    mean, weights, std, _ = model.predict(state, torch.zeros(4, 0), torch.ones(4, 2))
    for b in range(4):
        each = [mixture(mean[b, e], std[b, e], weights[b, e]) for e in range(3)]
        centre = sum(m.mean for m in each) / 3
        epistemic = sum((m.mean - centre) ** 2 for m in each) / 3
        aleatoric = sum(m.variance for m in each) / 3
        torch.testing.assert_close(out.epistemic_var[b].double(), epistemic, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.aleatoric_var[b].double(), aleatoric, rtol=1e-4, atol=1e-5)


def test_one_member_has_no_epistemic_variance():
    out = step(random_ensemble(n_models=1, n_modes=2), p=1, uncertainty=True)
    assert (out.epistemic_var == 0).all() and (out.aleatoric_var > 0).all()


# --- gradients, errors


def test_gradient_flows_from_reward_and_state_to_model_and_action():
    model = random_ensemble()
    reward = random_reward(model)
    action = torch.randn(4, 2, requires_grad=True)
    latent = torch.randn(4, 3, 2, 3, requires_grad=True)
    state = ImaginedState(latent, torch.zeros(4, 0), torch.ones(4, 3, 2, 1))
    out = imagination(model, reward).step(state, action, deterministic=False)
    (out.latent.sum() + out.reward.sum() + out.alive.sum()).backward()
    for x in (action, latent, *model.parameters(), *reward.parameters()):
        assert (x.grad != 0).any() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", ["termination", "propagation"])
def test_unknown_option(name):
    with pytest.raises(ValueError, match=rf"{name} must be one of \(.*\), got 'hard'"):
        imagination(Shift(), **{name: "hard"})


def test_a_reward_of_another_shape_is_not_broadcast():
    class Squeezed(nn.Module):
        def forward(self, latent, context, action):
            return latent.sum(-1)

    with pytest.raises(ValueError, match=r"must return \[\.\.\., 1\], here \[4, 3, 1, 1\]"):
        step(Shift(), p=1, reward=Squeezed())


# --- a termination function of the user's own


def beyond_5(latent, context, action, next_latent):
    return next_latent.sum(-1, keepdim=True) > 5


@pytest.mark.parametrize("termination", ["soft", "sample"])
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("with_member", [False, True])
def test_termination_fn_replaces_the_learned_termination(with_member, propagation, termination):
    member = torch.randint(3, (4, 1)) if with_member else None
    out = step(
        Shift(term_probs=[1.0, 1.0, 1.0]),
        member=member,
        propagation=propagation,
        termination=termination,
        termination_fn=as_termination_module(beyond_5),
    )
    over = out.latent.sum(-1, keepdim=True) > 5
    assert torch.equal(out.alive, 1 - over.float()) and torch.equal(out.term_prob, over.float())
    assert torch.equal(out.terminated, over.all(1).all(1) & (termination == "sample"))


def test_termination_fn_may_read_the_action_and_give_probabilities():
    module = TensorDictModule(lambda a, x: torch.sigmoid(a * x[..., :1]), READS, ["term_prob"])
    out = step(Shift(), termination_fn=module)
    torch.testing.assert_close(out.term_prob, torch.sigmoid(out.latent[..., :1]))


# --- rollouts


@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("termination", ["soft", "sample"])
@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("with_member", [False, True])
@pytest.mark.parametrize("own_termination", [False, True])
def test_rollout_is_one_step_after_the_other(
    own_termination, with_member, uncertainty, termination, propagation
):
    model, n, horizon = random_ensemble(n_modes=2), 5, 4
    member = torch.randint(3, (n, 1)) if with_member else None
    imagined = imagination(
        model,
        random_reward(model),
        propagation=propagation,
        termination=termination,
        uncertainty=uncertainty,
        termination_fn=as_termination_module(beyond_5) if own_termination else None,
    )
    rows = 1 if with_member else 3
    latent, alive = torch.randn(n, rows, 2, 3), torch.rand(n, rows, 2, 1)
    state, actions = (
        ImaginedState(latent, torch.zeros(n, 0), alive, member),
        torch.randn(n, horizon, 2),
    )
    torch.manual_seed(1)
    found = imagined.rollout(state, actions, deterministic=False)
    torch.manual_seed(1)
    for t in range(horizon):
        expected = imagined.step(state, actions[:, t], deterministic=False)
        after = {"latent": expected.latent, "alive": expected.alive, "member": expected.member}
        state = state._replace(**after)
        for name, one in expected._asdict().items():
            other = getattr(found, name)
            assert (one is None) == (other is None), name
            if one is not None:
                torch.testing.assert_close(other[:, t], one, rtol=1e-4, atol=1e-5, msg=name)


def test_a_rollout_that_was_asked_for_before_is_taken():
    """A planner asks once, for all of its rounds."""
    model = random_ensemble(n_modes=2)
    imagined, asked = imagination(model, random_reward(model)), []
    state = ImaginedState(torch.randn(5, 3, 2, 3), torch.zeros(5, 0), torch.rand(5, 3, 2, 1))
    actions, fast = torch.randn(5, 4, 2), imagined.fast_rollout()

    def rollout(*args, **options):
        asked.append(options)
        return fast(*args, **options)

    outcomes = []
    for given in (None, rollout):
        torch.manual_seed(1)
        outcomes.append(imagined.rollout(state, actions, deterministic=False, rollout=given))
    assert asked == [{"deterministic": False, "terminations": True}]
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options",
    [{"propagation": "random_model"}, {"propagation": "expectation"}, {"termination": "sample"}],
)
def test_no_fast_rollout_where_something_else_moves_or_ends_a_particle(options):
    model = random_ensemble()
    assert imagination(model).fast_rollout() is not None
    assert imagination(model, **options).fast_rollout() is None
    assert imagination(Shift()).fast_rollout() is None


@pytest.mark.parametrize("with_member", [True, False])
@pytest.mark.parametrize("batch", [(4,), (2, 4)])
def test_the_first_of_a_state(batch, with_member):
    n = torch.Size(batch).numel()
    state = ImaginedState(
        torch.randn(n, 1, 2, 3),
        torch.randn(n, 1),
        torch.rand(n, 1, 2, 1),
        torch.randint(3, (n, 1)) if with_member else None,
    )
    first = state.first(3, torch.Size(batch))
    for x, kept in zip(state, first, strict=True):
        if x is None:
            assert kept is None
        else:
            expected = x.reshape(*batch, *x.shape[1:])[..., :3, *[slice(None)] * (x.ndim - 1)]
            assert torch.equal(kept, expected.reshape(-1, *x.shape[1:]))
