"""Predictors of LayeredRL: what they predict is predicted here, and what cannot be is named."""

import pytest
import torch
from torch import nn

from layeredrl_trl.bridges import from_layeredrl
from layeredrl_trl.modules import IdentityEncoder, LinearEncoder, MLPEncoder, SelectEncoder
from layeredrl_trl.predictors import RewardPredictor
from tests.bridges.layeredrl_modules import LayeredRLPredictor, LinearMaps, Select
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import learn, snapshot

OBS, ACT = 4, 2
FIXED = {
    "identity": (lambda: Select([*range(OBS)], []), lambda: IdentityEncoder(OBS), OBS, 0),
    "select": (
        lambda: Select([3, 0], [1, 2]),
        lambda: SelectEncoder(OBS, [3, 0], [1, 2]),
        2,
        2,
    ),
}
LEARNED = {
    "linear": (lambda: LinearMaps(OBS, 3, 1, standardize=False), lambda: None, 3, 1),
    "standardized": (lambda: LinearMaps(OBS, 3, 2, standardize=True), lambda: None, 3, 2),
    "no context": (lambda: LinearMaps(OBS, 2, 0, standardize=True), lambda: None, 2, 0),
}
ENCODERS = FIXED | LEARNED
OPTIONS = {
    "default": {},
    "one member, one mode": {"n_models": 1, "n_modes": 1},
    "many": {"n_models": 5, "n_modes": 4, "hidden": (8,)},
    "three layers": {"hidden": (6, 5, 4), "activation": nn.Tanh},
    "activation with parameters": {"activation": nn.PReLU},
    "not normalised": {"normalize": False},
    "no change": {"delta": False},
    "sees the context": {"ignore_context": False},
    "input normalisation": {"input_norm": True},
    "Q-function": {"value": "q"},
    "no value, no reward": {"value": None, "reward": False},
    "no standardizer": {"whitener": False},
    "start is over": {"start": True},
}


def theirs(encoder="standardized", seed=0, **options):
    """A predictor of LayeredRL, and a function that maps its state with other arguments."""
    torch.manual_seed(seed)
    make, make_ours, *dims = ENCODERS[encoder]
    predictor = LayeredRLPredictor(make(), *dims, ACT, **options)
    arguments = {
        "activation": options.get("activation", nn.ReLU),
        "predict_delta": options.get("delta", True),
        "sb_start_duration": 5000 if options.get("start") else None,
    }

    def ours(state=None, space=ACT, **changes):
        state = predictor.state_dict() if state is None else state
        changes = {"encoder": make_ours()} | arguments | changes
        return from_layeredrl(state, space, **changes)

    return predictor, ours


def batch(n=50):
    return torch.randn(n, OBS) * 2, torch.randn(n, ACT)


