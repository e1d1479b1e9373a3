"""ProbabilisticEnsemble: a loop over members in float64, torch.distributions, state, compiling."""

import copy
import math

import gymnasium
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot

from layeredrl_trl.functional import bootstrap_weights
from layeredrl_trl.modules import ProbabilisticEnsemble
from tests.changed_ensembles import Turned, Unchanged, as_kind
from tests.oracles import (
    even_mixture,
    member_alone,
    member_prediction,
    mixture,
    moments_of,
    random_ensemble,
)

VARIANTS = {
    "default": {},
    "one-member": {"n_models": 1},
    "one-mode": {"n_modes": 1},
    "one-dim": {"latent_dim": 1},
    "all-one": {"n_models": 1, "n_modes": 1, "latent_dim": 1},
    "context-unseen": {"context_dim": 2},
    "context-seen": {"context_dim": 2, "condition_on_context": True},
    "absolute": {"predict_delta": False},
    "deep": {"hidden_sizes": (8, 6, 4)},
    "linear": {"hidden_sizes": ()},
    "learned-bounds": {"learn_std_bounds": True},
}
NETWORKS = {
    "linear": nn.Linear,
    "layer-norm": lambda n_in, n_out: nn.Sequential(nn.LayerNorm(n_in), nn.Linear(n_in, n_out)),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request):
    return random_ensemble(**{"n_modes": 2, **request.param})


def inputs(model, *batch):
    dims = model.latent_state_dim, model.context_dim, model.action_dim
    return [torch.randn(*batch, n) for n in dims]


def outcome(model, *batch):
    return torch.randn(*batch, model.latent_state_dim), torch.rand(*batch, 1) < 0.5


# --- contract


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shapes(model, batch):
    e, m, d = model.n_models, model.n_modes, model.latent_state_dim
    args = inputs(model, *batch)
    mean, weights, std, term_prob = model.predict(*args)
    assert mean.shape == std.shape == (*batch, e, m, d)
    assert weights.shape == (*batch, e, m) and term_prob.shape == batch
    torch.testing.assert_close(weights.sum(-1), torch.ones(*batch, e))
    assert (std > 0).all() and ((term_prob > 0) & (term_prob < 1)).all()
    log_prob, same = model.log_prob(*args, outcome(model, *batch)[0])
    assert log_prob.shape == batch and torch.equal(same, term_prob)
    nll, bce = model.negative_log_likelihood(*args, *outcome(model, *batch))
    assert nll.shape == bce.shape == (*batch, 1)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_particles(model, batch):
    e, m, d = model.n_models, model.n_modes, model.latent_state_dim
    particles = torch.randn(*batch, e, 4, d)
    _, *rest = inputs(model, *batch)
    out = model.predict_particles(particles, *rest)
    assert out.mean.shape == out.std.shape == (*batch, e, 4, m, d)
    assert out.log_weights.shape == (*batch, e, 4, m)
    assert out.term_logit.shape == (*batch, e, 4, 1)
    torch.testing.assert_close(out.log_weights.logsumexp(-1), torch.zeros(*batch, e, 4))


@pytest.mark.parametrize(
    ("action_space", "action_dim"),
    [
        (Bounded(-1, 1, (2,)), 2),
        (gymnasium.spaces.Box(-1, 1, (2,)), 2),
        (Categorical(4), 4),
        (OneHot(4), 4),
        (gymnasium.spaces.Discrete(4), 4),
    ],
    ids=str,
)
def test_spaces(action_space, action_dim):
    model = ProbabilisticEnsemble(
        gymnasium.spaces.Box(-1, 1, (3,)), None, action_space, hidden_sizes=(4,)
    )
    assert (model.latent_state_dim, model.context_dim, model.action_dim) == (3, 0, action_dim)


# --- oracle


