"""StaticPredictor: a predictor like any other, but nothing changes."""

import inspect

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer, Unbounded

from layeredrl_trl.modules import (
    DynamicsModel,
    IdentityEncoder,
    ParticlePrediction,
    SymmetryBreakingStart,
)
from layeredrl_trl.predictors import Predictor, RewardPredictor, StaticPredictor
from tests.oracles_predictors import filled_buffer
from tests.small_predictors import small_parts


def make(value="state", model=None, **options) -> StaticPredictor:
    dynamics, val_func, rew_func, encoder = small_parts(value)
    return StaticPredictor(model or dynamics, val_func, rew_func, encoder, 2, 1, **options)


class KnownDynamics(DynamicsModel):
    """``latent + action``, with a known standard deviation; never terminates."""

    n_models = n_modes = n_particles_per_model = 1
    latent_state_dim, context_dim, action_dim = 2, 0, 2

    def predict_particles(self, latent, context, action, member=None):
        mean = (latent + action[..., None, None, :]).unsqueeze(-2)
        return ParticlePrediction(
            mean, 0.1 * torch.ones_like(mean), mean[..., 0] * 0, latent[..., :1] * 0 - 20
        )


def snapshot(predictor):
    return {
        key: x.clone() for key, x in [*predictor.named_parameters(), *predictor.named_buffers()]
    }


# --- contract


def test_arguments_are_those_of_every_predictor():
    assert inspect.signature(StaticPredictor) == inspect.signature(Predictor)
    for name in ("learn", "loss"):
        own, other = (
            list(inspect.signature(getattr(kind, name)).parameters)
            for kind in (StaticPredictor, RewardPredictor)
        )
        assert own == other


@pytest.mark.parametrize("value", [None, "state", "q"])
def test_learns_nothing(value):
    predictor = make(value)
    before = snapshot(predictor)
    assert len(before) > 10
    loss, info = predictor.learn(filled_buffer(60).buffer, 5, 8, 8, 60)
    assert loss.shape == () and loss.item() == 0.0 and info == {}
    after = snapshot(predictor)
    assert list(after) == list(before)
    for key, x in before.items():
        assert torch.equal(after[key], x)
    assert all(p.grad is None for p in predictor.parameters())


def test_learns_nothing_from_three_arguments_as_from_five():
    """`learn(buffer, n_steps, batch_size)`, as the contract writes it."""
    buffer = filled_buffer(20).buffer
    for more in ((), (8,), (8, 20)):
        loss, info = make().learn(buffer, 5, 8, *more)
        assert loss.item() == 0.0 and info == {}


def test_learns_nothing_from_nothing():
    empty = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
    assert make().learn(empty, 5, 8, 8, 0)[1] == {}


def test_loss_is_zero_and_backward_reaches_nothing():
    """A training loop of one's own runs as with any other predictor."""
    predictor = make()
    before = snapshot(predictor)
    optimizer = torch.optim.SGD(predictor.parameters(), lr=1.0)
    loss, info = predictor.loss(TensorDict(batch_size=[4]))
    assert loss.shape == () and loss.item() == 0.0 and info == {}
    loss.backward()
    optimizer.step()
    assert all(torch.equal(x, before[key]) for key, x in snapshot(predictor).items())


def test_symmetry_breaking_start_stays_where_it_is():
    """A predictor that was learned in one run would else act at random again in the next."""
    model = SymmetryBreakingStart(small_parts()[0], 100)
    model.advance(100)
    predictor = make(model=model)
    predictor.learn(filled_buffer(20).buffer, 1, 4, 4, n_total_env_steps=10)
    assert model.learned_share == 1.0


def test_nothing_is_logged():
    class Writer:
        def add_scalar(self, name, value, step):
            raise AssertionError(name)

    make(writer=Writer(), log_interval=1).learn(filled_buffer(20).buffer, 1, 4, 4, 20)


# --- oracle


def test_predicts_and_imagines_with_any_dynamics_model():
    predictor = StaticPredictor(KnownDynamics(), None, None, IdentityEncoder(2), 2, 0)
    obs, act = torch.randn(5, 2), torch.randn(5, 3, 2)
    mean, weights, std, reward, term_prob = predictor.predict(obs, act[:, 0])
    torch.testing.assert_close(mean[:, 0, 0], obs + act[:, 0])
    assert (weights == 1).all() and (reward == 0).all() and (term_prob < 1e-6).all()
    torch.testing.assert_close(std, torch.full_like(std, 0.1))
    out, _ = predictor.rollout(obs, act, deterministic=True)
    torch.testing.assert_close(out["next", "latent"][:, -1, 0, 0], obs + act.sum(1))


def test_predicts_as_the_predictor_that_learned():
    learned = RewardPredictor(*small_parts(), 2, 1)
    learned.learn(filled_buffer(60).buffer, 3, 8, 8, 60)
    parts = learned.model, learned.val_func, learned.rew_func, learned.encoder
    static = StaticPredictor(*parts, 2, 1)
    obs, act = torch.randn(5, 3), torch.randn(5, 1)
    torch.testing.assert_close(static.predict(obs, act), learned.predict(obs, act))
    torch.testing.assert_close(static.value(obs, act), learned.value(obs, act))


# --- errors


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"uncertainty": True},
        {"propagation": "random_model"},
        {"propagation": "expectation"},
        {"num_particles": 1},
        {"num_particles": 1, "uncertainty": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("field", ["mean", "term_logit"])
def test_a_prediction_without_its_last_dims_is_not_broadcast_in_imagination(field, options):
    """A mean without the dim of modes became a mixture over the particles."""

    class Wrong(KnownDynamics):
        n_models = 2

        def predict_particles(self, *args):
            out = super().predict_particles(*args)
            return out._replace(
                **{field: getattr(out, field).squeeze(-2 if field == "mean" else -1)}
            )

    predictor = StaticPredictor(Wrong(), None, None, IdentityEncoder(2), 2, 0)
    env = predictor.env(Unbounded((2,)), **options)
    start = env.initial_state(TensorDict({"observation": torch.zeros(4, 2)}, [4]))
    text = f"Wrong.predict_particles: {field} must have shape"
    with pytest.raises(ValueError, match=text):
        env.imagine(start, torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match=text):
        env.step(start.set("action", torch.zeros(4, 2)))


def test_parts_that_do_not_fit():
    model, val_func, rew_func, encoder = small_parts()
    with pytest.raises(ValueError, match=r"model has 2 latent and 1 context.*latent_state_dim=3"):
        StaticPredictor(model, val_func, rew_func, encoder, 3, 1)


# --- state


def test_state_dict_round_trip():
    one, other = make(), make()
    other.load_state_dict(one.state_dict())
    obs, act = torch.randn(5, 3), torch.randn(5, 1)
    torch.testing.assert_close(one.predict(obs, act), other.predict(obs, act))
