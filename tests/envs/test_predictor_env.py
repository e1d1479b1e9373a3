"""PredictorEnv: specs of all combinations, imagine == rollout == a plain loop, resets, planners."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import RewardScaling, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type
from torchrl.modules import CEMPlanner, MPPIPlanner
from torchrl.objectives.value import TDLambdaEstimator

from layeredrl_trl.envs import PredictorEnv
from layeredrl_trl.modules import IdentityEncoder, RewardNet, ValueNet
from layeredrl_trl.planners import CrossEntropyPlanner
from tests.changed_ensembles import Turned, Unchanged, as_kind
from tests.envs.imagined import (
    ACTION_SPECS,
    BATCH_SHAPES,
    CONTINUOUS,
    SplitEncoder,
    make_env,
    observations,
    random_actions,
)
from tests.oracles import imagine_one, member_alone, random_ensemble

IGNORE_BLIND_STARTS = pytest.mark.filterwarnings("ignore:.*to a latent state drawn from")


def play(env, state, actions, break_when_any_done=False, **options):
    """TorchRL's rollout with given actions ``[..., H, A]``."""
    time, steps = len(state.batch_size), itertools.count()

    def policy(tensordict):
        return tensordict.set("action", actions.select(time, next(steps)))

    return env.rollout(
        actions.shape[time],
        policy,
        tensordict=state.clone(),
        auto_reset=False,
        break_when_any_done=break_when_any_done,
        **options,
    )


def assert_same(one, other):
    """Equal keys and values of two TensorDicts."""
    names = set(one.keys(True, True))
    assert names == set(other.keys(True, True))
    for name in names:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


# --- contract


@pytest.mark.parametrize("uncertainty", [False, True], ids=["", "uncertainty"])
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("termination", ["soft", "sample"])
@pytest.mark.parametrize("num_particles", [None, 1, "2E"])
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("n_models", [1, 3])
def test_specs(n_models, particles, num_particles, termination, propagation, uncertainty):
    num_particles = 2 * n_models if num_particles == "2E" else num_particles
    env = make_env(
        n_models=n_models,
        particles=particles,
        num_particles=num_particles,
        termination=termination,
        propagation=propagation,
        uncertainty=uncertainty,
    )
    check_env_specs(env, seed=0)
    rows, columns = (1, 1) if num_particles == 1 else (n_models, num_particles or 0)
    columns = particles if num_particles is None else columns if rows == 1 else columns // rows
    state = env.reset(TensorDict(batch_size=[4]))
    assert state["latent"].shape == (4, rows, columns, 3)
    assert state["alive"].shape == (4, rows, columns, 1) and (state["alive"] == 1).all()
    assert ("member" in state) == (num_particles == 1 and n_models > 1)
    assert ("epistemic_var" in state) == ("aleatoric_var" in state) == uncertainty


@pytest.mark.parametrize("encoder", [IdentityEncoder(3), SplitEncoder(3)], ids=type)
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("action_spec", ACTION_SPECS.values(), ids=ACTION_SPECS)
def test_specs_of_actions_and_encoders(action_spec, num_particles, encoder):
    env = make_env(action_spec, num_particles=num_particles, encoder=encoder, uncertainty=True)
    check_env_specs(env, seed=0)
    assert ("observation" in env.observation_spec.keys()) == encoder.can_decode


@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("action_spec", ACTION_SPECS.values(), ids=ACTION_SPECS)
@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_layout_of_a_rollout(batch, action_spec, num_particles):
    env = make_env(action_spec, num_particles=num_particles, uncertainty=True)
    state = env.initial_state(observations(env, *batch))
    rows, particles = (3, 2) if num_particles is None else (1, 1)
    out = env.imagine(state, random_actions(env, *batch, 5))
    assert out.batch_size == (*batch, 5) and out.names == [None] * len(batch) + ["time"]
    shapes = {
        "latent": (rows, particles, 3),
        "context": (0,),
        "alive": (rows, particles, 1),
        "particle_reward": (rows, particles, 1),
        "term_prob": (rows, particles, 1),
        "epistemic_var": (3,),
        "aleatoric_var": (3,),
        "observation": (3,),
        "terminated": (1,),
        "truncated": (1,),
        "done": (1,),
    }
    if num_particles == 1:
        shapes["member"] = (1,)
    for prefix in ((), ("next",)):
        for name, shape in shapes.items():
            assert out[(*prefix, name)].shape == (*batch, 5, *shape), name
    assert out["next", "reward"].shape == (*batch, 5, 1)
    assert out["action"].shape == (*batch, 5, *action_spec.shape)
    assert set(out.keys()) == {*shapes, "action", "next"}
    assert set(out["next"].keys()) == {*shapes, "reward"}


# --- oracle: imagine == rollout == a plain loop


@pytest.mark.parametrize("propagation", ["fixed_model", "expectation"])
@pytest.mark.parametrize("num_particles", [None, 1, 2])
@pytest.mark.parametrize("action_spec", ACTION_SPECS.values(), ids=ACTION_SPECS)
def test_imagine_like_a_loop_over_particles(action_spec, num_particles, propagation):
    env = make_env(
        action_spec,
        encoder=SplitEncoder(4),
        num_particles=num_particles,
        propagation=propagation,
        deterministic=True,
    )
    model, reward = env.world_model.dynamics, env.world_model.reward
    data, actions = observations(env, 4), random_actions(env, 4, 3)
    state = env.initial_state(data.clone())
    out = env.imagine(state, actions)
    for b in range(4):
        if num_particles is None:
            members = [e for e in range(3) for _ in range(2)]
        else:
            members = [state["member"][b].item()] * num_particles
        played = actions[b].squeeze(-1) if action_spec.shape == (1,) else actions[b]
        steps = imagine_one(
            model,
            reward,
            data["observation"][b, :3],
            data["observation"][b, 3:],
            played if played.ndim == 1 else played.float(),
            members,
            propagation,
        )
        for t, expected in enumerate(steps):
            for name, x in expected.items():
                found = out["next", name][b, t].flatten().double()
                torch.testing.assert_close(found, x.double().flatten(), rtol=1e-4, atol=1e-4)


