"""Imagined rows: they follow the model and the policy, and end where an episode does."""

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs import (
    BatchSizeTransform,
    Compose,
    InitTracker,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import ExplorationType
from torchrl.modules import (
    AdditiveGaussianModule,
    EGreedyModule,
    OrnsteinUhlenbeckProcessModule,
)
from torchrl.objectives.value import TD0Estimator

from layeredrl_trl import PessimismPenalty, SelectEncoder
from tests.envs.imagined import ACTION_SPECS, make_env
from tests.trainers.imagined_problems import (
    ACTIONS,
    ROLLOUTS,
    SYSTEM,
    KnownDynamics,
    branches_of,
    for_spec,
    imagined_buffer,
    known_env,
    real_buffer,
    real_steps,
    rows_of,
    sac,
)

FLAGS = {"done", "terminated", "truncated"}


# ---- oracle: what is imagined


def test_the_next_observation_follows_the_model_and_the_reward_is_exact():
    """Every step is drawn from one of the members: the mixture's moments."""
    shifts = (-0.3, 0.0, 0.6)
    imagined = imagined_buffer(known_env(KnownDynamics(shifts)), n=20_000, length=3, real_ratio=0.0)
    rows = imagined.buffer[:]
    observation, action = rows["observation"], rows["action"]
    error = rows["next", "observation"] - observation @ SYSTEM.A.T - action @ SYSTEM.B.T
    of_shift = torch.tensor(shifts)
    mean = torch.tensor([of_shift.mean(), 0.0])
    variance = SYSTEM.noise**2 + torch.tensor([of_shift.var(correction=0), 0.0])
    standard_error = (variance / len(rows)).sqrt()
    assert ((error.mean(0) - mean).abs() < 5 * standard_error).all()
    torch.testing.assert_close(error.var(0), variance, rtol=0.03, atol=0.0)
    torch.testing.assert_close(rows["next", "reward"], observation[:, :1] + 2 * action)
    later = error[rows_of(observation) < 0]  # no member keeps a branch to itself
    torch.testing.assert_close(later.var(0), variance, rtol=0.05, atol=0.0)


def test_episodes_end_as_often_as_the_model_says():
    rows = imagined_buffer(n=20_000, length=2).buffer[:]
    prob = SYSTEM.hazard(rows["observation"])
    ended = rows["next", "terminated"].float()
    assert (ended.mean() - prob.mean()).abs() < 5 * (prob.mean() / len(rows)).sqrt()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_branch_is_a_chain_that_ends_once(length):
    imagined = imagined_buffer(n=300, length=length)
    branches = branches_of(imagined.buffer[:])
    assert len(branches) == 300 and len(imagined) == sum(map(len, branches))
    for branch in branches:
        assert rows_of(branch["observation"][0]) >= 0  # begins at a real state
        torch.testing.assert_close(
            branch["observation"][1:], branch["next", "observation"][:-1], rtol=0, atol=0
        )
        flags = {key: branch["next", key].flatten() for key in FLAGS}
        assert not torch.cat([flags[key][:-1] for key in FLAGS]).any()
        assert flags["done"][-1] and flags["terminated"][-1] != flags["truncated"][-1]
        assert flags["terminated"][-1] or len(branch) == length
        assert not torch.cat([branch[key] for key in FLAGS]).any()
    lengths = {len(branch) for branch in branches}
    assert lengths == set(range(1, length + 1))  # some end earlier than others


def test_the_value_counts_after_a_cut_and_not_after_a_termination():
    batch = imagined_buffer(n=500, length=2, real_ratio=0.0).sample(300)
    one = TensorDictModule(lambda x: torch.ones_like(x[..., :1]), ["observation"], ["state_value"])
    target = TD0Estimator(gamma=0.9, value_network=one)(batch.clone())["value_target"]
    ended = batch["next", "terminated"]
    assert ended.any() and batch["next", "truncated"].any()
    expected = batch["next", "reward"] + torch.where(ended, 0.0, 0.9)
    torch.testing.assert_close(target, expected)


def test_an_episode_that_a_transform_ends_goes_no_further():
    env = TransformedEnv(known_env(KnownDynamics(hazard=0.0)), StepCounter(max_steps=2))
    branches = branches_of(imagined_buffer(env, n=20, length=5).buffer[:])
    assert {len(branch) for branch in branches} == {2} and len(branches) == 20
    assert all(branch["next", "truncated"][-1] for branch in branches)
    assert not any(branch["next", "terminated"].any() for branch in branches)


def test_the_context_stays_that_of_the_real_state():
    env = make_env(encoder=SelectEncoder(3, [2, 0], [1]), **ROLLOUTS)
    imagined = imagined_buffer(env, buffer=for_spec(ACTION_SPECS["continuous"]), n=50, length=4)
    for branch in branches_of(imagined.buffer[:]):
        context = torch.cat([branch["observation"], branch["next", "observation"]])[:, 1]
        assert (context == context[0]).all()
    moved = imagined.buffer[:]
    assert (moved["observation"] != moved["next", "observation"])[:, [0, 2]].all()


def test_pessimism_is_subtracted_from_imagined_rewards_only():
    def rewards(*transforms):
        torch.manual_seed(3)
        env = known_env(KnownDynamics((-0.5, 0.5)), uncertainty=True)
        env = TransformedEnv(env, Compose(*transforms)) if transforms else env
        imagined = imagined_buffer(env, n=50, length=2, real_ratio=0.5)
        return imagined.buffer[:]["next", "reward"], imagined.sample(20)[:10]["next", "reward"]

    plain, _ = rewards()
    penalised, real = rewards(PessimismPenalty(0.2))
    disagreement = (torch.tensor([-0.5, 0.5]).var(correction=0) / 2).sqrt()
    torch.testing.assert_close(penalised, plain - 0.2 * disagreement)
    assert (real == 100).all()


# ---- the policy


SCALE = nn.Parameter(torch.tensor(0.5))


def by_rule(rule):
    return TensorDictModule(rule, ["observation"], ["action"])


def test_the_policy_acts_and_leaves_no_gradient():
    policy = by_rule(lambda x: (SCALE * x[..., :1]).clamp(-1, 1))
    imagined = imagined_buffer(policy=policy, n=20, length=3)
    rows = imagined.buffer[:]
    torch.testing.assert_close(rows["action"], (0.5 * rows["observation"][:, :1]).clamp(-1, 1))
    for part in (rows, imagined.sample(40)):
        assert not any(x.requires_grad for x in part.values(True, True))
    assert SCALE.grad is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdditiveGaussianModule(ACTIONS, sigma_init=0.2, sigma_end=0.2),
        lambda: EGreedyModule(ACTIONS, eps_init=0.5, eps_end=0.5),
        lambda: OrnsteinUhlenbeckProcessModule(spec=ACTIONS),
    ],
    ids=["additive gaussian", "epsilon greedy", "ornstein uhlenbeck"],
)
def test_exploration_modules_explore_or_not_as_told(make):
    def actions(exploration_type):
        policy = TensorDictSequential(by_rule(lambda x: x[..., :1] * 0), make())
        sized = Compose(BatchSizeTransform(batch_size=[50]), InitTracker())  # it asks for a size
        env = TransformedEnv(known_env(), sized)
        options = {"n": 50, "length": 3, "exploration_type": exploration_type}
        return imagined_buffer(env, policy, **options).buffer[:]["action"]

    explored = actions(ExplorationType.RANDOM)
    assert explored.abs().max() <= 1 and len(set(explored.flatten().tolist())) > 10
    assert (actions(ExplorationType.DETERMINISTIC) == 0).all()


