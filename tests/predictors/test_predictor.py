"""What every predictor does: encode, predict, value, imagine; and sample_partial_trajectories."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import (
    IdentityEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    ValueNet,
    as_reward_module,
)
from layeredrl_trl.predictors import Predictor
from tests.oracles_predictors import ToyQ, ToyValue, filled_buffer
from tests.small_predictors import LearnedEncoder, small_parts


class FixedPredictor(Predictor):
    """The least that a subclass has to bring."""

    def loss(self, batch):
        return torch.zeros(()), {}

    def learn(self, buffer, n_steps, batch_size, model_batch_size, n_total_env_steps):
        return torch.zeros(()), {}


def make(value="state", reward=True, n_models=2, n_modes=3, **options) -> FixedPredictor:
    _, val_func, rew_func, encoder = small_parts(value)
    model = ProbabilisticEnsemble(
        2, 1, 1, n_models=n_models, n_modes=n_modes, n_particles_per_model=4, hidden_sizes=(8,)
    )
    return FixedPredictor(model, val_func, rew_func if reward else None, encoder, 2, 1, **options)


class PlainReward(nn.Module):
    """Plain, and picky: a linear layer takes no float64."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, latent, context, action):
        return self.net(torch.cat([latent, context, action], -1))


# --- contract


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shapes_of_encode(batch):
    latent, context = make().encode(torch.randn(*batch, 3))
    assert latent.shape == (*batch, 2) and context.shape == (*batch, 1)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shapes_of_predictions(batch):
    predictor = make("q")
    obs, act = torch.randn(*batch, 3), torch.randn(*batch, 1)
    mean, weights, std, reward, term_prob = predictor.predict(obs, act)
    assert mean.shape == std.shape == (*batch, 2, 3, 2)
    assert weights.shape == (*batch, 2, 3)
    assert reward.shape == term_prob.shape == batch
    torch.testing.assert_close(weights.sum(-1), torch.ones(*batch, 2))
    assert ((term_prob > 0) & (term_prob < 1)).all()
    assert predictor.predict_reward(obs, act).shape == batch
    assert predictor.value(obs, act).shape == batch


@pytest.mark.parametrize("set_truncated", [True, False])
def test_a_rollout_is_marked_at_its_end_on_request(set_truncated):
    out, _ = make().rollout(torch.randn(5, 3), torch.randn(5, 7, 1), set_truncated=set_truncated)
    for flag in ("truncated", "done"):
        assert (out["next", flag][:, -1] == set_truncated).all()
        assert not out["next", flag][:, :-1].any() and not out[flag].any()


@pytest.mark.parametrize("deterministic", [True, False])
def test_shapes_of_rollout(deterministic):
    predictor = make()
    obs = torch.randn(5, 3)
    out, context = predictor.rollout(obs, torch.randn(5, 7, 1), deterministic)
    assert out.batch_size == (5, 7) and context.shape == (5, 1)
    shapes = {
        "latent": (2, 4, 2),
        "action": (1,),
        ("next", "latent"): (2, 4, 2),
        ("next", "alive"): (2, 4, 1),
        ("next", "particle_reward"): (2, 4, 1),
        ("next", "term_prob"): (2, 4, 1),
        ("next", "reward"): (1,),
        ("next", "done"): (1,),
        ("next", "terminated"): (1,),
        ("next", "truncated"): (1,),
    }
    assert {key: tuple(out[key].shape[2:]) for key in shapes} == shapes
    latent, expected = predictor.encode(obs)
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(out["latent"][:, 0], latent[:, None, None].expand(5, 2, 4, 2))
    torch.testing.assert_close(out["latent"][:, 1:], out["next", "latent"][:, :-1])


def test_discrete_actions():
    model = ProbabilisticEnsemble(3, 0, 4, n_models=2)
    parts = model, ValueNet(3, 0, action_dim=4), RewardNet(3, 0, 4), IdentityEncoder(3)
    predictor = FixedPredictor(*parts, 3, 0)
    obs, act = torch.randn(5, 3), torch.randint(4, (5, 6))
    one_hot = nn.functional.one_hot(act, 4).float()
    for first, second in ((act[:, 0], one_hot[:, 0]), (act[:, 0].numpy(), one_hot[:, 0])):
        torch.testing.assert_close(predictor.predict(obs, first), predictor.predict(obs, second))
        torch.testing.assert_close(predictor.value(obs, first), predictor.value(obs, second))
    a, b = predictor.rollout(obs, act, True)[0], predictor.rollout(obs, one_hot, True)[0]
    torch.testing.assert_close(a["next", "reward"], b["next", "reward"])