def test_an_env_of_ones_own_may_observe_more():
    """Specs are read when they are needed, not when the env is made."""

    class WithDistance(PredictorEnv):
        def _entries(self, outcome, context):
            distance = outcome.latent.norm(dim=-1).mean((-2, -1)).unsqueeze(-1)
            return super()._entries(outcome, context) | {"distance": distance}

    env = make_env()
    env.__class__ = WithDistance
    entries = dict(env.observation_spec.items())
    env.observation_spec = Composite(entries | {"distance": Unbounded((1,))})
    state, actions = env.initial_state(observations(env, 2)), random_actions(env, 2, 4)
    imagined = env.imagine(state, actions)
    assert (imagined["distance"][:, 0] == 0).all()
    torch.testing.assert_close(imagined["distance"][:, 1:], imagined["next", "distance"][:, :-1])
    assert (imagined["next", "distance"] > 0).all()


@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_imagine_is_rollout(deterministic, propagation, num_particles, batch):
    env = make_env(
        num_particles=num_particles,
        propagation=propagation,
        deterministic=deterministic,
        uncertainty=True,
    )
    state = env.reset(observations(env, *batch))
    actions = random_actions(env, *batch, 4)
    torch.manual_seed(1)
    fast = env.imagine(state, actions)
    torch.manual_seed(1)
    assert_same(fast, play(env, state, actions))
    before = state.clone()
    fast.apply_(lambda x: x.zero_())
    assert_same(state, before)


@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model"])
@pytest.mark.parametrize("termination", ["soft", "sample"])
def test_imaginer_is_imagine(termination, propagation, num_particles, batch):
    env = make_env(num_particles=num_particles, propagation=propagation, termination=termination)
    state = env.reset(observations(env, *batch))
    full = env.imagine(state, random_actions(env, *batch, 4))
    flags = ("done", "terminated", "truncated")
    names = [("next", key) for key in full["next"].keys()]
    imagine = env.imaginer(state, [*names, ("next", "nothing"), "reward"])
    for n in {1, batch[-1]} if batch else {None}:  # the first few, then all
        some = state if n is None else state[..., :n]
        actions = random_actions(env, *some.batch_size, 4)
        torch.manual_seed(1)
        expected = env.imagine(some, actions)["next"]
        torch.manual_seed(1)
        found = imagine(actions)
        assert found.keys() == {
            ("next", key) for key in expected.keys() if termination == "sample" or key not in flags
        }
        for (_, key), x in found.items():
            torch.testing.assert_close(x, expected[key])


def make_env_of(kind, **options):
    env = make_env(**options)
    env.world_model.dynamics = as_kind(kind, env.world_model.dynamics)
    return env


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("kind", [Unchanged, Turned])
def test_a_subclass_of_the_ensemble_imagines_as_it_predicts(kind, num_particles, deterministic):
    """It does not inherit the fast rollout of its base, which would not ask for its predictions."""
    options = {"num_particles": num_particles, "deterministic": deterministic}
    env = make_env_of(kind, **options)
    assert env.world_model.fast_rollout() is None
    state, actions = env.reset(observations(env, 6)), random_actions(env, 6, 4)
    torch.manual_seed(1)
    slow = play(env, state, actions)
    torch.manual_seed(1)
    assert_same(env.imagine(state, actions), slow)
    names = [("next", key) for key in ("latent", "alive", "reward")]
    torch.manual_seed(1)
    for name, x in env.imaginer(state, names)(actions).items():
        torch.testing.assert_close(x, slow[name])


@pytest.mark.parametrize("num_particles", [None, 1])
def test_a_subclass_that_changes_nothing_imagines_the_same(num_particles):
    env = make_env(num_particles=num_particles)
    assert env.world_model.fast_rollout() is not None
    state, actions = env.reset(observations(env, 6)), random_actions(env, 6, 4)
    outcomes = []
    for kind in (type(env.world_model.dynamics), Unchanged):
        env.world_model.dynamics = as_kind(kind, env.world_model.dynamics)
        torch.manual_seed(1)
        outcomes.append(env.imagine(state, actions))
    assert_same(*outcomes)


def test_imaginer_names_what_does_not_fit():
    env = make_env()
    state = env.reset(observations(env, 3))
    with pytest.raises(KeyError, match="no entry \\['alive'\\]"):
        env.imaginer(state.exclude("alive"), [])
    for shape in [(4, 4), (3, 4, 7), (3,), (3, 0)]:
        with pytest.raises(ValueError, match="actions: expected"):
            env.imaginer(state, [])(torch.zeros(*shape, *env.action_spec.shape))


@pytest.mark.parametrize("action_spec", ACTION_SPECS.values(), ids=ACTION_SPECS)
def test_imagine_is_rollout_for_any_action(action_spec):
    env = make_env(action_spec, deterministic=True)
    state, actions = env.reset(observations(env, 3)), random_actions(env, 3, 4)
    assert_same(env.imagine(state, actions), play(env, state, actions))