def assert_same(predictor, ours, obs, act, own_act=None):
    with torch.no_grad():
        names = ("s_mean", "weights", "s_std", "reward", "term_prob")
        expected = predictor.predict(obs, act)
        got = ours.predict(obs, act if own_act is None else own_act)
        for name, x, y in zip(names, expected, got, strict=True):
            torch.testing.assert_close(
                y, x, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


# ---- the same predictions


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_predicts_what_layeredrl_does(encoder, options):
    predictor, make = theirs(encoder, **options)
    ours, (obs, act) = make(), batch()
    assert isinstance(ours, RewardPredictor) and ours.training
    assert_same(predictor, ours, obs, act)
    with torch.no_grad():
        for x, y in zip(predictor.encoder(obs), ours.encode(obs), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
        if predictor.val_func is not None:
            expected = predictor.value(obs, act)
            torch.testing.assert_close(ours.value(obs, act), expected, rtol=1e-6, atol=1e-6)
    assert (ours.val_func is None) == (predictor.val_func is None)
    assert (ours.rew_func is None) == (predictor.rew_func is None)


@pytest.mark.parametrize("form", ["[B]", "[B, 1]"])
def test_discrete_actions_are_indices(form):
    torch.manual_seed(0)
    predictor = LayeredRLPredictor(
        Select([*range(OBS)], []), OBS, 0, 3, discrete=True, reward=False, value=None
    )
    ours = from_layeredrl(predictor.state_dict(), 3, IdentityEncoder(OBS))
    obs, index = torch.randn(20, OBS), torch.randint(3, (20, 1))
    given = index if form == "[B, 1]" else index[:, 0]
    assert_same(predictor, ours, obs, index, given)
    one_hot = nn.functional.one_hot(index[:, 0], 3).float()
    assert_same(predictor, ours, obs, index, one_hot)


@pytest.mark.parametrize("log_std", [-30.0, -10.0, -3.0, 0.0, 4.0, 10.0, 30.0])
@pytest.mark.parametrize("term", [-50.0, 0.0, 50.0])
def test_standard_deviations_and_terminations_are_clamped_as_there(log_std, term):
    predictor, make = theirs(n_models=1, n_modes=1, normalize=False)
    layer = predictor.model.nets[0].final_layer
    layer.weight.data.zero_()
    layer.bias.data[3:6], layer.bias.data[-1] = log_std, term
    obs, act = batch(3)
    expected, got = predictor.predict(obs, act), make().predict(obs, act)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(got[4], expected[4], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("encoder", ["select", "standardized", "no context"])
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"n_models": 1, "n_modes": 1}])
def test_the_standardizer_whitens_as_there(encoder, options):
    predictor, make = theirs(encoder, **options)
    ours, (obs, act), (later, _) = make(), batch(), batch()
    matrix = predictor.delta_standardizer.matrix()
    torch.testing.assert_close(ours.standardizer.matrix, matrix, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        (state, context), (next_state, _) = predictor.encoder(obs), predictor.encoder(later)
        std = torch.full((state.shape[-1],), 0.5)
        expected = predictor.model.log_prob(state, context, act, next_state, std, matrix)
        got, *_ = ours.get_standardized_log_prob(state, context, act, next_state, std)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("encoder", ["identity", "standardized"])
def test_transitions_are_scored_by_the_densities_of_there(encoder):
    predictor, make = theirs(encoder, n_models=3)
    ours, (obs, act), (later, _) = make(), batch(), batch()
    with torch.no_grad():
        (state, context), (next_state, _) = predictor.encoder(obs), predictor.encoder(later)
        ended = torch.rand(len(obs), 1) < 0.5
        nll, bce = ours.model.score_members(state, context, act, next_state, ended)
        plain = ours.model._score_members(state, context, act, next_state, ended)
        change = (next_state - state).unsqueeze(1)
        for e, member in enumerate(predictor.model.members(state, context, act)):
            mean, std, weights, term_prob = member
            log_density = torch.distributions.Normal(mean, std).log_prob(change).sum(-1)
            expected = -(weights.log() + log_density).logsumexp(-1)
            torch.testing.assert_close(nll[:, e], expected, rtol=1e-4, atol=1e-4)
            expected = nn.functional.binary_cross_entropy(
                term_prob, ended[:, 0].float(), reduction="none"
            )
            torch.testing.assert_close(bce[:, e], expected, rtol=1e-5, atol=1e-5)
    for x, y in zip((nll, bce), plain, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_the_target_of_the_value_comes_along():
    predictor, make = theirs()
    ours, (obs, act) = make(), batch()
    with ours.target_val_params.to_module(ours.val_func), torch.no_grad():
        got = ours.value(obs, act)
    torch.testing.assert_close(got, predictor.value(obs, act, target=True), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(got, ours.value(obs, act))


def test_a_state_without_a_target_takes_the_value_for_it():
    predictor, make = theirs()
    state = {k: x for k, x in predictor.state_dict().items() if not k.startswith("target")}
    ours = make(state)
    for name, x in ours.val_func.named_parameters():
        assert torch.equal(ours.target_val_params[tuple(name.split("."))], x)


# ---- what becomes of it


@pytest.mark.parametrize("encoder", ["identity", "standardized"])
def test_it_learns_on_and_does_not_jump(encoder):
    make, make_ours, *dims = {
        "identity": (lambda: Select([0, 1, 2], []), lambda: IdentityEncoder(3), 3, 0),
        "standardized": (lambda: LinearMaps(3, 2, 1, standardize=True), lambda: None, 2, 1),
    }[encoder]
    torch.manual_seed(0)
    predictor = LayeredRLPredictor(make(), *dims, 1)
    if encoder == "standardized":  # a dim that is first seen to change does change the latent state
        predictor.encoder.mask.data.fill_(True)
    ours = from_layeredrl(predictor.state_dict(), 1, make_ours(), n_steps=2)
    obs, act = torch.randn(20, 3), torch.randn(20, 1)
    before, state = ours.predict(obs, act), snapshot(ours)
    learn(ours, filled_buffer(), n_steps=3)
    after = ours.predict(obs, act)
    for x, y in zip(before, after, strict=True):
        assert not torch.equal(x, y) or (x == x[0]).all()
        assert (x - y).abs().max() < 0.1
    changed = {
        name.partition(".")[0] for name, x in snapshot(ours).items() if (x != state[name]).any()
    }
    expected = {"model", "rew_func", "val_func", "standardizer", "target_val_params"}
    assert changed == (expected if encoder == "identity" else expected | {"encoder"})


def test_state_round_trip():
    predictor, make = theirs()
    ours, other = make(), make(theirs(seed=1)[0].state_dict())
    other.load_state_dict(ours.state_dict())
    assert_same(predictor, other, *batch())


def test_options_are_those_of_the_predictor():
    _, make = theirs()
    ours = make(gamma=0.9, k_steps=3, n_particles_per_model=4, learn_encoder=False)
    assert ours.loss_module.gamma == 0.9 and ours.loss_module.k_steps == 3
    assert ours.model.n_particles_per_model == 4
    assert make(delta_standardizer=False).standardizer is None


def test_nothing_is_shared_with_the_state():
    predictor, make = theirs("identity")
    ours, (obs, act) = make(), batch()
    before = ours.predict(obs, act)
    for x in predictor.state_dict().values():
        x.zero_()
    torch.testing.assert_close(ours.predict(obs, act), before, rtol=0, atol=0)


# ---- what cannot be mapped

FAULTS = {
    "missing layer": (
        lambda s: s.pop("model.nets.1.net.2.bias"),
        r"model.nets.1.net.2.bias is mis",
    ),
    "missing network": (
        lambda s: [s.pop(k) for k in [*s] if k.startswith("model.nets.0")],
        r"model.nets.0.net.0.weight is missing",
    ),
    "unknown entry": (
        lambda s: s.update({"model.nets.0.dropout.rate": torch.ones(1)}),
        r"model.nets.0.dropout.rate: there is no counterpart",
    ),
    "members of two sizes": (
        lambda s: s.update({"model.nets.1.net.0.weight": torch.ones(9, 5)}),
        r"model.nets.1.net.0.weight: expected shape \[7, 5\], got \[9, 5\]",
    ),
    "no mixture": (
        lambda s: s.update({"model.nets.0.final_layer.weight": torch.ones(13, 5)}),
        r"model.nets.0.final_layer.weight: 13 outputs",
    ),
    "another action": (
        lambda s: s.update({"model.nets.0.net.0.weight": torch.ones(7, 9)}),
        r"model.nets.0.net.0.weight: it reads 9 numbers, but there are 3 latent, 2 context and 2",
    ),
    "reward of another size": (
        lambda s: s.update({"rew_func.net.0.weight": torch.ones(7, 3)}),
        r"rew_func.net.0.weight: expected shape \[7, 7\], got \[7, 3\]",
    ),
    "value of another size": (
        lambda s: s.update({"val_func.net.0.weight": torch.ones(7, 4)}),
        r"val_func.net.0.weight: expected shape \[7, 5\], got \[7, 4\]",
    ),
    "standardizer of another size": (
        lambda s: s.update({"delta_standardizer.mat": torch.ones(2, 2)}),
        r"delta_standardizer.mat: expected shape \[3, 3\], got \[2, 2\]",
    ),
    "NaN": (
        lambda s: s["rew_func.final_layer.bias"].fill_(torch.nan),
        r"rew_func.final_layer.bias: expected finite",
    ),
    "no tensor": (
        lambda s: s.update({"encoder.mask": [True]}),
        r"encoder.mask: expected a tensor, got list",
    ),
    "a prefix": (
        lambda s: [s.update({f"level.{k}": s.pop(k)}) for k in [*s]],
        r"encoder.state_net.weight is missing",
    ),
    "one dim too many": (
        lambda s: s.update({"encoder.state_net.weight": torch.ones(3, 4, 1)}),
        r"encoder.state_net.weight: expected 2 dims, got shape \[3, 4, 1\]",
    ),
    "input that never changed": (
        lambda s: s["encoder.input_bn.mean"].fill_(1e9),
        r"encoder.input_bn.var: a dim varies by less than float32 resolves",
    ),
}


@pytest.mark.parametrize(("change", "text"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_mapped_is_named(change, text):
    predictor, make = theirs()
    state = {name: x.clone() for name, x in predictor.state_dict().items()}
    change(state)
    with pytest.raises((KeyError, ValueError, TypeError), match=f"from_layeredrl: {text}"):
        make(state)


@pytest.mark.parametrize("duration", [None, 5001])
def test_a_start_that_is_not_over_is_refused(duration):
    _, make = theirs("select", start=True)
    with pytest.raises(ValueError, match=r"model.random_dynamics.A: the symmetry-breaking start"):
        make(sb_start_duration=duration)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"state": [1]}, TypeError, "state_dict: expected a mapping"),
        ({"encoder": IdentityEncoder(4)}, ValueError, "encoder: the state has a learned encoder"),
        ({"encoder": "identity"}, TypeError, "encoder: expected a Encoder, got str"),
        ({"space": "Box"}, TypeError, "action_space"),
        ({"space": 0}, ValueError, "action_space must be at least 1"),
        ({"activation": 3}, TypeError, "activation"),
        ({"predict_delta": 1}, TypeError, "predict_delta must be True or False"),
        ({"gamma": 2.0}, ValueError, "gamma"),
        ({"layers": 2}, TypeError, "layers"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_arguments(arguments, error, text):
    _, make = theirs()
    with pytest.raises(error, match=text):
        make(**arguments)


@pytest.mark.parametrize("encoder", [None, LinearEncoder(OBS, 4, 0), MLPEncoder(OBS, 4, 0)])
def test_an_encoder_without_entries_must_be_given_and_learn_nothing(encoder):
    _, make = theirs("identity")
    with pytest.raises((KeyError, ValueError), match=r"FixedEncoderNet have no|has param"):
        make(encoder=encoder)
