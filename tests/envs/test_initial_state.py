"""Initial states: every particle at the encoded observation; members and starts drawn evenly."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import GymEnv, RewardScaling, TransformedEnv
from torchrl.envs.utils import check_env_specs

from layeredrl_trl.envs import spread_members
from layeredrl_trl.envs.imagined_specs import Entry
from layeredrl_trl.envs.initial_state import blank_state, draw_start
from layeredrl_trl.modules import IdentityEncoder, MLPEncoder
from tests.envs.imagined import BATCH_SHAPES, SplitEncoder, make_env, observations, random_actions
from tests.small_predictors import LearnedEncoder, small_predictor

CPU = torch.device("cpu")
ENCODERS = {
    "identity": lambda: IdentityEncoder(3),
    "of another name": lambda: SplitEncoder(4, in_keys=["pixels"], out_keys=["z", "c"]),
    "of an image": lambda: MLPEncoder((2, 3), 3, 1),
}


# --- the module


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_every_particle_starts_at_the_encoded_observation(batch):
    env = make_env(encoder=SplitEncoder(4))
    data = observations(env, *batch)
    state = env.initial_state(data.clone())
    expected = data["observation"][..., None, None, :3].expand(*batch, 3, 2, 3)
    assert torch.equal(state["latent"], expected)
    assert torch.equal(state["context"], data["observation"][..., 3:])
    assert (state["alive"] == 1).all()
    assert set(env.initial_state.out_keys) == set(env.observation_spec.keys())


@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_entry_that_an_env_reads_is_written(encoder, num_particles, batch):
    encoder = ENCODERS[encoder]()
    latent_key, context_key = encoder.out_keys
    names = {"in_keys": [latent_key, context_key, "action"]}
    env = make_env(encoder=encoder, num_particles=num_particles, model_options=names)
    data = observations(env, *batch)
    (observation,) = data.values()
    before = observation.clone()
    state = env.initial_state(data.clone().apply(torch.Tensor.double))
    specs = env.observation_spec.expand(*batch)
    for key, spec in specs.items():
        assert state[key].shape == spec.shape, key
        if key not in encoder.in_keys:
            assert state[key].dtype == spec.dtype, key
    latent, context = encoder.encode(observation)
    torch.testing.assert_close(
        state[latent_key], latent[..., None, None, :].expand_as(state[latent_key])
    )
    torch.testing.assert_close(state[context_key], context)
    assert ("member" in state.keys()) is (num_particles == 1)
    assert torch.equal(observation, before)


def test_the_latent_of_an_initial_state_can_be_written_to():
    env = make_env()
    state = env.initial_state(observations(env, 4))
    other = state["latent"][:, 1].clone()
    state["latent"][:, 0] += 1.0
    assert torch.equal(state["latent"][:, 1], other)


def test_gradient_reaches_the_encoder():
    env = make_env(encoder=LearnedEncoder())
    state = env.initial_state(observations(env, 4))
    (state["latent"].square().sum() + state["context"].square().sum()).backward()
    assert all((p.grad != 0).any() for p in env.initial_state.encoder.parameters())


def test_initial_state_without_observation():
    env = make_env()
    with pytest.raises(KeyError, match=r"reads \['observation'\], .* only \['pixels'\]"):
        env.initial_state(TensorDict(pixels=torch.zeros(4, 3), batch_size=[4]))


@pytest.mark.parametrize("batch", [(), (4, 1)])
def test_initial_state_of_another_batch_size(batch):
    env = make_env()
    data = TensorDict(observation=torch.zeros(4, 1, 2, 3), batch_size=batch)
    with pytest.raises(ValueError, match=r"observation: expected the batch size"):
        env.initial_state(data)


# --- blank states


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_a_blank_state_is_alive_and_all_else_is_zero(batch):
    entries = {
        "alive": Entry(torch.Size([3, 2, 1]), torch.float32),
        "member": Entry(torch.Size([1]), torch.long),
        ("deep", "flag"): Entry(torch.Size([1]), torch.bool),
        "reward": Entry(torch.Size([3]), torch.float64),
    }
    state = blank_state(entries, torch.Size(batch), 3, CPU)
    assert state.keys() == entries.keys()
    for key, (shape, dtype) in entries.items():
        assert state[key].shape == (*batch, *shape) and state[key].dtype == dtype
    assert (state["alive"] == 1).all()
    assert not state["deep", "flag"].any() and (state["reward"] == 0).all()
    assert ((state["member"] >= 0) & (state["member"] < 3)).all()


# --- members


@pytest.mark.parametrize("batch", [(1,), (3,), (7,), (2, 5), (3, 4)])
def test_members_are_spread_evenly_over_a_batch(batch):
    member = spread_members(torch.Size(batch), 3, CPU)
    assert member.shape == (*batch, 1) and member.dtype == torch.long
    counts = torch.bincount(member.flatten(), minlength=3)
    assert counts.max() - counts.min() <= 1


def test_a_single_env_may_get_any_member():
    members = [spread_members(torch.Size(()), 3, CPU).item() for _ in range(60)]
    assert set(members) == {0, 1, 2}


# --- starts


@pytest.mark.parametrize("batch", BATCH_SHAPES)
@pytest.mark.parametrize("obs_shape", [(3,), (2, 3)])
def test_observations_to_start_from_are_drawn_evenly(obs_shape, batch):
    start = torch.randn(4, *obs_shape)
    drawn = draw_start(start, torch.Size([500, *batch]), torch.Size(obs_shape))
    assert drawn.shape == (500, *batch, *obs_shape)
    rows = drawn.reshape(-1, 1, start[0].numel()) == start.reshape(4, -1)
    share = rows.all(-1).float().mean(0)
    torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.08)


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_a_start_function_is_asked_for_a_batch_shape(batch):
    batch, seen = torch.Size(batch), []

    def start(shape):
        seen.append(shape)
        return torch.ones(*shape, 3)

    assert torch.equal(draw_start(start, batch, torch.Size([3])), torch.ones(*batch, 3))
    assert seen == [batch]


@pytest.mark.parametrize(
    ("start", "got"),
    [(lambda shape: torch.zeros(*shape, 2), r"\[4, 2\]"), (lambda _: 0.0, "float")],
)
def test_a_start_function_that_returns_something_else(start, got):
    with pytest.raises(ValueError, match=rf"start must return observations \[4, 3\] .*, got {got}"):
        draw_start(start, torch.Size([4]), torch.Size([3]))


# --- flags at the root


FLAGS = {"done", "terminated", "truncated"}


@pytest.mark.parametrize("termination", ["soft", "sample"])
@pytest.mark.parametrize("start_from", ["initial_state", "reset", "flags of its own"])
@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("way", ["imagine", "rollout", "on and on"])
def test_a_rollout_has_the_flags_that_one_of_a_real_env_has(
    way, transformed, start_from, termination
):
    """From `env.initial_state` on, `rollout` gave none at the root, and `imagine` all of them."""
    real = GymEnv("Pendulum-v1").rollout(3)
    assert set(real.keys()) >= FLAGS and set(real["next"].keys()) >= FLAGS
    env = make_env(termination=termination, start=torch.zeros(1, 3))
    make = env.reset if start_from == "reset" else env.initial_state
    start = make(observations(env, 4))
    if start_from == "flags of its own":
        start = start.exclude("terminated", "truncated")
        start = env.initial_state(start.set("done", torch.zeros(4, 1).bool()))
    rolled = TransformedEnv(env, RewardScaling(0.0, 2.0)) if transformed else env
    if way == "imagine":
        out = env.imagine(start, random_actions(env, 4, 3))
    else:
        goes_on = way == "on and on"
        out = rolled.rollout(
            3, tensordict=start.clone(), auto_reset=False, break_when_any_done=not goes_on
        )
    for flags in (out, out["next"]):
        for key in FLAGS:
            assert flags[key].shape == (*out.batch_size, 1) and flags[key].dtype == torch.bool
    for key in FLAGS:
        assert torch.equal(out[key][:, 0], start[key])
    if way != "on and on":
        assert torch.equal(out["done"][:, 1:], out["next", "done"][:, :-1])


@pytest.mark.parametrize("set_truncated", [False, True])
def test_rollouts_of_predictors_have_flags_at_the_root(set_truncated):
    out, _ = small_predictor().rollout(
        torch.randn(4, 3), torch.randn(4, 3, 1), set_truncated=set_truncated
    )
    for key in FLAGS:
        assert out[key].shape == out["next", key].shape == (4, 3, 1) and not out[key].any()


def test_flags_of_a_real_env_stay():
    env = make_env()
    data = observations(env, 2).set("done", torch.tensor([[True], [False]]))
    state = env.initial_state(data)
    assert state["done"].flatten().tolist() == [True, False] and not state["truncated"].any()


# --- starts that no real env has


def test_an_automatic_reset_to_latents_of_no_observation_warns_once():
    """They went into the user's replay buffer without a word."""
    env = make_env(n_models=1, particles=1, termination="sample")
    start = env.initial_state(observations(env, 30))
    options = {"auto_reset": False, "break_when_any_done": False}
    with pytest.warns(UserWarning, match="Pass start: observations to begin at") as seen:
        out = env.rollout(10, tensordict=start.clone(), **options)
        env.rollout(10, tensordict=start.clone(), **options)
    assert out["next", "done"].any() and len(seen) == 1
    with pytest.warns(UserWarning, match="Pass start"):  # of each env
        make_env(n_models=1, termination="sample").rollout(50, break_when_any_done=False)


def test_no_warning_where_the_user_asks_for_a_start_or_gives_some():
    for options in ({}, {"encoder": SplitEncoder(4)}, {"num_particles": 1}):
        env = make_env(termination="sample", **options)
        env.reset()
        env.reset(TensorDict(batch_size=[4]))
        env.rollout(7)
        check_env_specs(env)
        TransformedEnv(env, RewardScaling(0.0, 1.0)).rollout(7)
    env = make_env(n_models=1, particles=1, termination="sample", start=torch.zeros(1, 3))
    assert env.rollout(50, break_when_any_done=False)["next", "done"].any()