def test_imagine_is_rollout_until_termination_is_drawn():
    env = make_env(n_models=1, particles=2, termination="sample")
    state, actions = env.reset(observations(env, 20)), random_actions(env, 20, 8)
    torch.manual_seed(1)
    fast = env.imagine(state, actions)
    torch.manual_seed(1)
    slow = play(env, state, actions, break_when_any_done=True)
    steps = slow.shape[1]
    assert slow["next", "terminated"][:, -1].any()
    assert_same(fast[:, :steps], slow)


@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("termination", ["soft", "sample"])
def test_set_truncated_is_that_of_rollout(termination, batch):
    env = make_env(n_models=1, particles=1, termination=termination)
    state, actions = env.reset(observations(env, *batch)), random_actions(env, *batch, 6)
    torch.manual_seed(1)
    stops = termination == "sample"
    slow = play(env, state, actions, break_when_any_done=stops, set_truncated=True)
    steps = slow.shape[-1]
    actions = actions.narrow(len(batch), 0, steps)
    before = state.clone()
    torch.manual_seed(1)
    assert_same(env.imagine(state, actions, set_truncated=True), slow)
    assert_same(state, before)
    unmarked = slow["next"].exclude("done", "truncated")
    torch.manual_seed(1)
    fast = env.imagine(state, actions)["next"]
    assert not fast["truncated"].any()
    assert_same(fast.exclude("done", "truncated"), unmarked)


def test_set_truncated_marks_envs_that_terminated_too():
    env = make_env(n_models=1, particles=1, termination="sample")
    state, actions = env.reset(observations(env, 50)), random_actions(env, 50, 1)
    torch.manual_seed(1)
    slow = play(env, state, actions, set_truncated=True)
    torch.manual_seed(1)
    assert_same(env.imagine(state, actions, set_truncated=True), slow)
    over = slow["next", "terminated"]
    assert over.any() and not over.all()
    assert slow["next", "truncated"].all() and slow["next", "done"].all()


def test_a_terminated_env_goes_on_without_reward():
    env = make_env(n_models=1, particles=1, termination="sample")
    out = env.imagine(env.reset(observations(env, 50)), random_actions(env, 50, 5))
    over, alive = out["next", "terminated"].squeeze(-1), out["next", "alive"].flatten(2)
    assert 0 < over[:, -1].float().mean() < 1
    assert torch.equal(over, (alive == 0).all(-1))
    assert (over[:, 1:] >= over[:, :-1]).all()  # once over, always over
    assert (out["next", "reward"][:, 1:][over[:, :-1]] == 0).all()
    assert torch.equal(out["next", "done"], out["next", "terminated"])
    assert not out["next", "truncated"].any()


def test_soft_termination_never_ends_and_alive_is_a_product():
    env = make_env(termination="soft")
    out = env.imagine(env.reset(observations(env, 4)), random_actions(env, 4, 12))
    assert not out["next", "done"].any()
    product = (1 - out["next", "term_prob"]).cumprod(1)
    torch.testing.assert_close(out["next", "alive"], product)
    weighted = (out["alive"] * out["next", "particle_reward"]).mean((2, 3))
    torch.testing.assert_close(out["next", "reward"], weighted)


def test_reward_is_of_the_state_before_the_step():
    class FirstDim(nn.Module):
        def forward(self, latent, context, action):
            return latent[..., :1] + action[..., :1]

    env = make_env()
    env = PredictorEnv(IdentityEncoder(3), env.world_model.dynamics, FirstDim(), CONTINUOUS)
    out = env.imagine(env.reset(observations(env, 4)), actions := random_actions(env, 4, 3))
    expected = out["latent"][..., :1] + actions[..., None, None, :1]
    torch.testing.assert_close(out["next", "particle_reward"], expected)


def test_root_and_next_are_one_step_apart():
    env = make_env()
    out = env.imagine(env.reset(observations(env, 4)), random_actions(env, 4, 5))
    for name in set(out.keys()) - {"action", "next"}:
        assert torch.equal(out[name][:, 1:], out["next", name][:, :-1]), name


# --- properties


@pytest.mark.parametrize("num_particles", [None, 1])
def test_flattening_the_batch_changes_nothing(num_particles):
    env = make_env(deterministic=True, num_particles=num_particles)
    state, actions = env.reset(observations(env, 2, 3)), random_actions(env, 2, 3, 4)
    out = env.imagine(state, actions)
    assert_same(out.reshape(6, 4), env.imagine(state.reshape(6), actions.flatten(0, 1)))


def test_order_of_members_does_not_change_the_reward():
    env = make_env(deterministic=True)
    model, order = env.world_model.dynamics, [2, 0, 1]
    state, actions = env.reset(observations(env, 4)), random_actions(env, 4, 5)
    before = env.imagine(state, actions)["next", "reward"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter[order])
    torch.testing.assert_close(env.imagine(state, actions)["next", "reward"], before)


def test_seed_decides_the_draws():
    env = make_env()
    state, actions = env.reset(observations(env, 4)), random_actions(env, 4, 5)
    runs = []
    for seed in (1, 1, 2):
        env.set_seed(seed)
        runs.append(env.imagine(state, actions)["next", "latent"])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_deterministic_none_follows_the_exploration_type():
    env = make_env(deterministic=None)
    state, actions = env.reset(observations(env, 4)), random_actions(env, 4, 5)
    for kind, drawn in (
        (ExplorationType.RANDOM, True),
        (ExplorationType.DETERMINISTIC, False),
        (ExplorationType.MEAN, False),
        (ExplorationType.MODE, False),
    ):
        with set_exploration_type(kind):
            one, other = (env.imagine(state, actions)["next", "latent"] for _ in range(2))
        assert torch.equal(one, other) is not drawn