def test_prediction_like_a_loop_over_members(model):
    args = inputs(model, 5)
    mean, weights, std, term_prob = model.predict(*args)
    for b in range(5):
        probs = []
        for e in range(model.n_models):
            expected = member_prediction(model, e, *(x[b] for x in args))
            probs.append(expected[3])
            found = mean[b, e], std[b, e], weights[b, e]
            for x, y in zip(found, expected[:3], strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
        assert term_prob[b].item() == pytest.approx(sum(probs) / len(probs), rel=1e-5)


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_discrete_actions_as_index_and_one_hot_agree(batch):
    model = random_ensemble(3, 0, OneHot(5))
    latent, context, _ = inputs(model, *batch)
    index = torch.randint(5, batch)
    expected = model.predict(latent, context, torch.eye(5)[index])
    for action in (index, index.unsqueeze(-1), torch.eye(5)[index].long()):
        for x, y in zip(model.predict(latent, context, action), expected, strict=True):
            assert torch.equal(x, y)
    if batch == (4,):
        own = member_prediction(model, 1, latent[2], context[2], index[2])
        torch.testing.assert_close(expected[0][2, 1].double(), own[0], rtol=1e-4, atol=1e-5)


def test_log_prob_is_that_of_the_even_mixture_of_members(model):
    args, (following, _) = inputs(model, 20), outcome(model, 20)
    mean, weights, std, _ = model.predict(*args)
    expected = even_mixture(mean, std, weights).log_prob(following.double())
    found, _ = model.log_prob(*args, following)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 3), (20, 3, 2, 3)], ids=str)
def test_a_given_std_replaces_the_learned_one(shape):
    model = random_ensemble(n_modes=2)
    args, (following, _) = inputs(model, 20), outcome(model, 20)
    given_std = 0.5 + torch.rand(shape)
    mean, weights, std, _ = model.predict(*args, std=given_std)
    assert torch.equal(std, given_std.expand(20, 3, 2, 3))
    assert torch.equal(mean, model.predict(*args)[0])
    expected = even_mixture(mean, std, weights).log_prob(following.double())
    found, _ = model.log_prob(*args, following, std=given_std)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_likelihood_like_a_loop_over_members(model):
    args, (following, terminated) = inputs(model, 6), outcome(model, 6)
    nll, bce = model.negative_log_likelihood(*args, following, terminated)
    for b in range(6):
        log_probs, entropies = [], []
        for e in range(model.n_models):
            mean, std, weights, prob = member_prediction(model, e, *(x[b] for x in args))
            log_probs.append(mixture(mean, std, weights).log_prob(following[b].double()).item())
            entropies.append(-math.log(prob if terminated[b] else 1 - prob))
        assert nll[b].item() == pytest.approx(-sum(log_probs) / model.n_models, rel=1e-4, abs=1e-4)
        assert bce[b].item() == pytest.approx(sum(entropies) / model.n_models, rel=1e-4)


@pytest.mark.parametrize("batch", [(), (7,), (2, 7)])
def test_particles_of_a_member_are_its_row(model, batch):
    particles = torch.randn(*batch, 1, 4, model.latent_state_dim)
    _, *rest = inputs(model, *batch)
    member = torch.randint(model.n_models, (*batch, 1))
    everyone = model.predict_particles(particles.expand(*batch, model.n_models, 4, -1), *rest)
    for own, rows in zip(model.predict_particles(particles, *rest, member), everyone, strict=True):
        own, rows = (x.reshape(-1, *x.shape[len(batch) :]) for x in (own, rows))
        for b, e in enumerate(member.flatten().tolist()):
            torch.testing.assert_close(own[b, 0], rows[b, e])


@pytest.mark.parametrize(
    "member", [[0, 0, 0, 0], [2, 2, 2, 0], [1], [2, 0, 1, 1, 1, 2, 1]], ids=str
)
def test_however_unevenly_envs_are_spread_over_members(member):
    model, member = random_ensemble(n_modes=2), torch.tensor(member).unsqueeze(-1)
    n = len(member)
    latent = torch.randn(n, 1, 4, 3, requires_grad=True)
    _, context, action = inputs(model, n)
    out = model.predict_particles(latent, context, action, member)
    rows = model.predict_particles(latent.expand(n, 3, 4, 3), context, action)
    for own, others in zip(out, rows, strict=True):
        torch.testing.assert_close(own[:, 0], others[torch.arange(n), member.squeeze(-1)])
    picked = rows.mean[torch.arange(n), member.squeeze(-1)]
    entries, gradients = [latent, *model.parameters()], []
    for mean in (out.mean, picked):
        loss = mean.square().sum()
        gradients.append(torch.autograd.grad(loss, entries, materialize_grads=True))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_each_row_of_particles_is_its_members():
    model = random_ensemble(n_modes=2)
    particles = torch.randn(2, 3, 4, 3)
    _, context, action = inputs(model, 2)
    out = model.predict_particles(particles, context, action)
    for b in range(2):
        for e in range(3):
            for p in range(4):
                mean, std, weights, prob = member_prediction(
                    model, e, particles[b, e, p], context[b], action[b]
                )
                found = out.mean[b, e, p], out.std[b, e, p], out.log_weights[b, e, p].exp()
                for x, y in zip(found, (mean, std, weights), strict=True):
                    torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
                assert out.term_logit[b, e, p].sigmoid().item() == pytest.approx(prob, rel=1e-4)


