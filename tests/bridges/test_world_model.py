"""A predictor as TorchRL's ``WorldModel``: the same parts, and the same predictions."""

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.envs.model_based import WorldModelEnv
from torchrl.modules import WorldModel
from torchrl.objectives import WorldModelLoss

from layeredrl_trl.bridges import to_world_model
from layeredrl_trl.modules import ProbabilisticEnsemble, SymmetryBreakingStart
from layeredrl_trl.objectives import RewardPredictorLoss
from layeredrl_trl.predictors import StaticPredictor
from tests.bridges.predictors_of_kinds import ACT, ENCODERS, OBS, make_predictor
from tests.problems import TwoStepBanditEnv

KINDS = {
    **{name: {"encoder": name} for name in ENCODERS},
    "E = M = 1": {"n_models": 1, "n_modes": 1},
    "sees the context": {"encoder": "linear", "condition_on_context": True},
    "Q-function": {"value": "q"},
    "no value": {"value": None},
    "no reward": {"reward": False},
    "start": {"wrap": lambda model: SymmetryBreakingStart(model, 100)},
}


def inputs(*batch, indices=False):
    act = torch.randint(ACT, batch) if indices else torch.randn(*batch, ACT)
    return TensorDict(observation=torch.randn(*batch, OBS), action=act, batch_size=batch)


def expected_step(predictor, obs, act):
    """Next latent, reward and termination ``[N, .]``, from ``predict``, by loops: the oracle."""
    mean, weights, _, reward, term_prob = predictor.predict(obs, act)
    n, n_models, n_modes, dim = mean.shape
    latent = torch.zeros(n, dim)
    for e in range(n_models):
        for m in range(n_modes):
            latent += weights[:, e, m, None] * mean[:, e, m] / n_models
    return latent, reward[:, None], term_prob[:, None]


# ---- predictions


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("indices", [False, True], ids=["vectors", "indices"])
def test_predicts_what_the_predictor_does(options, batch, indices):
    torch.manual_seed(0)
    predictor = make_predictor(**options)
    world_model = to_world_model(predictor)
    assert isinstance(world_model, WorldModel)
    data = inputs(*batch, indices=indices)
    flat_act = data["action"].reshape(-1) if indices else data["action"].reshape(-1, ACT)
    latent, reward, term_prob = expected_step(
        predictor, data["observation"].reshape(-1, OBS), flat_act
    )
    with torch.no_grad():
        out = world_model(data.clone())
        start = world_model.encode(data.clone())
        step = world_model.step(start.clone())
    for got in (out, step):
        for name, x in (("latent", latent), ("reward", reward), ("term_prob", term_prob)):
            x = x.reshape(*batch, x.shape[-1])
            torch.testing.assert_close(got["next", name], x, rtol=1e-6, atol=1e-6)
        for name in ("terminated", "done"):
            expected = (term_prob >= 0.5).reshape(*batch, 1)
            assert torch.equal(got["next", name], expected)
    own = predictor.encode(data["observation"])
    for name, x in zip(("latent", "context"), own, strict=True):
        assert torch.equal(out[name], x) and torch.equal(start[name], x)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_decodes_where_the_encoder_can(encoder):
    world_model = to_world_model(make_predictor(encoder))
    data = inputs(5)
    if encoder in ("identity", "select"):
        decoded = world_model.decode(world_model.encode(data))["reconstructed_observation"]
        assert torch.equal(decoded, data["observation"])
    else:
        assert world_model.decoder is None


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, None])
def test_done_from_the_probability_on(threshold):
    world_model = to_world_model(make_predictor(), done_threshold=threshold)
    out = world_model(inputs(40))
    term_prob = out["next", "term_prob"]
    expected = term_prob if threshold is None else term_prob >= threshold
    assert torch.equal(out["next", "done"], expected)
    assert torch.equal(out["next", "terminated"], expected)