def test_arguments_are_not_changed():
    env = make_env()
    state, actions = env.reset(observations(env, 4)), random_actions(env, 4, 5)
    before, played = state.clone(), actions.clone()
    env.imagine(state, actions)
    assert_same(state, before)
    assert torch.equal(actions, played)


# --- members


@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("num_particles", [None, 1])
def test_copies_of_a_state_are_spread_over_the_members(num_particles, batch):
    env = make_env(num_particles=num_particles, deterministic=True)
    state = env.reset(observations(env, *batch))
    before = state.clone()
    copies = env.repeat_state(state, 7)
    assert copies.batch_size == (*batch, 7)
    for name in set(state.keys()) - {"member"}:
        assert torch.equal(copies[name], state[name].unsqueeze(len(batch)).expand_as(copies[name]))
    if num_particles == 1:
        counts = torch.bincount(copies["member"].flatten(), minlength=3)
        assert counts.max() - counts.min() <= 1
        assert env.observation_spec["member"].expand(copies["member"].shape).is_in(copies["member"])
    env.imagine(copies, random_actions(env, *batch, 7, 4))
    assert_same(state, before)


def test_one_particle_goes_the_way_of_its_member_alone():
    env = make_env(num_particles=1, deterministic=True)
    state, actions = env.reset(observations(env, 6)), random_actions(env, 6, 5)
    out = env.imagine(state, actions)
    for e in range(3):
        alone = PredictorEnv(
            IdentityEncoder(3),
            member_alone(env.world_model.dynamics, e),
            env.world_model.reward,
            CONTINUOUS,
            deterministic=True,
        )
        rows = (state["member"] == e).squeeze(-1)
        assert rows.sum() == 2
        own = alone.imagine(alone.reset(state[rows].select("observation")), actions[rows])
        assert_same(out[rows].exclude("member", ("next", "member")), own)


def test_random_model_changes_the_member_of_a_particle_at_every_step():
    env = make_env(num_particles=1, propagation="random_model")
    out = env.imagine(env.reset(observations(env, 900)), random_actions(env, 900, 5))
    member, following = out["member"].squeeze(-1), out["next", "member"].squeeze(-1)
    assert torch.equal(member[:, 1:], following[:, :-1])
    for t in range(5):
        share = torch.bincount(following[:, t], minlength=3) / 900
        torch.testing.assert_close(share, torch.full((3,), 1 / 3), rtol=0, atol=0.06)
        assert (member[:, t] == following[:, t]).float().mean().item() == pytest.approx(
            1 / 3, abs=0.06
        )


@pytest.mark.parametrize("propagation", ["fixed_model", "expectation"])
def test_otherwise_a_particle_keeps_its_member(propagation):
    env = make_env(num_particles=1, propagation=propagation)
    out = env.imagine(env.reset(observations(env, 7)), random_actions(env, 7, 5))
    assert (out["next", "member"] == out["member"][:, :1]).all()


def test_expectation_makes_particles_coincide():
    env = make_env(propagation="expectation")
    latent = env.imagine(env.reset(observations(env, 4)), random_actions(env, 4, 5))[
        "next", "latent"
    ]
    torch.testing.assert_close(latent, latent[..., :1, :1, :].expand_as(latent))


def test_fixed_and_random_model_differ_only_in_who_moves_whom():
    state = None
    spread = {}
    for propagation in ("fixed_model", "random_model"):
        torch.manual_seed(0)
        env = make_env(propagation=propagation, deterministic=True)
        state = env.reset(observations(env, 300)) if state is None else state
        out = env.imagine(state, torch.zeros(300, 1, 2))["next", "latent"]
        spread[propagation] = out.flatten(1, 3).sort(1).values
    # after one step from one state the particles are at the same places, in another order
    torch.testing.assert_close(spread["fixed_model"], spread["random_model"])


def test_one_member_has_no_epistemic_variance():
    env = make_env(n_models=1, particles=1, uncertainty=True)
    out = env.imagine(env.reset(observations(env, 4)), random_actions(env, 4, 5))
    assert (out["next", "epistemic_var"] == 0).all() and (out["next", "aleatoric_var"] > 0).all()


# --- observations and resets


@pytest.mark.parametrize("num_particles", [None, 1])
def test_observation_is_the_first_particles(num_particles):
    env = make_env(num_particles=num_particles)
    out = env.rollout(4, tensordict=env.reset(observations(env, 3)), auto_reset=False)
    assert torch.equal(out["next", "observation"], out["next", "latent"][..., 0, 0, :])
    assert torch.equal(out["observation"], out["latent"][..., 0, 0, :])


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_reset_at_an_observation(batch):
    env = make_env()
    data = observations(env, *batch)
    state = env.reset(data.clone())
    assert_same(state, env.initial_state(data.clone()))
    assert not state["done"].any()


def test_reset_without_anything_draws_latent_states():
    env = make_env(encoder=SplitEncoder(4))
    state = env.reset(TensorDict(batch_size=[2000]))
    latent = state["latent"]
    assert torch.equal(latent, latent[:, :1, :1].expand_as(latent))
    assert latent.mean().abs() < 0.05 and abs(latent.std() - 1) < 0.05
    assert (state["context"] == 0).all() and (state["alive"] == 1).all()


@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("kind", ["tensor", "function"])
def test_reset_at_a_start(kind, batch):
    start = torch.arange(12.0).reshape(4, 3)
    seen = []

    def draw(shape):
        seen.append(shape)
        return start[0].expand(*shape, 3)

    env = make_env(start=start if kind == "tensor" else draw)
    observation = env.reset(TensorDict(batch_size=batch))["observation"]
    assert observation.shape == (*batch, 3)
    rows = {tuple(row) for row in observation.reshape(-1, 3).tolist()}
    assert rows <= {tuple(row) for row in start.tolist()}
    assert kind == "tensor" or seen == [torch.Size(batch)]
    check_env_specs(env)