@pytest.mark.parametrize("variant", ["default", "absolute", "context-seen", "context-unseen"])
def test_statistics_are_those_of_inputs_and_targets(variant):
    options = VARIANTS[variant]
    dims = 3, options.get("context_dim", 0), 2
    model = ProbabilisticEnsemble(
        *dims, hidden_sizes=(4,), **{k: v for k, v in options.items() if k != "context_dim"}
    )
    latent, context, action = args = inputs(model, 4, 6)
    following = 10 + torch.randn(4, 6, 3)
    model.update_statistics(*args, following)
    seen = [latent, context, action] if model.condition_on_context else [latent, action]
    target = following - latent if model.predict_delta else following
    for moments, samples in (
        (model.input_moments, torch.cat(seen, -1)),
        (model.target_moments, target),
    ):
        mean, var = moments_of(samples.flatten(0, 1))
        torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.var.double(), var, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.target_scale, model.target_moments.var.sqrt())


def test_statistics_mask_and_discrete_actions():
    model = ProbabilisticEnsemble(2, 0, 3, hidden_sizes=(4,))
    latent, following, mask = torch.randn(6, 2), torch.randn(6, 2), torch.arange(6) < 4
    action, context = torch.tensor([0, 1, 1, 1, 2, 2]), torch.zeros(6, 0)
    latent[4:] = float("nan")
    model.update_statistics(latent, context, action, following, mask)
    torch.testing.assert_close(model.input_moments.mean[2:], torch.tensor([0.25, 0.75, 0.0]))
    assert torch.isfinite(model.target_moments.mean).all()


@pytest.mark.parametrize("bounds", [(math.exp(-5.0), 2.0), (0.1, 1.0), (0.5, 0.6)])
def test_std_stays_within_the_soft_bounds_and_can_reach_them(bounds):
    model = ProbabilisticEnsemble(1, 0, 1, hidden_sizes=(), std_bounds=bounds)
    model.target_moments.var.fill_(9.0)
    stds = []
    for log_std in (-1e4, -20.0, -1.0, 0.0, 1.0, 20.0, 1e4):
        with torch.no_grad():
            model.net.biases[0][..., 1] = log_std
            model.net.weights[0].zero_()
        stds.append(model.predict(*[torch.zeros(n) for n in (1, 0, 1)])[2].item() / 3)
    low, high = bounds
    assert stds == sorted(stds)
    assert stds[0] == pytest.approx(low, rel=1e-3)
    assert stds[-1] == pytest.approx(low + high, rel=1e-3)


def test_learned_bounds_start_as_given_and_are_each_dims_own():
    given_bounds = ProbabilisticEnsemble(3, 0, 2, hidden_sizes=(), std_bounds=(0.1, 1.0))
    learned = ProbabilisticEnsemble(
        3, 0, 2, hidden_sizes=(), std_bounds=(0.1, 1.0), learn_std_bounds=True
    )
    learned.load_state_dict(given_bounds.state_dict(), strict=False)
    args = inputs(learned, 5)
    for x, y in zip(learned.predict(*args), given_bounds.predict(*args), strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        learned.log_std_bounds[1, 2] += 1
    wider = learned.predict(*args)[2] > given_bounds.predict(*args)[2] + 1e-6
    assert wider[..., 2].all() and not wider[..., :2].any()


def test_regularization_draws_learned_bounds_together():
    model = ProbabilisticEnsemble(3, 0, 2, std_bounds=(0.1, 1.0), learn_std_bounds=True)
    penalty = model.regularization()
    penalty.backward()
    assert penalty.item() == pytest.approx(0.01 * 3 * math.log(10))
    torch.testing.assert_close(
        model.log_std_bounds.grad, torch.tensor([[-0.01], [0.01]]).expand(2, 3)
    )
    assert ProbabilisticEnsemble(3, 0, 2).regularization() == 0


@pytest.mark.parametrize("n_modes", [1, 2])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_any_network_can_be_a_member(network, n_modes):
    nets = []

    def make(n_in, n_out):
        nets.append(network(n_in, n_out))
        return copy.deepcopy(nets[-1])

    model = random_ensemble(2, 1, 2, network=make, n_modes=n_modes, condition_on_context=True)
    with torch.no_grad():
        for net in nets:
            for parameter in net.parameters():
                parameter.mul_(2.0)
    plain = random_ensemble(2, 1, 2, n_modes=n_modes, condition_on_context=True)
    plain.load_state_dict(
        {k: x for k, x in model.state_dict().items() if k[:4] != "net."}, strict=False
    )
    plain.net, plain.termination_net = SideBySide(nets), None  # the oracle: a loop
    args, results = inputs(model, 6), outcome(model, 6)
    for x, y in zip(model.predict(*args), plain.predict(*args), strict=True):
        torch.testing.assert_close(x, y)
    for m in (model, plain):
        sum(x.sum() for x in m.negative_log_likelihood(*args, *results)).backward()
    for name, parameter in model.net.network.named_parameters():
        expected = torch.stack([net.get_parameter(name).grad for net in nets])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)
    member = torch.tensor([[2], [0], [0], [1], [2], [2]])
    latent = args[0][:, None, None]
    own = model.predict_particles(latent, *args[1:], member).mean[:, 0, 0]
    torch.testing.assert_close(own, model.predict(*args)[0][torch.arange(6), member[:, 0]])


