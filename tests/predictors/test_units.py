"""Nothing that is learned depends on the unit of an observation or a reward.

Units are powers of 2, so that every number but for its exponent is the same.
"""

import itertools

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl.functional import explained_variance
from layeredrl_trl.modules import (
    IdentityEncoder,
    LinearEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    ValueNet,
)
from layeredrl_trl.predictors import RewardPredictor
from tests.small_predictors import learn

UNITS = [2.0**-14, 2.0**14]


def make_data(n=600, seed=0) -> TensorDict:
    """Episodes of 50 steps of a noisy linear system with a quadratic reward."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.tensor([[0.9, 0.2, 0.0], [-0.2, 0.9, 0.1], [0.0, 0.1, 0.8]])
    push = torch.tensor([0.3, 0.5, 0.2])
    action = 2 * torch.rand(n, 1, generator=generator) - 1
    state = [torch.randn(3, generator=generator)]
    for a, noise in zip(action, torch.randn(n, 3, generator=generator), strict=True):
        state.append(turn @ state[-1] + push * a + 0.05 * noise)
    state = torch.stack(state)
    done = torch.arange(n)[:, None] % 50 == 49
    reward = state[:-1] @ torch.tensor([[1.0], [-0.5], [0.3]]) - state[:-1, :1] ** 2 + action
    return TensorDict(
        {
            "observation": state[:-1],
            "action": action,
            "next": {
                "observation": state[1:],
                "reward": reward,
                "terminated": done & (torch.arange(n)[:, None] % 150 == 149),
                "truncated": done,
                "done": done,
            },
        },
        [n],
    )


def scaled(data: TensorDict, unit: torch.Tensor, reward_unit: float) -> TensorDict:
    data = data.clone()
    for key in ("observation", ("next", "observation")):
        data[key] = data[key] * unit
    data["next", "reward"] = data["next", "reward"] * reward_unit
    return data


def train(data: TensorDict, n_steps=60, encoder=None, q=False, **options) -> RewardPredictor:
    torch.manual_seed(0)
    encoder = IdentityEncoder(3) if encoder is None else encoder(3)
    dims = encoder.latent_state_dim, encoder.context_dim
    predictor = RewardPredictor(
        ProbabilisticEnsemble(*dims, 1, n_models=2, n_modes=2, hidden_sizes=(16,)),
        ValueNet(*dims, action_dim=1 if q else None, hidden_sizes=(16,)),
        RewardNet(*dims, 1, hidden_sizes=(16,)),
        encoder,
        *dims,
        n_steps=3,
        gamma=0.9,
        encoder_warm_up=5,
        **options,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)))
    buffer.extend(data)
    learn(predictor, buffer, n_steps=n_steps, batch_size=64, seed=1)
    return predictor


@torch.no_grad()
def predict(predictor, data):
    args = data["observation"], data["action"]
    mean, weights, std, reward, term_prob = predictor.predict(*args)
    return mean, std, weights, term_prob, reward, predictor.value(*args)


@pytest.mark.parametrize("q", [False, True], ids=["state value", "q"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("learn_encoder", [True, False], ids=["warm-up", "value from step 1 on"])
def test_rewards_in_another_unit_are_learned_to_the_bit(unit, q, learn_encoder):
    data, options = make_data(), {"q": q, "learn_encoder": learn_encoder}
    plain, other = (train(scaled(data, 1.0, u), **options) for u in (1.0, unit))
    *states, reward, value = predict(plain, data)
    *other_states, other_reward, other_value = predict(other, data)
    assert all(map(torch.equal, states, other_states))
    assert torch.equal(other_reward, reward * unit) and torch.equal(other_value, value * unit)
    assert reward.std() > 0.1 and value.std() > 0.1


@pytest.mark.parametrize("unit", [*UNITS, (2.0**7, 1.0, 2.0**-7)], ids=str)
def test_states_in_other_units_are_learned_to_the_bit(unit):
    """The same system in units of 3e-5 was not learned at all."""
    data, unit = make_data(), torch.tensor(unit).expand(3)
    plain, other = (
        train(scaled(data, u, 1.0), learn_encoder=False, delta_standardizer=False)
        for u in (1.0, unit)
    )
    mean, std, *rest = predict(plain, data)
    other_mean, other_std, *other_rest = predict(other, scaled(data, unit, 1.0))
    assert torch.equal(other_mean, mean * unit) and torch.equal(other_std, std * unit)
    assert all(map(torch.equal, rest, other_rest))


@pytest.mark.parametrize("unit", UNITS)
def test_a_learned_encoder_sees_no_unit(unit):
    def encoder(n):
        return LinearEncoder(n, 2, 0)

    data = make_data()
    plain, other = (train(scaled(data, u, u), encoder=encoder) for u in (1.0, unit))
    latent, _ = plain.encode(data["observation"])
    other_latent, _ = other.encode(data["observation"] * unit)
    assert torch.equal(latent, other_latent)
    assert torch.equal(predict(plain, data)[4] * unit, predict(other, scaled(data, unit, 1.0))[4])


def test_the_standardizer_sees_no_unit():
    data, unit = make_data(), 2.0**-14
    plain, other = (train(scaled(data, u, 1.0), learn_encoder=False) for u in (1.0, unit))
    assert torch.equal(other.standardizer.matrix * unit, plain.standardizer.matrix)


@pytest.mark.slow
def test_dims_of_different_units_do_not_spoil_the_reward():
    """With dims of unit 100, 1 and 0.01, 69% of the reward was not explained."""
    unit, data = torch.tensor([100.0, 1.0, 0.01]), make_data(2000)
    options = dict.fromkeys(("reward_lr", "model_lr", "value_lr"), 3e-3)
    predictor = train(scaled(data, unit, 1.0), n_steps=300, learn_encoder=False, **options)
    test = scaled(make_data(seed=1), unit, 1.0)
    reward = predict(predictor, test)[4]
    assert explained_variance(test["next", "reward"][:, 0], reward) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e3])
def test_rewards_of_any_size_are_learned_at_the_default_rate(unit):
    """Rewards of 1e3 did not learn where rewards of 1 did."""
    data = make_data(2000)
    predictor = train(scaled(data, 1.0, unit), n_steps=300, reward_lr=3e-3)
    test = make_data(seed=1)
    reward = predict(predictor, test)[4] / unit
    assert explained_variance(test["next", "reward"][:, 0], reward) > 0.95


def test_a_large_reward_costs_the_dynamics_nothing():
    """One global norm of the gradients coupled them: a reward of unit 100 cost 0.7 nat."""
    data = make_data()
    options = {"learn_encoder": False, "clip_grad_max_norm": 1.0}
    plain, other = (train(scaled(data, 1.0, u), **options) for u in (1.0, 100.0))
    mine, others = plain.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(x, others[key]) for key, x in mine.items())


@pytest.mark.slow
def test_a_value_and_its_unit_do_not_drive_each_other_up():
    """With the moments of its own targets, a value of 100 went beyond 10,000 by default rates."""
    n = 2000
    reward = 1 + 0.1 * torch.randn(n, 1)
    flags = {key: torch.zeros(n, 1).bool() for key in ("terminated", "truncated", "done")}
    data = {"observation": torch.randn(n, 3), "action": torch.rand(n, 1)}
    data["next"] = {"observation": torch.randn(n, 3), "reward": reward, **flags}
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n))
    buffer.extend(TensorDict(data, [n]))
    torch.manual_seed(0)
    predictor = RewardPredictor(
        ProbabilisticEnsemble(3, 0, 1, hidden_sizes=(4,)),
        ValueNet(3, 0, hidden_sizes=(32,)),
        RewardNet(3, 0, 1, hidden_sizes=(4,)),
        IdentityEncoder(3),
        3,
        0,
        gamma=0.99,
        value_lr=1e-3,
        tau=0.02,
        learn_encoder=False,
    )
    means = []
    for _ in range(8):
        predictor.learn(buffer, 500, 32, 2, 0)
        means.append(predictor.value(data["observation"]).mean().item())
    assert all(before < after for before, after in itertools.pairwise(means))
    assert 20 < means[-1] < 100