def test_start_is_drawn_evenly():
    env = make_env(start=torch.arange(4.0)[:, None].expand(4, 3))
    drawn = env.reset(TensorDict(batch_size=[2000]))["observation"][:, 0]
    share = torch.bincount(drawn.long(), minlength=4) / 2000
    torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.05)


@IGNORE_BLIND_STARTS
@pytest.mark.parametrize("start", [None, "tensor"])
def test_an_episode_that_ended_starts_anew_and_the_others_go_on(start):
    env = make_env(
        n_models=1, particles=1, termination="sample", start=start and torch.full((1, 3), 9.0)
    )
    state, seen = env.reset(observations(env, 30)), 0
    for _ in range(10):
        stepped, following = env.step_and_maybe_reset(state.set("action", random_actions(env, 30)))
        over = stepped["next", "done"].squeeze(-1)
        seen += int(over.sum())
        assert not following["done"].any()
        assert (following["alive"][over] == 1).all()
        going = following["latent"][~over], stepped["next", "latent"][~over]
        assert torch.equal(*going)
        assert (following["latent"][over] != stepped["next", "latent"][over]).all()
        if start:
            assert (following["latent"][over] == 9).all()
        assert torch.equal(following["observation"], following["latent"][:, 0, 0])
        state = following
    assert seen > 3


def test_a_partial_reset_does_not_start_at_the_last_observation():
    env = make_env(start=torch.full((1, 3), 9.0))
    state = env.reset(observations(env, 4))
    before, over = state.clone(), torch.tensor([True, False, True, False])
    after = env.reset(state.set("_reset", over.unsqueeze(-1)))
    assert (after["observation"][over] == 9).all() and (after["latent"][over] == 9).all()
    assert torch.equal(after["latent"][~over], before["latent"][~over])


def test_when_all_end_at_once_they_do_not_start_where_they_ended():
    env = make_env(n_models=1, particles=1, termination="sample", start=torch.full((1, 3), 9.0))
    with torch.no_grad():
        env.world_model.dynamics.termination_net.biases[-1].fill_(1e4)
    out = env.rollout(
        4, tensordict=env.reset(observations(env, 3)), auto_reset=False, break_when_any_done=False
    )
    assert out["next", "done"].all() and (out["observation"][:, 1:] == 9).all()


