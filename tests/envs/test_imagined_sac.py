"""Dyna: TorchRL's SAC learns in a learned model alone, and is then good in the real env."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, RenameTransform, RewardScaling, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from layeredrl_trl import IdentityEncoder, ProbabilisticEnsemble, RewardNet, RewardPredictor
from layeredrl_trl.trainers.imagined_buffer import ImaginedBuffer
from tests.problems import DOUBLE_INTEGRATOR, LQREnv, riccati

EPISODE = 25
BOUND = 2.0


def real_env():
    """A cart to be brought to rest, whose best return is known."""
    renamed = RenameTransform(["latent"], ["observation"], ["latent"], ["observation"])
    env = LQREnv(**DOUBLE_INTEGRATOR, bound=BOUND)
    return TransformedEnv(env, Compose(renamed, StepCounter(EPISODE)))


def starts():
    """The same 200 real states for everyone who is measured."""
    with torch.random.fork_rng():
        torch.manual_seed(99)
        return real_env().reset(TensorDict(batch_size=[200]))


def real_return(policy):
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        out = real_env().rollout(EPISODE, policy, tensordict=starts(), auto_reset=False)
    return out["next", "reward"].sum(1).mean().item()


def best_return():
    """No policy's return is above this one, whose actions have no bounds."""
    state, P = starts()["observation"], riccati(**DOUBLE_INTEGRATOR, horizon=EPISODE)[0][0]
    return -((state @ P) * state).sum(-1).mean().item()


def learned_model(env):
    """What random actions do, and a model of it."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40 * EPISODE))
    start = env.reset(TensorDict(batch_size=[40]))
    buffer.extend(env.rollout(EPISODE, tensordict=start, auto_reset=False).reshape(-1))
    predictor = RewardPredictor(
        ProbabilisticEnsemble(2, 0, env.action_spec, n_models=3, hidden_sizes=(32, 32)),
        None,
        RewardNet(2, 0, 1, hidden_sizes=(64, 64)),
        IdentityEncoder(2),
        latent_state_dim=2,
        context_dim=0,
        model_lr=2e-3,
        reward_lr=2e-3,
    )
    predictor.learn(
        buffer, n_steps=600, batch_size=128, model_batch_size=128, n_total_env_steps=1000
    )
    return predictor, buffer


def make_agent(env):
    net = nn.Sequential(
        MLP(2, 2, num_cells=[64, 64], activation_class=nn.SiLU), NormalParamExtractor()
    )
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -BOUND, "high": BOUND},
        default_interaction_type=InteractionType.RANDOM,
        spec=env.action_spec,
    )
    qvalue = ValueOperator(
        MLP(3, 1, num_cells=[64, 64], activation_class=nn.SiLU), ["observation", "action"]
    )
    loss = SACLoss(actor, qvalue, action_spec=env.action_spec, alpha_init=0.1)
    loss.make_value_estimator(gamma=0.95)
    return actor, loss


def train_in(imagined, loss, n_updates=500):
    """SAC as it is, but that its batches are imagined: short branches from real states."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3, foreach=True)
    targets = SoftUpdate(loss, tau=0.02)
    for update in range(n_updates):
        if update % 10 == 0:
            imagined.refill()
        terms = loss(imagined.sample(128))
        optimizer.zero_grad()
        sum(x for name, x in terms.items() if name.startswith("loss_")).backward()
        optimizer.step()
        targets.step()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sac_learns_in_the_model_and_is_good_in_the_real_env(seed):
    torch.manual_seed(seed)
    env = real_env()
    predictor, real_data = learned_model(env)
    model = predictor.env(
        env.action_spec_unbatched,
        num_particles=1,
        propagation="random_model",
        termination="sample",  # a policy does not see what is left alive
    )
    actor, loss = make_agent(env)
    imagined = ImaginedBuffer(
        TransformedEnv(model, RewardScaling(0.0, 0.1)),
        actor,
        real_data,
        num_starts=60,
        length=5,
        retain=33,
        real_ratio=0.0,  # in the model alone
    )
    before = real_return(actor)
    train_in(imagined, loss)
    after = real_return(actor)
    at_random, best = real_return(None), best_return()
    assert (after - at_random) / (best - at_random) > 0.75
    assert after > before / 2
