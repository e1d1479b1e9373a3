"""RewardPredictor on discrete actions, as indices and one-hot, from the buffer to the rollout."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, LazyTensorStorage, OneHot, TensorDictReplayBuffer

from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, RewardNet, ValueNet
from layeredrl_trl.predictors import RewardPredictor

MOVES = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5]])
REWARDS = torch.tensor([0.0, 1.0, -1.0])
SPECS = {
    "index": Categorical(3),
    "index-with-dim": Categorical(3, shape=(1,)),
    "one-hot": OneHot(3),
    "one-hot-long": OneHot(3, dtype=torch.int64),
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request):
    return request.param


def as_actions(index, spec):
    """Indices as what the spec says: indices ``[...]`` or ``[..., 1]``, or one-hot."""
    if isinstance(spec, OneHot):
        return torch.nn.functional.one_hot(index, 3).to(spec.dtype)
    return index.reshape(*index.shape, *spec.shape)


def filled_buffer(spec, n=600, episode=20):
    observation, index = torch.randn(n, 2), torch.randint(3, (n,))
    end = ((torch.arange(n) + 1) % episode == 0).unsqueeze(-1)
    following = {
        "observation": observation + MOVES[index] + 0.05 * torch.randn(n, 2),
        "reward": REWARDS[index].unsqueeze(-1),
        "terminated": torch.zeros(n, 1).bool(),
        "truncated": end,
        "done": end,
    }
    data = {"observation": observation, "action": as_actions(index, spec), "next": following}
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n))
    buffer.extend(TensorDict(data, batch_size=[n]))
    return buffer


def falls_at_700(env_steps):
    return 1e-2 if env_steps < 700 else 1e-3


def new_predictor(spec, q=False):
    hidden = {"hidden_sizes": (32,)}
    rates = {"model_lr": falls_at_700, "reward_lr": falls_at_700, "value_lr": 1e-2}
    return RewardPredictor(
        ProbabilisticEnsemble(2, 0, spec, n_models=2, **hidden),
        ValueNet(2, 0, action_dim=3 if q else None, **hidden),
        RewardNet(2, 0, 3, **hidden),
        IdentityEncoder(2),
        2,
        0,
        k_steps=2,
        n_steps=2,
        encoder_warm_up=0,
        **rates,
    )


def test_learns_what_each_action_does(spec):
    predictor, buffer = new_predictor(spec), filled_buffer(spec)
    for env_steps in (600, 700):
        _, info = predictor.learn(buffer, 60, 32, 64, env_steps)
    assert info["skipped"] == 0
    obs, index = torch.randn(30, 2), torch.arange(30) % 3
    action = as_actions(index, spec)
    mean, _, _, reward, _ = predictor.predict(obs, action)
    assert (mean[:, :, 0] - (obs + MOVES[index])[:, None]).abs().mean() < 0.1
    assert (reward - REWARDS[index]).abs().mean() < 0.15
    torch.testing.assert_close(predictor.predict_reward(obs, action), reward)


def test_a_q_function_of_discrete_actions(spec):
    predictor = new_predictor(spec, q=True)
    _, info = predictor.learn(filled_buffer(spec), 5, 16, 16, 600)
    assert math.isfinite(info["loss_value"])
    obs = torch.randn(1, 2).expand(3, 2)
    value = predictor.value(obs, as_actions(torch.arange(3), spec))
    assert value.shape == (3,) and value.unique().numel() == 3


@pytest.mark.parametrize("kind", ["index", "one-hot", "one-hot-long"])
def test_rollout_like_step_after_step(kind):
    spec = SPECS[kind]
    predictor = new_predictor(spec)
    predictor.learn(filled_buffer(spec), 20, 16, 16, 600)
    obs, act = torch.randn(5, 2), as_actions(torch.randint(3, (5, 4)), spec)
    out, context = predictor.rollout(obs, act, deterministic=True)
    assert out.batch_size == (5, 4) and context.shape == (5, 0)
    assert out["next", "latent"].shape == (5, 4, 2, 1, 2)
    for b in range(5):
        for e in range(2):
            latent = obs[b]
            for t in range(4):
                mean, _, _, reward, _ = predictor.predict(latent[None], act[b, t][None])
                found = out["next", "particle_reward"][b, t, e, 0, 0]
                torch.testing.assert_close(found, reward[0], rtol=1e-4, atol=1e-5)
                latent = mean[0, e, 0]
                found = out["next", "latent"][b, t, e, 0]
                torch.testing.assert_close(found, latent, rtol=1e-4, atol=1e-5)


def test_as_an_env_with_the_spec(spec):
    predictor = new_predictor(spec)
    env = predictor.env(spec)
    start = TensorDict({"observation": torch.randn(3, 2)}, batch_size=[3])
    out = env.rollout(4, tensordict=env.initial_state(start), auto_reset=False)
    assert out.batch_size == (3, 4) and torch.isfinite(out["next", "reward"]).all()


def test_index_and_one_hot_give_the_same_numbers():
    results = []
    for spec in SPECS.values():
        torch.manual_seed(1)
        predictor, buffer = new_predictor(spec), filled_buffer(spec)
        loss, _ = predictor.learn(buffer, 5, 16, 16, 600)
        results.append((loss, *predictor.parameters()))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "action", [torch.zeros(4), torch.zeros(4, 2), torch.zeros(4, 2).long()], ids=str
)
def test_actions_that_do_not_fit(action):
    predictor = new_predictor(Categorical(3))
    with pytest.raises(ValueError, match=r"action: expected shape \[4, 3\] or indices"):
        predictor.predict_reward(torch.zeros(4, 2), action)


def test_rollout_of_indices_with_a_trailing_one():
    predictor = new_predictor(SPECS["index"])
    obs, act = torch.randn(5, 2), torch.randint(3, (5, 4))
    with_one, _ = predictor.rollout(obs, act.unsqueeze(-1), deterministic=True)
    without, _ = predictor.rollout(obs, act, deterministic=True)
    torch.testing.assert_close(with_one["next", "latent"], without["next", "latent"])