@pytest.mark.parametrize("num_particles", [None, 1])
def test_runs_in_a_collector(num_particles):
    env = make_env(termination="sample", num_particles=num_particles, start=torch.full((1, 3), 9.0))
    collector = Collector(env, frames_per_batch=60, total_frames=120)
    for batch in collector:
        batch = batch.reshape(-1)
        begins = torch.cat([torch.ones(1, 1).bool(), batch["next", "done"][:-1]]).squeeze(-1)
        first = batch["collector", "traj_ids"].diff(prepend=torch.tensor([-1])) != 0
        assert torch.equal(first[1:], begins[1:])
        assert (batch["observation"][first][1:] == 9).all()
        assert (batch["alive"][first][1:] == 1).all()
    collector.shutdown()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_observations_of_another_dtype_are_cast(dtype):
    env = make_env()
    data = observations(env, 3).apply(lambda x: x.to(dtype))
    state = env.reset(data.clone())
    assert env.observation_spec.is_in(state.select(*env.observation_spec.keys()))
    out = env.imagine(env.initial_state(data), random_actions(env, 3, 4))
    assert out["observation"].dtype == out["next", "observation"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_observations_of_any_shape(shape):
    env = make_env(encoder=IdentityEncoder(shape))
    check_env_specs(env)
    out = env.imagine(env.reset(observations(env, 3)), random_actions(env, 3, 4))
    assert out["next", "observation"].shape == (3, 4, *shape)


@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_nested_observation(batch, num_particles):
    key = ("obs", "x")
    env = make_env(
        encoder=IdentityEncoder(3, in_keys=[key]), num_particles=num_particles, deterministic=True
    )
    check_env_specs(env)
    data = observations(env, *batch)
    state = env.initial_state(data.clone())
    assert torch.equal(state[key], data[key])
    assert torch.equal(state["latent"][..., 0, 0, :], data[key])
    state = env.reset(data.clone())
    assert torch.equal(state[key], data[key])
    actions = random_actions(env, *batch, 4)
    out = env.imagine(state, actions)
    assert out[key].shape == out["next", "obs", "x"].shape == (*batch, 4, 3)
    assert_same(out, play(env, state, actions))
    assert env.reset(TensorDict(batch_size=batch))[key].shape == (*batch, 3)


# --- TorchRL around it


def test_in_a_transformed_env():
    env = make_env(deterministic=True, start=torch.zeros(1, 3))
    scaled = TransformedEnv(env, RewardScaling(loc=1.0, scale=2.0)).append_transform(StepCounter(3))
    check_env_specs(scaled)
    data, actions = observations(env, 4), random_actions(env, 4, 3)
    # TransformedEnv hides from `reset` what is not in the state_spec
    assert torch.equal(scaled.reset(data.clone())["observation"], data["observation"])
    out = play(scaled, scaled.reset(data.clone()), actions)
    plain = env.imagine(env.reset(data.clone()), actions)
    torch.testing.assert_close(out["next", "reward"], plain["next", "reward"] * 2 + 1)
    assert out["next", "step_count"][0].flatten().tolist() == [1, 2, 3]
    assert out["next", "truncated"][:, -1].all() and not out["next", "truncated"][:, :-1].any()
    longer = scaled.rollout(
        7, tensordict=scaled.reset(data), auto_reset=False, break_when_any_done=False
    )
    assert longer.batch_size == (4, 7) and longer["step_count"].max() == 2


@pytest.mark.parametrize("termination", ["soft", "sample"])
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_torchrls_cem_planner_runs_on_it(batch, num_particles, termination):
    start = torch.zeros(1, 3)  # it plans on, behind the end of an episode
    env = make_env(num_particles=num_particles, termination=termination, start=start)
    planner = CEMPlanner(env, planning_horizon=3, optim_steps=2, num_candidates=6, top_k=2)
    out = TensorDictSequential(env.initial_state, planner)(observations(env, *batch))
    assert out["action"].shape == (*batch, 2) and env.action_spec.is_in(out["action"])


def test_torchrls_cem_planner_finds_the_better_action():
    class ActionReward(nn.Module):
        def forward(self, latent, context, action):
            return -(action - torch.tensor([0.5, -0.5])).square().sum(-1, keepdim=True)

    env = make_env()
    env = PredictorEnv(IdentityEncoder(3), env.world_model.dynamics, ActionReward(), CONTINUOUS)
    planner = CEMPlanner(env, planning_horizon=1, optim_steps=8, num_candidates=60, top_k=6)
    out = TensorDictSequential(env.initial_state, planner)(observations(env, 3))
    expected = torch.tensor([0.5, -0.5]).expand(3, 2)
    torch.testing.assert_close(out["action"], expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_torchrls_mppi_planner_runs_on_it(batch):
    env = make_env()
    value = TensorDictModule(
        lambda latent: latent.mean((-3, -2)).sum(-1, keepdim=True), ["latent"], ["state_value"]
    )
    advantage = TDLambdaEstimator(gamma=0.99, lmbda=0.95, value_network=value)
    planner = MPPIPlanner(
        env, advantage, 1.0, planning_horizon=3, optim_steps=2, num_candidates=6, top_k=2
    )
    out = TensorDictSequential(env.initial_state, planner)(observations(env, *batch))
    assert out["action"].shape == (*batch, 2) and torch.isfinite(out["action"]).all()


# --- gradients


@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("propagation", ["fixed_model", "random_model", "expectation"])
def test_gradient_flows_through_imagine_to_actions_and_parts(propagation, num_particles):
    env = make_env(propagation=propagation, num_particles=num_particles)
    actions = random_actions(env, 6, 4).requires_grad_()
    env.imagine(env.reset(observations(env, 6)), actions)["next", "reward"].sum().backward()
    assert torch.isfinite(actions.grad).all() and (actions.grad != 0).all()
    for parameter in env.world_model.parameters():
        assert torch.isfinite(parameter.grad).all() and (parameter.grad != 0).any()


def test_without_gradient_nothing_is_kept_for_it():
    env = make_env()
    with torch.no_grad():
        out = env.imagine(env.reset(observations(env, 4)), random_actions(env, 4, 5))
    assert not any(x.requires_grad for x in out.values(True, True))


# --- errors


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"encoder": 4}, "encoder has 4 latent dims, dynamics 3"),
        ({"encoder": SplitEncoder(4)}, "encoder has 1 context dims, dynamics 0"),
        ({"action_spec": Bounded(-1, 1, (3,))}, "action_spec has 3 action dims, dynamics 2"),
        ({"action_spec": Bounded(-1, 1, (5, 2))}, r"without batch dims, got shape \[5, 2\]"),
        ({"action_spec": Categorical(2, shape=(2,))}, r"without batch dims, got shape \[2\]"),
        ({"action_spec": OneHot(2, shape=(5, 2))}, r"without batch dims, got shape \[5, 2\]"),
        ({"num_particles": 0}, "num_particles must be in 1..2 or a multiple of the 3 members"),
        ({"num_particles": 4}, "num_particles must be .* got 4"),
        ({"termination": "hard"}, r"termination must be one of \('soft', 'sample'\), got 'hard'"),
        ({"propagation": "mean"}, "propagation must be one of .* got 'mean'"),
        ({"start": torch.zeros(5, 2)}, r"start must hold observations \[N, 3\].* got \[5, 2\]"),
        ({"start": torch.zeros(3)}, r"start must hold observations \[N, 3\].* got \[3\]"),
        ({"start": torch.zeros(0, 3)}, "start must hold .* at least one"),
    ],
)
def test_construction_errors(parts, message):
    encoder = parts.pop("encoder", 3) if "encoder" in parts else 3
    encoder = IdentityEncoder(encoder) if isinstance(encoder, int) else encoder
    action_spec = parts.get("action_spec", CONTINUOUS)
    options = {key: x for key, x in parts.items() if key != "action_spec"}
    with pytest.raises(ValueError, match=message):
        PredictorEnv(encoder, random_ensemble(3), RewardNet(3, 0, 2), action_spec, **options)


def test_unknown_action_space():
    with pytest.raises(TypeError, match=r"action_spec: expected .* \(pass one of its entries\)"):
        PredictorEnv(IdentityEncoder(3), random_ensemble(3), None, Composite(action=CONTINUOUS))


@pytest.mark.parametrize(
    "shape", [(4, 5, 1), (4, 5), (1, 5, 2), (5, 2), (4, 5, 3), (4, 2), (2, 4, 5, 2)]
)
def test_imagined_actions_do_not_broadcast(shape):
    env = make_env()
    state = env.reset(observations(env, 4))
    with pytest.raises(ValueError, match=r"actions: expected shape \[4, H, 2\], got"):
        env.imagine(state, torch.zeros(shape))