def test_entries_of_the_policy_are_kept_if_they_were_collected():
    actor, _ = sac(2, ACTIONS)
    steps = real_steps()
    steps["loc"] = torch.zeros(60, 1)
    batch = imagined_buffer(policy=actor, buffer=real_buffer(steps)).sample(20)
    assert "loc" in batch.keys() and "scale" not in batch.keys()
    assert batch["action"].abs().max() <= 1


def test_random_actions_without_a_policy():
    action = imagined_buffer(n=2000).buffer[:]["action"]
    assert action.abs().max() <= 1 and (action.std() - 3**-0.5).abs() < 0.03


# ---- what is not finite


class Explosive(KnownDynamics):
    """Predicts infinity beyond observations of 0.3 in dim 0, on average."""

    def predict_particles(self, *args, **kwargs):
        mean, *others = super().predict_particles(*args, **kwargs)
        far = args[0][..., :1] > 0.3
        return type(super().predict_particles(*args, **kwargs))(
            torch.where(far.unsqueeze(-2), torch.inf, mean), *others
        )


def test_steps_that_are_not_finite_are_left_out_and_warned_of_once():
    imagined = imagined_buffer(known_env(Explosive(hazard=0.0)), refills=0, length=3)
    with pytest.warns(UserWarning, match=r"ImaginedBuffer: \d+ of 200 branches were cut"):
        imagined.refill()
    imagined.refill()  # warnings are errors here
    rows = imagined.buffer[:]
    assert rows["next", "observation"].isfinite().all() and rows["next", "reward"].isfinite().all()
    assert (rows["observation"][:, 0] <= 0.3).all()
    branches = branches_of(rows)
    assert {len(branch) for branch in branches} == {1, 2, 3}
    assert all(branch["next", "truncated"][-1] for branch in branches)


def test_a_model_that_diverged_is_an_error_and_keeps_the_old_rows():
    dynamics = KnownDynamics()
    imagined = imagined_buffer(known_env(dynamics), retain=1)
    before = imagined.buffer[:].clone()
    dynamics.shift.fill_(torch.nan)
    with pytest.raises(ValueError, match="no imagined step has finite numbers"):
        imagined.refill()
    assert (imagined.buffer[:] == before).all()