class SideBySide(nn.Module):
    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x, member=None):
        return torch.stack([net(row) for net, row in zip(self.nets, x, strict=True)])


def test_modes_start_where_the_first_batch_has_its_clusters():
    model = ProbabilisticEnsemble(2, 0, 1, n_models=2, n_modes=4)
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 5.0], [1.0, -5.0]])
    latent, context, action = inputs(model, 200)
    following = latent + centres.repeat(50, 1) + 0.1 * torch.randn(200, 2)
    mask = torch.arange(200) < 160
    following[160:] = float("nan")
    model.update_statistics(latent, context, action, following, mask)
    start = model.target_moments.mean + model.target_scale * model.mode_start[0]
    distance = torch.cdist(centres, start).min(-1)
    assert distance.values.max() < 0.5 and distance.indices.unique().numel() == 4
    assert (model.mode_start[1].exp() < 0.5).all()
    before = model.mode_start.clone()
    model.update_statistics(latent, context, action, torch.randn(200, 2))
    assert torch.equal(model.mode_start, before)


def test_one_mode_starts_at_the_mean_and_an_unusable_batch_is_no_first_one():
    one = ProbabilisticEnsemble(2, 0, 1)
    one.update_statistics(*inputs(one, 20), torch.randn(20, 2))
    assert (one.mode_start == 0).all()
    model = ProbabilisticEnsemble(2, 0, 1, n_modes=3)
    model.update_statistics(*inputs(model, 20), torch.full((20, 2), float("nan")))
    assert (model.mode_start == 0).all()
    model.update_statistics(*inputs(model, 20), torch.randn(20, 2))
    assert (model.mode_start != 0).all() and torch.isfinite(model.mode_start).all()


def test_bootstrap_weighs_by_position_in_training_only():
    index = torch.arange(50)
    model = ProbabilisticEnsemble(3, 0, 2, n_models=4, bootstrap=True)
    assert torch.equal(model.transition_weights(index), bootstrap_weights(index, 4))
    assert model.eval().transition_weights(index) is None
    assert ProbabilisticEnsemble(3, 0, 2, n_models=4).transition_weights(index) is None


def test_a_member_learns_nothing_from_transitions_it_does_not_keep():
    model = ProbabilisticEnsemble(3, 0, 2, n_models=4, bootstrap=True, hidden_sizes=(4,))
    index = torch.arange(100)
    row = (model.transition_weights(index) == torch.tensor([2.0, 0.0, 2.0, 0.0])).all(-1)
    index, n = index[row], int(row.sum())
    latent, context, action = inputs(model, n)
    following = {"latent": torch.randn(n, 3), "terminated": torch.zeros(n, 1).bool()}
    batch = {"latent": latent, "context": context, "action": action, "index": index}
    model.loss(TensorDict({**batch, "next": following}, batch_size=[n])).backward()
    for parameter in model.parameters():
        assert (parameter.grad[[1, 3]] == 0).all()
        assert all((parameter.grad[e] != 0).any() for e in (0, 2))


# --- property