@pytest.mark.parametrize("with_reward", [False, True])
def test_an_action_of_too_few_dims_is_not_broadcast(with_reward):
    env = make_env(with_reward=with_reward)
    state = env.reset(observations(env, 4))
    with pytest.raises(ValueError, match=r"action: expected shape \[4.*2\].* got \[4.*1\]"):
        env.step(state.set("action", torch.zeros(4, 1)))


def test_a_step_without_action():
    env = make_env()
    with pytest.raises(KeyError, match=r'"action" not found .*alive'):
        env.step(env.reset(observations(env, 4)))


@pytest.mark.parametrize("name", ["latent", "context", "alive", "member"])
def test_missing_part_of_a_state(name):
    env = make_env(num_particles=1)
    state = env.reset(observations(env, 4)).exclude(name)
    with pytest.raises(KeyError, match=rf"no entry \['{name}'\]; there is .*observation"):
        env.imagine(state, random_actions(env, 4, 5))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("latent", (4, 3), r"\[3, 2, 3\], got \[3\]"),
        ("latent", (4, 1, 1, 3), r"\[3, 2, 3\], got \[1, 1, 3\]"),
        ("latent", (4, 3, 2, 1), r"\[3, 2, 3\], got \[3, 2, 1\]"),
        ("alive", (4, 1), r"\[3, 2, 1\], got \[1\]"),
        ("context", (4, 1), r"\[0\], got \[1\]"),
    ],
)
def test_a_state_of_another_shape_is_not_broadcast(name, shape, expected):
    env = make_env()
    state = env.reset(observations(env, 4)).set(name, torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"{name}: expected trailing shape {expected}"):
        env.imagine(state, random_actions(env, 4, 5))


def test_start_of_another_shape_than_the_observation():
    env = make_env(start=lambda shape: torch.zeros(*shape, 2))
    with pytest.raises(ValueError, match=r"start must return observations \[4, 3\].*got \[4, 2\]"):
        env.reset(TensorDict(batch_size=[4]))


def test_a_plain_reward_of_another_shape_is_not_broadcast():
    class Squeezed(nn.Module):
        def forward(self, latent, context, action):
            return latent.sum(-1)

    env = PredictorEnv(IdentityEncoder(3), random_ensemble(3, n_models=1), Squeezed(), CONTINUOUS)
    state = env.reset(observations(env, 4))
    with pytest.raises(ValueError, match=r"must return \[..., 1\]"):
        env.imagine(state, random_actions(env, 4, 5))


# --- state


def test_state_dict_round_trip():
    torch.manual_seed(1)
    env = make_env(deterministic=True)
    other = make_env(deterministic=True)
    state, actions = env.reset(observations(env, 4)), random_actions(env, 4, 5)
    expected = env.imagine(state, actions)
    assert not torch.equal(
        other.imagine(state, actions)["next", "latent"], expected["next", "latent"]
    )
    other.load_state_dict(env.state_dict())
    assert_same(other.imagine(state, actions), expected)


def test_it_follows_the_model_as_it_learns():
    env = make_env(deterministic=True)
    state, actions = env.reset(observations(env, 4)), random_actions(env, 4, 5)
    before = env.imagine(state, actions)["next", "latent"]
    with torch.no_grad():
        for parameter in env.world_model.dynamics.parameters():
            parameter.add_(0.1)
    assert not torch.equal(env.imagine(state, actions)["next", "latent"], before)


def test_an_unbounded_action_spec():
    check_env_specs(make_env(Unbounded((2,))))