def test_a_reward_of_half_precision_actions_does_not_overflow():
    """A plain function computed 2 * 60,000 in float16."""
    model, _, _, encoder = small_parts()
    predictor = FixedPredictor(model, None, lambda *args: 6e4 * args[2], encoder, 2, 1)
    reward = predictor.predict_reward(torch.zeros(5, 3).half(), torch.full((5, 1), 2.0).half())
    assert reward.dtype == torch.float32 and (reward == 1.2e5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast(dtype):
    model, _, _, encoder = small_parts()
    predictor = FixedPredictor(model, ToyQ(), PlainReward(), encoder, 2, 1)
    obs, act = torch.randn(5, 3).to(dtype), torch.randn(5, 6, 1).to(dtype)
    results = predictor.predict(obs, act[:, 0])
    assert {x.dtype for x in results} == {torch.float32}
    torch.testing.assert_close(results, predictor.predict(obs.float(), act[:, 0].float()))
    torch.testing.assert_close(
        predictor.value(obs, act[:, 0]), predictor.value(obs.float(), act[:, 0].float())
    )
    out, _ = predictor.rollout(obs, act, deterministic=True)
    expected, _ = predictor.rollout(obs.float(), act.float(), deterministic=True)
    torch.testing.assert_close(out["next", "reward"], expected["next", "reward"])


def test_numpy_float64():
    """A plain module got float64 actions, and a linear layer takes none."""
    model, _, _, encoder = small_parts()
    predictor = FixedPredictor(model, ToyQ(), PlainReward(), encoder, 2, 1)
    obs, act = np.random.default_rng(0).normal(size=(5, 4)), np.ones((5, 6, 1))
    obs = obs[:, :3]
    assert obs.dtype == act.dtype == np.float64
    float32 = torch.as_tensor(obs).float(), torch.as_tensor(act[:, 0]).float()
    results = predictor.predict(obs, act[:, 0])
    assert {x.dtype for x in results} == {torch.float32}
    torch.testing.assert_close(results, predictor.predict(*float32))
    torch.testing.assert_close(predictor.value(obs, act[:, 0]), predictor.value(*float32))
    torch.testing.assert_close(
        predictor.predict_reward(obs, act[:, 0]), predictor.predict_reward(*float32)
    )
    out, _ = predictor.rollout(obs, act)
    assert out["next", "reward"].dtype == out["action"].dtype == torch.float32


# --- oracle


def test_predictions_are_those_of_the_parts():
    predictor = make()
    obs, act = torch.randn(5, 3), torch.randn(5, 1)
    latent, context = predictor.encode(obs)
    mean, weights, std, reward, term_prob = predictor.predict(obs, act)
    torch.testing.assert_close(
        (mean, weights, std, term_prob), predictor.model.predict(latent, context, act)
    )
    torch.testing.assert_close(reward, predictor.rew_func(latent, context, act).squeeze(-1))
    torch.testing.assert_close(reward, predictor.predict_reward(obs, act))
    value = predictor.val_func(latent, context).squeeze(-1)
    torch.testing.assert_close(predictor.value(obs), value)
    torch.testing.assert_close(predictor.value(obs, act), value)  # a state value ignores the action


def test_deterministic_rollout_is_predict_step_by_step():
    predictor = make(n_modes=2)
    obs, act = torch.randn(5, 3), torch.randn(5, 4, 1)
    out, context = predictor.rollout(obs, act, deterministic=True)
    latent = predictor.encode(obs)[0][:, None, None].expand(5, 2, 4, 2)
    alive, model = torch.ones(5, 2, 4, 1), predictor.model
    for t in range(4):
        step = model.predict_particles(latent, context, act[:, t])
        per_particle = (x[:, None, None].expand(5, 2, 4, -1) for x in (context, act[:, t]))
        reward = (alive * predictor.rew_func(latent, *per_particle)).mean((1, 2))
        torch.testing.assert_close(out["next", "reward"][:, t], reward)
        alive = alive * (1 - step.term_logit.sigmoid())
        latent = (step.mean * step.log_weights.exp().unsqueeze(-1)).sum(-2)
        torch.testing.assert_close(out["next", "latent"][:, t], latent)
        torch.testing.assert_close(out["next", "alive"][:, t], alive)


def test_no_reward_function():
    predictor = make(reward=False)
    obs, act = torch.randn(5, 3), torch.randn(5, 4, 1)
    assert (predictor.predict(obs, act[:, 0])[3] == 0).all()
    assert (predictor.rollout(obs, act)[0]["next", "reward"] == 0).all()
    with pytest.raises(ValueError, match="predict_reward: this predictor has no rew_func"):
        predictor.predict_reward(obs, act[:, 0])


def test_plain_modules_are_wrapped_and_told_apart():
    model, _, _, encoder = small_parts()
    obs, act = torch.randn(5, 3), torch.randn(5, 1)
    state = FixedPredictor(model, ToyValue(), PlainReward(), encoder, 2, 1)
    q = FixedPredictor(model, ToyQ(), PlainReward(), encoder, 2, 1)
    assert state.val_func.in_keys == ["latent", "context"]
    assert q.val_func.in_keys == ["latent", "context", "action"]
    torch.testing.assert_close(q.value(obs, act), state.value(obs) + 2 * act.squeeze(-1))


def test_env_shares_the_parts():
    predictor = make()
    env = predictor.env(Bounded(-1.0, 1.0, (1,)), termination="sample")
    assert isinstance(env, PredictorEnv)
    mine = {id(p) for part in (predictor.model, predictor.rew_func) for p in part.parameters()}
    assert mine <= {id(p) for p in env.parameters()}


def test_rollout_knows_what_was_learned_since():
    predictor = make()
    obs, act = torch.randn(5, 3), torch.randn(5, 2, 1)
    before = predictor.rollout(obs, act, True)[0]["next", "reward"]
    with torch.no_grad():
        predictor.rew_func.module.layers[-1].bias.add_(1.0)
        predictor.model.input_moments.mean.add_(1.0)
    after = predictor.rollout(obs, act, True)[0]
    torch.testing.assert_close(after["next", "reward"][:, 0], before[:, 0] + 1.0)


# --- errors


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p: p.encode(torch.zeros(4, 5)), r"observation: expected shape \[\.\.\., 3\]"),
        (lambda p: p.predict(torch.zeros(4, 2), torch.zeros(4, 1)), "observation: expected"),
        (lambda p: p.predict(torch.zeros(4, 3), torch.zeros(4, 2)), r"action: expected.*\[4, 2\]"),
        (lambda p: p.predict(torch.zeros(4, 3), torch.zeros(3, 1)), r"action: expected.*\[3, 1\]"),
        (lambda p: p.predict(torch.zeros(4, 3), torch.zeros(1, 1)), r"action: expected.*\[1, 1\]"),
        (lambda p: p.predict_reward(torch.zeros(4, 3), torch.zeros(4, 2)), "action: expected"),
        (lambda p: p.value(torch.zeros(4, 3), torch.zeros(3, 1)), "action: expected"),
        (lambda p: p.value(torch.zeros(4, 3)), "val_func is a Q-function and needs act"),
        (lambda p: p.rollout(torch.zeros(4, 3), torch.zeros(4, 1)), "actions: expected"),
        (lambda p: p.rollout(torch.zeros(4, 3), torch.zeros(4, 5, 2)), "actions: expected"),
        (lambda p: p.rollout(torch.zeros(4, 3), torch.zeros(3, 5, 1)), "obs is for 4.*act for 3"),
    ],
)
def test_shapes_that_do_not_fit(call, text):
    with pytest.raises(ValueError, match=text):
        call(make("q"))