@settings(max_examples=10)
@given(order=st.permutations(range(4)), seed=st.integers(0, 1000))
def test_order_of_members_changes_nothing(order, seed):
    torch.manual_seed(seed)
    model = random_ensemble(n_models=4, n_modes=2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter[list(order)])
    args, results = inputs(model, 5), outcome(model, 5)
    for x, y in zip(model.predict(*args)[:3], other.predict(*args)[:3], strict=True):
        torch.testing.assert_close(x[:, list(order)], y)
    for name, rest in (("log_prob", results[:1]), ("negative_log_likelihood", results)):
        found = getattr(model, name)(*args, *rest), getattr(other, name)(*args, *rest)
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y)


def test_flattening_the_batch_changes_nothing(model):
    args = inputs(model, 2, 3)
    flat = [x.flatten(0, 1) for x in args]
    for x, y in zip(model.predict(*args), model.predict(*flat), strict=True):
        torch.testing.assert_close(x.flatten(0, 1), y)


def test_a_member_alone_predicts_as_in_the_ensemble(model):
    args = inputs(model, 5)
    mean = model.predict(*args)[0]
    for e in range(model.n_models):
        torch.testing.assert_close(member_alone(model, e).predict(*args)[0][:, 0], mean[:, e])


def test_units_of_the_latent_state_do_not_matter():
    model, other = random_ensemble(), random_ensemble()
    other.load_state_dict(model.state_dict())
    (latent, context, action), (following, _) = inputs(model, 50), outcome(model, 50)
    unit = torch.tensor([1e-2, 1.0, 1e3])
    for m, scale in ((model, 1.0), (other, unit)):
        m.input_moments.count.zero_(), m.target_moments.count.zero_()
        m.update_statistics(scale * latent, context, action, scale * following)
    mean, _, std, _ = model.predict(latent, context, action)
    scaled_mean, _, scaled_std, _ = other.predict(unit * latent, context, action)
    torch.testing.assert_close(scaled_mean, unit * mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scaled_std, unit * std, rtol=1e-3, atol=1e-5)


def test_a_context_that_is_not_conditioned_on_changes_nothing():
    for seen in (False, True):
        model = random_ensemble(context_dim=2, condition_on_context=seen)
        latent, context, action = inputs(model, 5)
        same = torch.equal(
            model.predict(latent, context, action)[0], model.predict(latent, -context, action)[0]
        )
        assert same is not seen


def test_float64_is_cast_to_the_dtype_of_the_parameters():
    model = random_ensemble(context_dim=1, n_modes=2, condition_on_context=True)
    args, (following, terminated) = inputs(model, 5), outcome(model, 5)
    wide, std, matrix = [x.double() for x in args], torch.rand(3) + 0.5, torch.randn(3, 3)
    for name, more, options in (
        ("predict", (), {}),
        ("predict", (), {"std": std}),
        ("log_prob", (following,), {}),
        ("log_prob", (following,), {"std": std, "transform": matrix}),
        ("negative_log_likelihood", (following, terminated), {}),
        ("forward", (), {}),
    ):
        call = getattr(model, name)
        expected = call(*args, *more, **options)
        wide_more = [x.double() if x.is_floating_point() else x for x in more]
        wide_options = {key: x.double() for key, x in options.items()}
        for x, y in zip(call(*wide, *wide_more, **wide_options), expected, strict=True):
            assert x.dtype == torch.float32
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    other = copy.deepcopy(model)
    for m, dtype in ((model, torch.float32), (other, torch.float64)):
        m.update_statistics(*(x.to(dtype) for x in (*args, following)))
    torch.testing.assert_close(dict(model.named_buffers()), dict(other.named_buffers()))


@pytest.mark.parametrize("latent", [torch.float32, torch.float64])
def test_as_float64_it_predicts_the_same(latent):
    model = random_ensemble(n_modes=2)
    args = inputs(model, 5)
    expected = model.predict(*args)
    for x, y in zip(
        copy.deepcopy(model).double().predict(*(a.to(latent) for a in args)), expected, strict=True
    ):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# --- learning and gradients