def test_draws_under_random_exploration():
    torch.manual_seed(0)
    predictor, data = make_predictor(), inputs(1).expand(4000).clone()
    world_model = to_world_model(predictor)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        drawn = world_model(data.clone())["next", "latent"]
    with torch.no_grad():
        mean = world_model(data.clone())["next", "latent"]
    assert (mean == mean[0]).all() and drawn.std(0).min() > 0.1
    assert (drawn.mean(0) - mean[0]).abs().max() < 0.1 * drawn.std(0).max()


class OwnReward(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, latent, action):
        return self.scale * latent.sum(-1, keepdim=True) - action.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["function", "TensorDictModule"])
def test_a_reward_of_your_own(kind):
    own = OwnReward()
    if kind == "function":
        reward = lambda latent, context, action: own(latent, action)  # noqa: E731
    else:
        reward = TensorDictModule(own, in_keys=["latent", "action"], out_keys=["r"])
    parts = make_predictor().model, None, reward, ENCODERS["identity"]()
    predictor, data = StaticPredictor(*parts, OBS, 0), inputs(5)
    out = to_world_model(predictor)(data.clone())
    expected = predictor.predict_reward(data["observation"], data["action"])
    assert torch.equal(out["next", "reward"], expected.unsqueeze(-1))
    assert "r" not in out


# ---- one set of parameters


@pytest.mark.parametrize("encoder", ENCODERS)
def test_parameters_are_shared(encoder):
    predictor = make_predictor(encoder)
    world_model = to_world_model(predictor)
    parts = predictor.encoder, predictor.model, predictor.rew_func
    expected = {id(p) for part in parts for p in part.parameters()}
    assert {id(p) for p in world_model.parameters()} == expected


def slices(n=16, steps=2):
    shape = (n, steps)
    following = {
        "observation": torch.randn(*shape, OBS),
        "reward": torch.randn(*shape, 1),
        "terminated": torch.rand(*shape, 1) < 0.2,
    }
    data = {
        "observation": torch.randn(*shape, OBS),
        "action": torch.randn(*shape, ACT),
        "next": following,
        "collector": {"mask": torch.ones(*shape, 1).bool()},
    }
    return TensorDict(data, batch_size=shape)


@pytest.mark.parametrize("encoder", ["identity", "linear"])
def test_our_loss_on_its_parts_trains_it_and_the_predictor(encoder):
    torch.manual_seed(0)
    predictor = make_predictor(encoder)
    world_model, data = to_world_model(predictor), inputs(20)
    own = world_model.encoder, world_model.dynamics, world_model.reward_head
    loss = RewardPredictorLoss(*own, None, k_steps=2)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    before = world_model(data.clone()).clone()
    moments = predictor.rew_func.module.moments.mean.clone()
    terms = loss(slices())
    optimizer.zero_grad()
    (terms["loss_reward"] + terms["loss_consistency"]).backward()
    optimizer.step()
    after = world_model(data.clone())
    for name in ("latent", "reward", "term_prob"):
        assert not torch.equal(after["next", name], before["next", name]), name
    assert torch.equal(after["latent"], before["latent"]) == (encoder == "identity")
    assert not torch.equal(predictor.rew_func.module.moments.mean, moments)
    latent, reward, term_prob = expected_step(predictor, data["observation"], data["action"])
    torch.testing.assert_close(after["next", "latent"], latent, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after["next", "reward"], reward, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after["next", "term_prob"], term_prob, rtol=1e-6, atol=1e-6)


def test_the_predictors_loss_is_that_of_the_parts():
    torch.manual_seed(0)
    predictor, batch = make_predictor("linear", value=None).eval(), slices(steps=1)
    world_model = to_world_model(predictor)
    own = world_model.encoder, world_model.dynamics, world_model.reward_head
    terms = RewardPredictorLoss(*own, None).eval()(batch.clone())
    expected = predictor.loss_module(batch.clone())
    for name in ("loss_reward", "loss_consistency"):
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-6, atol=0.0)