def test_no_value_function():
    with pytest.raises(ValueError, match="value: this predictor has no val_func"):
        make(None).value(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"latent_state_dim": 3},
            ValueError,
            "model has 2 latent and 1 context.*latent_state_dim=3",
        ),
        ({"context_dim": 0}, ValueError, "model has 2 latent and 1 context.*context_dim=0"),
        ({"encoder": LearnedEncoder(3, 4)}, ValueError, "encoder has 4 latent"),
        ({"encoder": nn.Linear(3, 2)}, TypeError, "encoder: expected a Encoder, got Linear"),
        ({"model": nn.Linear(3, 2)}, TypeError, "model: expected a DynamicsModel, got Linear"),
        ({"val_func": nn.Linear(3, 1)}, TypeError, "val_func.*Linear.forward takes 1"),
        ({"writer": "runs"}, TypeError, "writer: expected None"),
        ({"log_interval": 0}, ValueError, "log_interval must be at least 1, got 0"),
    ],
)
def test_wrong_parts(change, error, text):
    model, value, reward, encoder = small_parts()
    arguments = {
        "model": model,
        "val_func": value,
        "rew_func": reward,
        "encoder": encoder,
        "latent_state_dim": 2,
        "context_dim": 1,
    }
    FixedPredictor(**arguments)
    with pytest.raises(error, match=text):
        FixedPredictor(**arguments | change)