def test_learns_a_linear_system_with_noise():
    model = ProbabilisticEnsemble(2, 0, 1, n_models=2, hidden_sizes=(32,))
    latent, context, action = inputs(model, 2000)
    change = torch.cat([0.1 * latent[:, 1:], action], -1)
    noise = torch.tensor([0.02, 0.3])
    following = latent + change + noise * torch.randn(2000, 2)
    terminated = latent[:, :1] > 0
    model.update_statistics(latent, context, action, following)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nll, bce = model.negative_log_likelihood(latent, context, action, following, terminated)
        (nll + bce).mean().backward()
        optimizer.step()
    mean, _, std, term_prob = model.predict(latent, context, action)
    error = mean - (latent + change)[:, None, None]
    assert (error.square().mean((0, 1, 2)).sqrt() < noise).all()
    torch.testing.assert_close(std.mean((0, 1, 2)), noise, rtol=0.3, atol=0)
    assert ((term_prob > 0.5) == terminated.squeeze(-1)).float().mean() > 0.95


def test_likelihood_reaches_every_parameter_and_no_statistic(model):
    args, results = inputs(model, 30), outcome(model, 30)
    sum(x.mean() for x in model.negative_log_likelihood(*args, *results)).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        for e in range(2 if name == "log_std_bounds" else model.n_models):
            assert (parameter.grad[e] != 0).any(), name
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_members_learn_apart_from_one_another():
    model = random_ensemble()
    args, (following, _) = inputs(model, 5), outcome(model, 5)
    model.predict(*args)[0][:, 1].sum().backward()
    assert all((p.grad[[0, 2]] == 0).all() for p in model.net.parameters())
    assert all(p.grad is None for p in model.termination_net.parameters())
    model.zero_grad()
    alone = member_alone(model, 1)
    nll, bce = model.negative_log_likelihood(*args, following, torch.ones(5, 1).bool())
    (nll + bce).sum().backward()
    nll, bce = alone.negative_log_likelihood(*args, following, torch.ones(5, 1).bool())
    (nll + bce).sum().backward()
    for p, own in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(3 * p.grad[1:2], own.grad, rtol=1e-4, atol=1e-5)


def test_prediction_is_differentiable_in_its_inputs():
    model = random_ensemble(context_dim=1, condition_on_context=True)
    args = [x.requires_grad_() for x in inputs(model, 5)]
    model.predict(*args)[0].sum().backward()
    assert all((x.grad != 0).any() for x in args)