def test_state_round_trip():
    one, other = make_predictor("mlp"), make_predictor("mlp")
    to_world_model(other).load_state_dict(to_world_model(one).state_dict())
    data = inputs(5)
    out = to_world_model(one)(data.clone())
    for got in (to_world_model(other), copy.deepcopy(to_world_model(one))):
        assert (got(data.clone()) == out).all()


# ---- TorchRL's code on it


@pytest.mark.parametrize("threshold", [0.5, None])
def test_torchrls_loss_trains_it(threshold):
    torch.manual_seed(0)
    predictor = make_predictor("linear")
    world_model = to_world_model(predictor, done_threshold=threshold)
    loss = WorldModelLoss(world_model, losses=["reward", "done"])
    batch = slices(steps=1).reshape(-1)
    batch["next", "done"] = batch["next", "terminated"].clone()
    terms = loss(batch.clone())
    out = world_model(batch.clone())
    for name, own in (("loss_reward", "reward"), ("loss_done", "done")):
        error = out["next", own].float() - batch["next", own].float()
        torch.testing.assert_close(terms[name], error.square().mean())
    (terms["loss_reward"] + terms["loss_done"]).backward()
    assert predictor.encoder.latent_net.weight.grad.abs().sum() > 0
    assert predictor.rew_func.module.layers[0].weight.grad.abs().sum() > 0
    termination = predictor.model.termination_net.weights[0].grad
    assert (termination is None) == (threshold is not None)


def test_torchrls_loss_of_the_decoder_is_0_where_nothing_is_lost():
    loss = WorldModelLoss(to_world_model(make_predictor()), losses=["reconstruction"])
    assert loss(slices(steps=1).reshape(-1))["loss_reconstruction"] == 0


@pytest.mark.parametrize("encoder", ["identity", "linear"])
def test_torchrls_environment_rolls_it_out(encoder):
    torch.manual_seed(0)
    predictor = make_predictor(encoder)
    reward_of = predictor.rew_func
    assert reward_of is not None
    world_model = to_world_model(predictor, done_threshold=1.0)
    latent_dim, n = predictor.latent_state_dim, 3
    env = WorldModelEnv(
        world_model,
        TwoStepBanditEnv(),
        batch_size=[n],
        observation_spec=Composite(latent=Unbounded((n, latent_dim)), shape=[n]),
    )
    # its constructor expands specs of one env to [n] and so loses their last dim
    env.action_spec = Bounded(-1, 1, shape=(n, ACT))
    env.reward_spec = Unbounded((n, 1))
    flags = {name: Binary(1, shape=(n, 1), dtype=torch.bool) for name in ("done", "terminated")}
    env.done_spec = Composite(flags, shape=[n])
    start = world_model.encode(inputs(n).exclude("action"))
    with torch.no_grad():
        out = env.rollout(4, tensordict=start.clone())
    assert out.shape == (n, 4)
    latent, context = start["latent"], start["context"]
    for t in range(4):
        action = out["action"][:, t]
        mean, weights, *_ = predictor.model.predict(latent, context, action)
        reward = reward_of(latent, context, action)
        torch.testing.assert_close(out["latent"][:, t], latent)
        torch.testing.assert_close(out["next", "reward"][:, t], reward)
        latent = (mean * weights.unsqueeze(-1)).sum(2).mean(1)
        torch.testing.assert_close(out["next", "latent"][:, t], latent)


# ---- errors


@pytest.mark.parametrize(
    ("predictor", "options", "error", "text"),
    [
        (None, {}, TypeError, "predictor: expected a Predictor, got NoneType"),
        (ProbabilisticEnsemble(3, 0, 1), {}, TypeError, "got ProbabilisticEnsemble"),
        ("own", {"done_threshold": 1.5}, ValueError, r"done_threshold must be in \[0, 1\]"),
        ("own", {"done_threshold": "no"}, TypeError, "done_threshold must be a number"),
    ],
)
def test_bad_arguments(predictor, options, error, text):
    predictor = make_predictor() if predictor == "own" else predictor
    with pytest.raises(error, match=f"to_world_model: .*{text}"):
        to_world_model(predictor, **options)