def test_follows_to_another_device():
    env = make_env(num_particles=1, uncertainty=True, start=torch.zeros(5, 3)).to("meta")
    assert env.device.type == "meta"
    specs = env.observation_spec, env.action_spec, env.reward_spec, env.full_done_spec
    assert all(spec.device.type == "meta" for spec in specs)
    assert all(p.is_meta for p in env.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("num_particles", [None, 1])
def test_follows_to_the_gpu(num_particles):
    env = make_env(num_particles=num_particles, deterministic=True, start=torch.zeros(5, 3))
    state, actions = env.reset(observations(env, 4)), random_actions(env, 4, 5)
    expected = env.imagine(state, actions)
    env = env.to("cuda")
    check_env_specs(env)
    out = env.imagine(state.to("cuda"), actions.cuda())
    assert out["next", "latent"].is_cuda
    torch.testing.assert_close(
        out["next", "reward"].cpu(), expected["next", "reward"], rtol=1e-3, atol=1e-3
    )


def test_latent_context_and_action_are_called_what_the_parts_call_them():
    names = [("agent", "latent"), ("agent", "context"), ("agent", "action")]
    encoder = SplitEncoder(3, in_keys=[("agent", "observation")], out_keys=names[:2])
    model = random_ensemble(2, 1, 2, in_keys=names)
    reward = RewardNet(2, 1, 2, in_keys=names)
    env = PredictorEnv(encoder, model, reward, CONTINUOUS)
    check_env_specs(env)
    start = TensorDict({("agent", "observation"): torch.randn(5, 3)}, batch_size=[5])
    state, actions = env.initial_state(start), torch.rand(5, 4, 2)
    out = env.imagine(state, actions)
    assert out["agent", "latent"].shape == (5, 4, 3, 1, 2)
    assert out["next", "agent", "context"].shape == (5, 4, 1)
    torch.testing.assert_close(out["agent", "action"], actions)
    value = ValueNet(2, 1, in_keys=names[:2])
    options = {"planning_horizon": 3, "optim_steps": 1, "num_candidates": 8, "top_k": 2}
    planner = CrossEntropyPlanner(env, terminal_value=value, gamma=0.99, **options)
    assert planner(state)["agent", "action"].shape == (5, 2)


# --- functions of the user's own


def test_a_reward_of_the_next_latent_state():
    reads = ["latent", ("next", "latent")]
    progress = TensorDictModule(lambda x, y: (y - x).sum(-1, keepdim=True), reads, ["reward"])
    env = make_env(with_reward=False, deterministic=True)
    env = PredictorEnv(
        env.initial_state.encoder,
        env.world_model.dynamics,
        progress,
        CONTINUOUS,
        deterministic=True,
    )
    start = env.initial_state(observations(env, 4))
    actions = random_actions(env, 4, 5)
    out = env.imagine(start, actions)
    expected = (out["next", "latent"] - out["latent"]).sum(-1, keepdim=True)
    torch.testing.assert_close(out["next", "particle_reward"], expected)
    step = env.step(start.set("action", actions[:, 0]))
    torch.testing.assert_close(step["next", "particle_reward"], expected[:, 0])


def test_termination_fn_under_every_way_of_stepping():
    def far(latent, context, action, next_latent):
        return next_latent.square().sum(-1, keepdim=True) > 4

    env = make_env(termination_fn=far)
    start = env.initial_state(observations(env, 6))
    actions = random_actions(env, 6, 5)
    torch.manual_seed(0)
    out = env.imagine(start, actions)
    over = (out["next", "latent"].square().sum(-1, keepdim=True) > 4).float()
    torch.testing.assert_close(out["next", "term_prob"], over)
    torch.testing.assert_close(out["next", "alive"], (1 - over).cumprod(1))
    assert 0 < over.mean() < 1


@pytest.mark.parametrize("values", [(-5.0, 0.5), (0.5, 3.0), (0.5, float("nan"))])
def test_termination_fn_that_gives_no_probabilities(values):
    def wrong(latent, context, action, next_latent):
        return torch.where(latent[..., :1] > 0, *torch.tensor(values))

    env = make_env(termination_fn=wrong)
    start = env.initial_state(observations(env, 50))
    with pytest.raises(ValueError, match="termination_fn: expected probabilities or bools"):
        env.imagine(start, random_actions(env, 50, 2))


@pytest.mark.parametrize("num_particles", [None, 1])
def test_reset_keeps_an_imagined_state_that_it_is_given(num_particles):
    """With an encoder that cannot decode, `rollout(tensordict=start)` began somewhere else."""
    env = make_env(encoder=SplitEncoder(4), num_particles=num_particles)
    start = env.initial_state(observations(env, 3)).exclude("observation")
    start["alive"] = torch.rand_like(start["alive"])
    out = env.reset(start.clone())
    for key in env.state_spec.keys(True, True):
        torch.testing.assert_close(out[key], start[key])
    rollout = env.rollout(2, tensordict=start)
    torch.testing.assert_close(rollout["latent"][:, 0], start["latent"])


# --- found by a user


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"start": np.zeros((5, 3))}, "start: expected a tensor of obs.* got numpy.ndarray"),
        ({"action_spec": gymnasium.spaces.Box(-1, 1, (2,))}, "action_spec: .*TensorSpec.*got gym"),
        ({"action_spec": 2}, "action_spec: expected a torchrl TensorSpec, .* got builtins.int"),
        ({"reward": "x"}, "reward: expected a module or a function .* got 'x'"),
        ({"termination_fn": 3}, "termination_fn: expected a module or a function .* got 3"),
        ({"reward": ValueNet(3, 0)}, "reward: expected a reward, got a ValueNet"),
    ],
)
def test_parts_of_an_unknown_kind_are_named_at_construction(parts, message):
    parts = {"reward": None, "action_spec": CONTINUOUS} | parts
    with pytest.raises(TypeError, match=message):
        PredictorEnv(encoder=IdentityEncoder(3), dynamics=random_ensemble(3), **parts)


@pytest.mark.parametrize("start", [lambda shape: torch.zeros(*shape, 2), lambda shape: 0.0])
def test_a_start_function_that_returns_something_else_is_named(start):
    env = make_env(start=start)
    with pytest.raises(ValueError, match=r"start must return observations \[4, 3\] .*, got"):
        env.reset(TensorDict(batch_size=[4]))


@pytest.mark.parametrize(
    ("name", "trailing"), [("one-hot", (4,)), ("categorical", ()), ("categorical-1", (1,))]
)
def test_own_functions_get_discrete_actions_as_documented(name, trailing):
    seen = []

    def reward(latent, context, action):
        seen.append(action.shape)
        return latent[..., :1]

    def over(latent, context, action, next_latent):
        seen.append(action.shape)
        return latent[..., :1] > 0

    spec = ACTION_SPECS[name]
    env = PredictorEnv(
        IdentityEncoder(3),
        random_ensemble(3, 0, spec, n_particles_per_model=2),
        reward,
        spec,
        termination_fn=over,
    )
    env.rollout(2, tensordict=env.reset(observations(env, 5)), auto_reset=False)
    assert set(seen) == {(5, 3, 2, *trailing)}


@pytest.mark.parametrize("name", ["reward", "termination_fn"])
@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda latent, *others: latent.sum(-1), ValueError),
        (lambda latent, *others: 1.0, TypeError),
    ],
)
def test_own_functions_are_called_what_they_were_handed_in_as(name, function, error):
    parts = {"reward": None, "termination_fn": None} | {name: function}
    env = PredictorEnv(IdentityEncoder(3), random_ensemble(3), action_spec=CONTINUOUS, **parts)
    state = env.reset(observations(env, 4))
    with pytest.raises(error, match=rf"^{name} must return"):
        env.imagine(state, random_actions(env, 4, 2))