@pytest.mark.parametrize("weight_dim", [None, 1, 3])
@pytest.mark.parametrize("predict_delta", [True, False])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_likelihood_is_that_of_what_is_predicted(batch, predict_delta, weight_dim):
    """The fast path scores in units of the networks' outputs, the slow one predicts first."""
    options = {"n_models": 3, "n_modes": 2, "context_dim": 1, "condition_on_context": True}
    fast = random_ensemble(predict_delta=predict_delta, learn_std_bounds=True, **options)
    args = inputs(fast, *batch)
    following, terminated = outcome(fast, *batch)
    weight = None if weight_dim is None else torch.rand(*batch, weight_dim)
    results = []
    for model in (fast, as_kind(Unchanged, fast)):
        nll, bce = model.negative_log_likelihood(*args, following, terminated, weight)
        (nll + bce).sum().backward()
        results.append((nll, bce, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_the_fast_way_is_taken_by_the_class_that_promises_it_alone(monkeypatch):
    model = random_ensemble()
    given = *inputs(model, 5), *outcome(model, 5)
    expected = as_kind(Unchanged, model).negative_log_likelihood(*given)

    def refuse(*args):
        raise AssertionError("asked to predict")

    for kind in (ProbabilisticEnsemble, Unchanged):
        monkeypatch.setattr(kind, "predict_particles", refuse)
    torch.testing.assert_close(model.negative_log_likelihood(*given), expected)
    with pytest.raises(AssertionError, match="asked to predict"):
        as_kind(Unchanged, model).negative_log_likelihood(*given)


def test_a_subclass_that_changes_nothing_says_the_same(model):
    other = as_kind(Unchanged, model)
    args, (following, terminated) = inputs(model, 5), outcome(model, 5)
    for name, more in (
        ("predict", ()),
        ("log_prob", (following,)),
        ("negative_log_likelihood", (following, terminated)),
        ("forward", ()),
    ):
        results = [getattr(m, name)(*args, *more) for m in (model, other)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_models", [1, 3])
def test_a_subclass_that_predicts_otherwise_is_followed_everywhere(n_models):
    model = random_ensemble(n_models=n_models, n_modes=2)
    turned = as_kind(Turned, model)
    args, (following, terminated) = inputs(model, 5), outcome(model, 5)
    mean, weights, std, term_prob = model.predict(*args)
    mean = 2 * args[0][:, None, None] - mean
    expected = mean, weights.flip(-1), 2 * std, 1 - term_prob
    torch.testing.assert_close(turned.predict(*args), expected)

    mean, weights, std, term_prob = expected
    log_prob, same = turned.log_prob(*args, following)
    wanted = even_mixture(mean, std, weights).log_prob(following.double())
    torch.testing.assert_close(log_prob.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same, term_prob)

    nll, bce = turned.negative_log_likelihood(*args, following, terminated)
    by_member = mixture(mean, std, weights).log_prob(following.double()[:, None])
    torch.testing.assert_close(nll.double(), -by_member.mean(-1, True), rtol=1e-4, atol=1e-4)
    _, other = model.negative_log_likelihood(*args, following, ~terminated)
    torch.testing.assert_close(bce, other)  # of the other end


@pytest.mark.parametrize("distance", [1e2, 1e4])
def test_likelihood_far_from_every_mean_has_finite_gradients(distance):
    model = random_ensemble(n_modes=3)
    args, (following, terminated) = inputs(model, 5), outcome(model, 5)
    nll, bce = model.negative_log_likelihood(*args, distance * following, terminated)
    (nll + bce).mean().backward()
    assert torch.isfinite(nll).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# --- errors


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (5, 1), r"latent: expected shape \[5, 3\], got \[5, 1\]"),
        (1, (5, 1), r"context: expected shape \[5, 2\], got \[5, 1\]"),
        (1, (1, 2), r"context: expected shape \[5, 2\], got \[1, 2\]"),
        (1, (2,), r"context: expected shape \[5, 2\], got \[2\]"),
        (2, (5, 1), r"action: expected shape \[5, 2\] .* got \[5, 1\] torch.float32"),
        (2, (1, 2), r"action: expected shape \[5, 2\] .* got \[1, 2\]"),
        (2, (2,), r"action: expected shape \[5, 2\] .* got \[2\]"),
    ],
)
def test_inputs_that_do_not_fit(position, shape, message):
    model = random_ensemble(context_dim=2)
    args = inputs(model, 5)
    args[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        model.predict(*args)


@pytest.mark.parametrize("shape", [(5, 2, 4, 3), (5, 1, 4, 3), (4, 3)])
def test_particles_without_a_row_for_each_member(shape):
    model = random_ensemble()
    _, context, action = inputs(model, 5)
    with pytest.raises(ValueError, match="latent: expected"):
        model.predict_particles(torch.zeros(shape), context, action)


@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (5, 2)])
def test_member_does_not_broadcast(shape):
    model = random_ensemble()
    _, context, action = inputs(model, 5)
    with pytest.raises(ValueError, match=r"member: expected shape \[5, 1\], got"):
        model.predict_particles(torch.zeros(5, 1, 4, 3), context, action, torch.zeros(shape).long())


@pytest.mark.parametrize("shape", [(1, 3), (5, 1)])
def test_statistics_do_not_broadcast_and_nothing_is_changed(shape):
    model = random_ensemble()
    args = inputs(model, 5)
    with pytest.raises(ValueError, match=r"next_latent: expected shape \[5, 3\]"):
        model.update_statistics(*args, torch.zeros(shape))
    assert model.input_moments.count == 0


@pytest.mark.parametrize(
    ("dims", "options", "message"),
    [
        ((3, 0, 2), {"n_models": 0}, "n_models must be at least 1, got 0"),
        ((3, 0, 2), {"n_modes": 0}, "n_modes must be at least 1, got 0"),
        ((3, 0, 2), {"n_particles_per_model": 0}, "n_particles_per_model must be at least 1"),
        ((3, 0, 2), {"std_bounds": (1.0, 0.5)}, "std_bounds must be 0 < low < high"),
        ((3, 0, 2), {"std_bounds": (0.0, 0.5)}, "std_bounds must be 0 < low < high"),
        ((3, 0, 2), {"std_bounds": (math.nan, 0.5)}, "std_bounds must be finite, got nan"),
        ((3, 0, 2), {"std_bounds": (0.1, math.inf)}, "std_bounds must be finite, got inf"),
        ((3, 0, 2), {"statistics_rate": 0.0}, "rate must be in"),
        ((3, 0, 2), {"statistics_rate": math.nan}, "rate must be finite"),
        ((0, 0, 2), {}, "latent_state_space has no dims"),
        ((3, -1, 2), {}, "context_space: expected at least 0 dims"),
    ],
)
def test_options_out_of_range(dims, options, message):
    with pytest.raises(ValueError, match=message):
        ProbabilisticEnsemble(*dims, **options)