# --- sample_partial_trajectories


@pytest.mark.parametrize("ndim", [1, 2])
def test_partial_trajectories(ndim):
    toy = filled_buffer(50, capacity=40, ndim=ndim)
    out = Predictor.sample_partial_trajectories(toy.buffer, 64, 6)
    indices, lengths, mask = out
    assert isinstance(indices, np.ndarray) and indices.dtype == np.int64
    assert indices.shape == (6, 64) and lengths.shape == (64,) and mask.shape == (64, 6)
    assert lengths.dtype == torch.int64 and mask.dtype == torch.float32
    shape = tuple(toy.buffer.storage.shape)
    for b in range(64):
        path = [np.unravel_index(i, shape) for i in indices[:, b]]
        lane = int(path[0][1]) if ndim == 2 else 0
        rows = toy.walk(int(path[0][0]), lane)[:6]
        assert lengths[b] == len(rows)
        assert mask[b].tolist() == [1.0] * len(rows) + [0.0] * (6 - len(rows))
        expected = rows + rows[-1:] * (6 - len(rows))
        assert [int(p[0]) for p in path] == expected
        assert ndim == 1 or all(int(p[1]) == lane for p in path)


def test_partial_trajectories_start_anywhere():
    toy = filled_buffer(20, [(5, True)])
    indices, lengths, _ = Predictor.sample_partial_trajectories(toy.buffer, 4000, 3)
    starts = np.bincount(indices[0], minlength=20)
    assert starts.min() > 130 and starts.max() < 280  # 200 each
    assert set(lengths.tolist()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
    ],
)
def test_partial_trajectories_of_no_steps(options, text):
    toy = filled_buffer(20)
    with pytest.raises(ValueError, match=text):
        Predictor.sample_partial_trajectories(
            toy.buffer, **{"batch_size": 1, "n_steps": 1} | options
        )


@pytest.mark.parametrize(
    ("dims", "name"), [((1.0, 0), "latent_state_dim"), ((1, False), "context")]
)
def test_numbers_of_dims_that_are_none(dims, name):
    """They were compared with the dims of the parts, and 1.0 is 1."""
    with pytest.raises(TypeError, match=f"FixedPredictor: {name}.* must be an integer, got"):
        FixedPredictor(ProbabilisticEnsemble(1, 0, 1), None, None, IdentityEncoder(1), *dims)


def test_a_device_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"FixedPredictor: device must be a torch\.device .*'cud'"):
        make(device="cud")
    with pytest.raises(ValueError, match=r"device must be a torch\.device .* got 'cud'"):
        Predictor.sample_partial_trajectories(filled_buffer().buffer, 4, 3, device="cud")


def test_partial_trajectories_of_an_empty_buffer():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
    with pytest.raises(ValueError, match="empty"):
        Predictor.sample_partial_trajectories(buffer, 4, 2)


def test_a_base_class_is_no_predictor():
    with pytest.raises(TypeError, match="abstract"):
        Predictor(*small_parts(), 2, 1)


def test_a_part_that_is_exchanged_is_used_by_rollout_too():
    predictor = make()
    obs, act = torch.randn(4, 3), torch.randn(4, 2, 1)
    predictor.rollout(obs, act)
    predictor.rew_func = as_reward_module(lambda latent, context, action: latent[..., :1] * 0 + 7)
    out, _ = predictor.rollout(obs, act)
    assert (out["next", "particle_reward"] == 7).all()


def test_env_takes_another_reward():
    predictor = make()
    env = predictor.env(Bounded(-1.0, 1.0, (1,)), reward=lambda s, c, a: s[..., :1] * 0 + 7)
    start = env.initial_state(TensorDict({"observation": torch.randn(4, 3)}, batch_size=[4]))
    assert (env.imagine(start, torch.zeros(4, 2, 1))["next", "particle_reward"] == 7).all()