@pytest.mark.parametrize(
    "name", ["learn_std_bounds", "bootstrap", "predict_delta", "condition_on_context"]
)
@pytest.mark.parametrize("value", ["cuda", 1, None, [False]])
def test_a_flag_of_another_kind_does_not_count_as_true(name, value):
    with pytest.raises(TypeError, match=f"Ensemble: {name} must be True or False, got"):
        ProbabilisticEnsemble(3, 0, 2, **{name: value})


@pytest.mark.parametrize("bounds", [0.1, (0.1,), "12", (0.1, "1"), (0.1, True), {0.1, 1.0}])
def test_bounds_of_another_kind(bounds):
    with pytest.raises(TypeError, match="Ensemble: std_bounds must be a"):
        ProbabilisticEnsemble(3, 0, 2, std_bounds=bounds)


def test_a_network_of_other_sizes():
    model = ProbabilisticEnsemble(3, 0, 2, network=lambda n_in, n_out: nn.Linear(n_in, 5))
    with pytest.raises(ValueError, match="network: expected networks of 8 outputs, got 5"):
        model.predict(*inputs(model, 4))


def test_unknown_space():
    with pytest.raises(TypeError, match="action_space: expected"):
        ProbabilisticEnsemble(3, 0, "two")


# --- state


def test_state_dict_round_trip(model):
    args = inputs(model, 5)
    model.update_statistics(*args, outcome(model, 5)[0])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for x in (*other.parameters(), *other.buffers()):
            if isinstance(x, nn.Parameter) or x is not other.log_std_bounds:
                x.add_(1)
    assert not torch.equal(model.predict(*args)[0], other.predict(*args)[0])
    other.load_state_dict(model.state_dict())
    for x, y in zip(model.predict(*args), other.predict(*args), strict=True):
        assert torch.equal(x, y)


def test_each_tensor_is_registered_once():
    names = [name for name, _ in random_ensemble().named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == 8  # two layers of two nets


@pytest.mark.parametrize("action", [2, OneHot(4)], ids=["continuous", "index"])
def test_captured_as_one_graph(action):
    model = random_ensemble(context_dim=1, n_modes=2, action=action)
    latent, context, action = inputs(model, 5)
    if model.action_dim == 4:
        action = torch.randint(4, (5,))
    compiled = torch.compile(model.predict, fullgraph=True, backend="eager")
    for x, y in zip(
        compiled(latent, context, action), model.predict(latent, context, action), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_training_captured_as_one_graph():
    model = random_ensemble(n_modes=2, n_models=2, network=nn.Linear, bootstrap=True)
    args, results, index = inputs(model, 5), outcome(model, 5), torch.arange(5)

    def loss():
        weight = model.transition_weights(index)
        return sum(model.negative_log_likelihood(*args, *results, weight)).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(), loss())


@pytest.mark.slow
def test_compiled():
    model = random_ensemble(n_modes=2)
    args = inputs(model, 5)
    compiled = torch.compile(model.predict, fullgraph=True)
    for x, y in zip(compiled(*args), model.predict(*args), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_follows_to_the_gpu():
    model = random_ensemble(context_dim=1, n_modes=2)
    args = inputs(model, 5)
    expected = model.predict(*args)
    on_gpu = model.to("cuda").predict(*(x.cuda() for x in args))
    for x, y in zip(on_gpu, expected, strict=True):
        assert x.is_cuda
        torch.testing.assert_close(x.cpu(), y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["n_models", "n_modes", "n_particles_per_model"])
def test_counts_that_are_no_integers_are_named(name):
    with pytest.raises(TypeError, match=f"ProbabilisticEnsemble: {name} must be an integer"):
        ProbabilisticEnsemble(3, 0, 1, **{name: 2.0})


def test_no_mode_starts_at_a_fault():
    model = ProbabilisticEnsemble(1, 0, 1, n_modes=2)
    latent, action = torch.zeros(64, 1), torch.zeros(64, 1)
    after = torch.where(torch.rand(64, 1) < 0.5, 1.0, -1.0) + 0.1 * torch.randn(64, 1)
    after[7] = 1e8
    model.update_statistics(latent, torch.zeros(64, 0), action, after)
    start = (model.target_moments.mean + model.target_scale * model.mode_start[0]).flatten()
    assert sorted(start.tolist()) == pytest.approx([-1, 1], abs=0.3)
