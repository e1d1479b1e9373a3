"""DisagreementBonus and PessimismPenalty: on real envs, on imagined ones, on buffers."""

import copy
import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import (
    Bounded,
    LazyTensorStorage,
    ListStorage,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import (
    ActionScaling,
    Compose,
    DoubleToFloat,
    GymEnv,
    RewardClipping,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs

from layeredrl_trl import DisagreementBonus, PessimismPenalty, PredictorEnv, TransitionSliceSampler
from layeredrl_trl.functional import disagreement
from layeredrl_trl.modules import IdentityEncoder, ProbabilisticEnsemble, SelectEncoder
from layeredrl_trl.planners import CrossEntropyPlanner
from layeredrl_trl.planners.scoring import CandidateReturn
from tests.envs.imagined import ACTION_SPECS, BATCH_SHAPES, CONTINUOUS
from tests.oracles import member_prediction, random_ensemble, random_reward
from tests.problems import LinearGaussian

KINDS = [DisagreementBonus, PessimismPenalty]
SCALE = 0.3


def make_parts(action_spec=CONTINUOUS, obs_dim=3, **options):
    """An encoder that leaves one dim to the context, and an ensemble."""
    encoder = SelectEncoder(obs_dim, range(obs_dim - 1), [obs_dim - 1])
    options = {"n_modes": 2, "condition_on_context": True, **options}
    return {
        "encoder": encoder,
        "dynamics": random_ensemble(obs_dim - 1, 1, action_spec, **options),
    }


def imagined_env(action_spec=CONTINUOUS, *, n_models=3, particles=2, uncertainty=True, **options):
    parts = make_parts(action_spec, n_models=n_models, n_particles_per_model=particles)
    reward = random_reward(parts["dynamics"])
    return PredictorEnv(
        parts["encoder"], parts["dynamics"], reward, action_spec, uncertainty=uncertainty, **options
    )


def real_env(categorical=False, discrete=False):
    if discrete:
        return GymEnv("CartPole-v1", categorical_action_encoding=categorical)
    return GymEnv("Pendulum-v1")


def real_parts(env, **options):
    spec = env.action_spec_unbatched
    return make_parts(spec, env.observation_spec_unbatched["observation"].shape[-1], **options)


def transitions(*batch, action_spec=CONTINUOUS, obs_dim=3):
    """Real transitions ``[*batch]``; each is an episode of its own."""
    over = torch.ones(*batch, 1).bool()
    following = {
        "observation": torch.randn(*batch, obs_dim),
        "reward": torch.randn(*batch, 1),
        "terminated": over,
        "truncated": ~over,
        "done": over,
    }
    data = {
        "observation": torch.randn(*batch, obs_dim),
        "action": action_spec.expand(*batch, *action_spec.shape).rand(),
    }
    return TensorDict({**data, "next": following}, batch_size=batch)


def disagreement_of(parts, observation, action):
    """How far members are from each other on one transition, one number after the other."""
    model, dims = parts["dynamics"], range(parts["dynamics"].latent_state_dim)
    latent, context = observation[:-1], observation[-1:]
    action = (
        action.squeeze(-1) if action.shape == (1,) and not action.is_floating_point() else action
    )
    means = []
    for e in range(model.n_models):
        mean, _, weights, _ = member_prediction(model, e, latent, context, action)
        means.append(
            [float(sum(w * m[d] for w, m in zip(weights, mean, strict=True))) for d in dims]
        )
    variance = []
    for d in dims:
        middle = math.fsum(mean[d] for mean in means) / len(means)
        variance.append(math.fsum((mean[d] - middle) ** 2 for mean in means) / len(means))
    return math.sqrt(math.fsum(variance) / len(variance))


def assert_like_oracle(parts, changed, raw_reward, sign, scale=SCALE):
    """``changed`` and ``raw_reward`` of transitions with any batch shape."""
    flat, raw = changed.reshape(-1), raw_reward.flatten().tolist()
    for i, step in enumerate(flat.unbind(0)):
        expected = disagreement_of(parts, step["observation"], step["action"])
        assert step["next", "disagreement"].item() == pytest.approx(expected, rel=1e-3)
        reward = raw[i] + sign * scale * expected
        assert step["next", "reward"].item() == pytest.approx(reward, rel=1e-3, abs=1e-4)


# --- contract


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_particles", [None, 1])
@pytest.mark.parametrize("action_spec", ACTION_SPECS.values(), ids=ACTION_SPECS)
def test_specs_of_an_imagined_env(action_spec, num_particles, kind):
    env = TransformedEnv(imagined_env(action_spec, num_particles=num_particles), kind(SCALE))
    check_env_specs(env)
    assert env.observation_spec["disagreement"] == Unbounded((1,))
    assert env.reward_spec == Unbounded((1,))


REAL_ENVS = {
    "continuous": real_env,
    "one-hot": lambda: real_env(discrete=True),
    "categorical": lambda: real_env(discrete=True, categorical=True),
    "serial": lambda: SerialEnv(2, real_env),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", REAL_ENVS.values(), ids=REAL_ENVS)
def test_specs_of_a_real_env(make, kind):
    env = make()
    transforms = Compose(DoubleToFloat(), RewardClipping(-1.0, 1.0), kind(SCALE, **real_parts(env)))
    env = TransformedEnv(env, transforms)
    check_env_specs(env)
    assert env.observation_spec["disagreement"].shape == (*env.batch_size, 1)
    assert env.reward_spec == Unbounded((*env.batch_size, 1))
    assert (env.rollout(5)["next", "disagreement"] > 0).all()


def test_specs_inside_a_batched_env():
    parts = real_parts(real_env())
    env = SerialEnv(2, lambda: TransformedEnv(real_env(), DisagreementBonus(SCALE, **parts)))
    check_env_specs(env)
    assert env.rollout(3)["next", "disagreement"].shape == (2, 3, 1)


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_after_a_reset_there_is_none(batch):
    env = TransformedEnv(imagined_env(), DisagreementBonus(SCALE))
    state = env.reset(TensorDict(batch_size=batch))
    assert torch.equal(state["disagreement"], torch.zeros(*batch, 1))


# --- oracle


@pytest.mark.parametrize("n_models", [1, 4])
def test_disagreement(n_models):
    means = torch.randn(2, 3, n_models, 5)
    variance = means.var(-2, correction=0)
    expected = ((means - means.mean(-2, keepdim=True)) ** 2).mean((-2, -1), keepdim=True).sqrt()
    torch.testing.assert_close(disagreement(variance), expected.squeeze(-1))


@pytest.mark.parametrize(("kind", "sign"), [(DisagreementBonus, 1), (PessimismPenalty, -1)])
@pytest.mark.parametrize("action_spec", ACTION_SPECS.values(), ids=ACTION_SPECS)
@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_on_transitions(batch, action_spec, kind, sign):
    parts, data = make_parts(action_spec), transitions(*batch, action_spec=action_spec)
    changed = kind(SCALE, **parts)(data)
    assert changed["next", "disagreement"].shape == (*batch, 1)
    assert_like_oracle(parts, changed, data["next", "reward"], sign)


@pytest.mark.parametrize(("kind", "sign"), [(DisagreementBonus, 1), (PessimismPenalty, -1)])
@pytest.mark.parametrize("make", REAL_ENVS.values(), ids=REAL_ENVS)
def test_in_a_real_env(make, kind, sign):
    env = make()
    parts = real_parts(env)
    plain = TransformedEnv(env, DoubleToFloat())
    changed = TransformedEnv(make(), Compose(DoubleToFloat(), kind(SCALE, **parts)))
    runs = []
    for one in (plain, changed):
        one.set_seed(0)
        torch.manual_seed(0)
        runs.append(one.rollout(6))
    assert torch.equal(runs[0]["observation"], runs[1]["observation"])
    assert_like_oracle(parts, runs[1], runs[0]["next", "reward"], sign)


@pytest.mark.parametrize(("kind", "sign"), [(DisagreementBonus, 1), (PessimismPenalty, -1)])
@pytest.mark.parametrize("num_particles", [None, 1, 6])
@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_in_an_imagined_env(batch, num_particles, kind, sign):
    env = imagined_env(num_particles=num_particles, deterministic=True)
    parts = {"encoder": env.initial_state.encoder, "dynamics": env.world_model.dynamics}
    state = env.reset(TensorDict({"observation": torch.randn(*batch, 3)}, batch_size=batch))
    state["action"] = env.action_spec.expand(*batch, 2).rand()
    state["alive"] = torch.rand_like(state["alive"])  # uneven, and some are dead
    state["alive"][..., 0, 0, 0] = 0.0
    raw = env.step(state.clone())
    out = TransformedEnv(env, kind(SCALE)).step(state.clone())
    flat = TensorDict({"raw": raw, "out": out}, batch_size=batch).reshape(-1)
    for step in flat.unbind(0):
        alive = step["out", "alive"].flatten().tolist()
        expected = disagreement_of(parts, step["out", "observation"], step["out", "action"])
        expected *= math.fsum(alive) / len(alive)
        assert step["out", "next", "disagreement"].item() == pytest.approx(expected, rel=1e-3)
        reward = step["raw", "next", "reward"].item() + sign * SCALE * expected
        assert step["out", "next", "reward"].item() == pytest.approx(reward, rel=1e-3, abs=1e-4)


def test_the_dead_earn_nothing():
    env = TransformedEnv(imagined_env(termination="soft"), DisagreementBonus(1.0))
    with torch.no_grad():
        env.world_model.dynamics.termination_net.biases[-1].fill_(1e4)  # the first step is the last
    start = env.reset(TensorDict(batch_size=[4]))
    out = env.rollout(3, tensordict=start, auto_reset=False)
    earned = out["next", "disagreement"]
    assert (earned[:, 0] > 0).all() and (earned[:, 1:] == 0).all()
    assert (out["next", "epistemic_var"] > 0).any(-1).all()
    assert (out["next", "reward"][:, 1:] == 0).all()


@pytest.mark.parametrize("storage", [LazyTensorStorage, ListStorage])
@pytest.mark.parametrize("given", ["appended", "at construction"])
def test_on_samples_of_a_buffer(given, storage):
    parts, data = make_parts(), transitions(10)
    transform = PessimismPenalty(SCALE, **parts)
    options = {"transform": transform} if given == "at construction" else {}
    buffer = TensorDictReplayBuffer(storage=storage(10), batch_size=7, **options)
    if given == "appended":
        buffer.append_transform(transform)
    buffer.extend(data.clone())
    for sample in (buffer.sample(), buffer.sample(), buffer[:], buffer[torch.tensor([3, 1])]):
        rows = (sample["observation"][:, None] == data["observation"]).all(-1).int().argmax(1)
        assert_like_oracle(parts, sample, data["next", "reward"][rows], sign=-1)
    stored = buffer.storage[:]
    stored = stored if isinstance(stored, TensorDict) else torch.stack(list(stored))
    assert torch.equal(stored["next", "reward"], data["next", "reward"])
    assert not any("disagreement" in str(name) for name in stored.keys(True))


def test_a_buffer_of_imagined_data_holds_what_is_needed():
    env = imagined_env()
    out = env.imagine(env.reset(TensorDict(batch_size=[4])), torch.rand(4, 5, 2))
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=20)
    buffer.extend(out.reshape(-1))
    buffer.append_transform(DisagreementBonus(SCALE))
    sample = buffer.sample()
    spread = sample["next", "epistemic_var"].mean(-1, keepdim=True).sqrt()
    expected = sample["alive"].mean((1, 2)) * spread
    torch.testing.assert_close(sample["next", "disagreement"], expected)


@pytest.mark.parametrize("in_front", [True, False])
def test_the_action_is_the_one_that_comes_to_the_transform(in_front):
    scaling = ActionScaling(loc=0.0, scale=2.0, standard_normal=False)
    parts = real_parts(real_env())
    bonus = DisagreementBonus(SCALE, **parts)
    transforms = (
        [DoubleToFloat(), scaling, bonus] if in_front else [DoubleToFloat(), bonus, scaling]
    )
    env = TransformedEnv(real_env(), Compose(*transforms))
    step = env.step(env.reset().set("action", torch.tensor([0.5])))
    action = torch.tensor([0.5 if in_front else scaling._inv_apply_transform(torch.tensor(0.5))])
    assert step["action"].item() == 0.5
    expected = disagreement_of(parts, step["observation"], action)
    assert step["next", "disagreement"].item() == pytest.approx(expected, rel=1e-3)


def test_what_a_collector_collects():
    env = SerialEnv(2, REAL_ENVS["one-hot"])
    parts = real_parts(env)
    env = TransformedEnv(env, DisagreementBonus(SCALE, **parts))
    collector = Collector(env, frames_per_batch=160, total_frames=160)
    (out,) = [batch.clone() for batch in collector]
    collector.shutdown()
    ends = out["next", "done"][:, :-1].squeeze(-1)
    assert ends.any() and (out["disagreement"][:, 1:][ends] == 0).all()
    assert_like_oracle(parts, out, torch.ones(2, 80), sign=1)  # CartPole pays 1 per step


# --- properties


@pytest.mark.parametrize("kind", KINDS)
def test_one_member_never_disagrees(kind):
    parts, data = make_parts(n_models=1), transitions(5)
    changed = kind(SCALE, **parts)(data)
    assert (changed["next", "disagreement"] == 0).all()
    assert torch.equal(changed["next", "reward"], data["next", "reward"])
    env = imagined_env(n_models=1)
    assert (TransformedEnv(env, kind(SCALE)).rollout(4)["next", "disagreement"] == 0).all()


def test_scale_0_leaves_the_reward_and_it_may_change_later():
    transform, data = DisagreementBonus(0.0, **make_parts()), transitions(5)
    assert torch.equal(transform(data)["next", "reward"], data["next", "reward"])
    transform.scale = 2.0
    out = transform(data)["next"]
    torch.testing.assert_close(out["reward"], data["next", "reward"] + 2 * out["disagreement"])


@pytest.mark.parametrize("kind", KINDS)
def test_its_argument_is_not_changed(kind):
    data = transitions(5)
    before = data.clone()
    out = kind(SCALE, **make_parts())(data.lock_())
    assert (data == before).all() and set(data.keys(True)) == set(before.keys(True))
    assert set(out.keys(True)) == {*before.keys(True), ("next", "disagreement")}


def test_garbage_on_padding_stays_there():
    parts, data = make_parts(), transitions(4, 3).reshape(-1)
    expected = DisagreementBonus(SCALE, **parts)(data)["next", "reward"]
    mask = torch.rand(12) < 0.5
    data["observation"][~mask] = torch.nan
    reward = DisagreementBonus(SCALE, **parts)(data)["next", "reward"]
    torch.testing.assert_close(reward[mask], expected[mask])
    assert reward[~mask].isnan().all()  # nothing is hidden


def test_garbage_of_the_dead_earns_nothing():
    data = transitions(2).set("alive", torch.tensor([0.0, 0.5]).reshape(2, 1, 1, 1))
    data["next", "epistemic_var"] = torch.tensor([[torch.nan, 0.0], [4.0, 4.0]])
    out = DisagreementBonus(1.0)(data)
    assert out["next", "disagreement"].flatten().tolist() == [0.0, 1.0]


def test_what_is_unknown_of_a_particle_that_may_live_is_not_hidden():
    data = transitions(2).set("alive", torch.tensor([1e-3, math.nan]).reshape(2, 1, 1, 1))
    data["next", "epistemic_var"] = torch.tensor([[math.inf, 0.0], [4.0, 4.0]])
    out = DisagreementBonus(1.0)(data)["next", "disagreement"].flatten()
    assert out[0] == math.inf and out[1].isnan()


def test_slices_with_padding():
    data = transitions(20)
    data["next", "done"] = data["next", "terminated"] = torch.arange(20)[:, None] % 4 == 3
    sampler = TransitionSliceSampler(slice_len=5)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), sampler=sampler, batch_size=50)
    buffer.extend(data)
    parts = make_parts()
    buffer.append_transform(DisagreementBonus(SCALE, **parts))
    sample = buffer.sample()
    assert not sample["collector", "mask"].all()
    assert_like_oracle(parts, sample, data["next", "reward"][sample["index"]], sign=1)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.int64, torch.float32)],
)
def test_dtype_of_the_reward(dtype, expected):
    data = transitions(5)
    data["next", "reward"] = data["next", "reward"].to(dtype)
    assert DisagreementBonus(SCALE, **make_parts())(data)["next", "reward"].dtype == expected


def test_a_buffer_follows_the_model_as_it_learns():
    parts = make_parts()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(5), batch_size=5)
    buffer.extend(transitions(5))
    buffer.append_transform(DisagreementBonus(SCALE, **parts))
    for _ in range(2):
        assert_like_oracle(parts, sample := buffer[:], sample["next", "reward"], sign=0)
        with torch.no_grad():
            for parameter in parts["dynamics"].parameters():
                parameter.mul_(1.3)


def test_the_bonus_plans_into_what_is_not_known_and_the_penalty_away_from_it():
    earned = {}
    for kind in KINDS:
        torch.manual_seed(0)
        env = imagined_env()
        env.world_model.reward = None
        env = TransformedEnv(env, kind(1.0))
        planner = CrossEntropyPlanner(
            env, planning_horizon=1, optim_steps=5, num_candidates=100, top_k=10
        )
        state = env.reset(TensorDict({"observation": torch.randn(8, 3)}, batch_size=[8]))
        earned[kind] = env.step(planner(state))["next", "disagreement"]
        at_random = env.step(env.rand_action(state))["next", "disagreement"]
    assert (earned[DisagreementBonus] > earned[PessimismPenalty]).all()
    assert earned[PessimismPenalty].mean() < at_random.mean() < earned[DisagreementBonus].mean()


def test_the_bonus_is_larger_where_there_were_no_data():
    parts = {"encoder": IdentityEncoder(2), "dynamics": ProbabilisticEnsemble(2, 0, 1, 4)}
    optimizer = torch.optim.Adam(parts["dynamics"].parameters(), lr=3e-3)
    for _ in range(150):
        batch = LinearGaussian().transitions(64)
        parts["dynamics"].update_statistics(
            *(batch[key] for key in ("latent", "context", "action", ("next", "latent")))
        )
        optimizer.zero_grad()
        parts["dynamics"].loss(batch).backward()
        optimizer.step()
    data = transitions(200, action_spec=Bounded(-1.0, 1.0, (1,)), obs_dim=2)
    bonus = DisagreementBonus(1.0, **parts)
    known = bonus(data)["next", "disagreement"].mean()
    unknown = bonus(data.update({"observation": data["observation"] + 6}))["next", "disagreement"]
    assert unknown.mean() > 3 * known


@pytest.mark.parametrize(("kind", "sign"), [(DisagreementBonus, 1), (PessimismPenalty, -1)])
def test_a_planner_scores_it_alike(kind, sign):
    env = imagined_env(deterministic=True)
    state = env.reset(TensorDict({"observation": torch.randn(6, 3)}, batch_size=[6]))
    actions = torch.rand(6, 4, 2)
    inside = CandidateReturn(env, disagreement=sign * SCALE)(state, actions)
    outside = CandidateReturn(TransformedEnv(env, kind(SCALE)))(state, actions)
    torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-4)


# --- gradients


def test_no_gradient_reaches_the_parts():
    data = transitions(5)
    data["action"].requires_grad_()
    out = DisagreementBonus(SCALE, **make_parts())(data)
    assert not out["next", "disagreement"].requires_grad


def test_what_an_imagined_env_writes_keeps_its_gradient():
    env = TransformedEnv(imagined_env(), DisagreementBonus(SCALE))
    action = torch.rand(4, 2, requires_grad=True)
    state = env.reset(TensorDict(batch_size=[4])).set("action", action)
    env.step(state)["next", "disagreement"].sum().backward()
    assert torch.isfinite(action.grad).all() and (action.grad != 0).all()


def test_gradient_at_no_disagreement():
    variance = torch.tensor([[0.0, 0.0], [32.0, 0.0], [torch.nan, 0.0]], requires_grad=True)
    value = disagreement(variance)
    value[:2].sum().backward()
    assert value[2].isnan() and value[:2].flatten().tolist() == [0.0, 4.0]
    # d sqrt((a + b) / 2) = 1 / (4 sqrt((a + b) / 2))
    torch.testing.assert_close(variance.grad[:2], torch.tensor([[0.0, 0.0], [0.0625, 0.0625]]))


# --- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": -1.0}, ValueError, r"Bonus: scale must be .* at least 0, got -1.0; .*Penalty"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number"),
        ({"scale": math.inf}, ValueError, "scale must be a finite number"),
        ({"encoder": IdentityEncoder(3)}, TypeError, "or neither, but dynamics is None"),
        ({"dynamics": random_ensemble(3)}, TypeError, "or neither, but encoder is None"),
        (
            {"encoder": nn.Linear(3, 3), "dynamics": random_ensemble(3)},
            TypeError,
            "encoder is Linear, no Encoder",
        ),
        (
            {"encoder": IdentityEncoder(4), "dynamics": random_ensemble(3)},
            ValueError,
            "encoder has 4 latent and 0 context dims, dynamics 3 and 0",
        ),
    ],
)
def test_construction_errors(options, error, message):
    with pytest.raises(error, match=message):
        DisagreementBonus(**{"scale": 1.0, **options})


@pytest.mark.parametrize(
    "name", ["reward_key", "disagreement_key", "epistemic_var_key", "alive_key"]
)
def test_a_key_of_another_kind_is_named(name):
    with pytest.raises(TypeError, match=f"PessimismPenalty: {name} must be"):
        PessimismPenalty(1.0, **{name: 3})


def test_an_env_that_does_not_write_its_uncertainty():
    message = r"no entry 'epistemic_var'; there is .*'observation'.* made with uncertainty=True"
    env = TransformedEnv(imagined_env(uncertainty=False), DisagreementBonus(1.0))
    with pytest.raises(KeyError, match=message):
        env.rollout(2)
    with pytest.raises(KeyError, match=message):
        TransformedEnv(real_env(), PessimismPenalty(1.0)).observation_spec  # noqa: B018


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("observation", r"no entry .*observation.*; there is .*action"),
        ("action", r"no entry .*action.*; there is .*observation"),
        (("next", "reward"), r"no entry .*next.*reward.*; there is .*observation"),
        ("next", r"no entry .*next.*reward.*; there is .*observation"),
    ],
)
def test_missing_entries(without, message):
    with pytest.raises(KeyError, match=message):
        PessimismPenalty(1.0, **make_parts())(transitions(4).exclude(without))


def test_a_sample_without_variance():
    with pytest.raises(KeyError, match=r"\('next', 'epistemic_var'\).* pass encoder and dynamics"):
        PessimismPenalty(1.0)(transitions(4))


def test_a_reward_of_another_shape_is_not_broadcast():
    data = transitions(4)
    data["next", "reward"] = torch.randn(4)
    with pytest.raises(ValueError, match=r"reward: expected shape \[4, 1\], got \[4\]"):
        DisagreementBonus(1.0, **make_parts())(data)


def test_an_alive_that_is_none_of_particles():
    data = transitions(4).set("alive", torch.zeros(4, 1))
    with pytest.raises(
        ValueError, match=r"alive: expected .*E.*P.*, got \[4, 1\]; .*alive_key=None"
    ):
        DisagreementBonus(1.0, **make_parts())(data)
    out = DisagreementBonus(1.0, alive_key=None, **make_parts())(data)
    assert (out["next", "disagreement"] > 0).all()


# --- state


@pytest.mark.parametrize("training", [True, False])
def test_the_parts_stay_as_they_are(training):
    parts = make_parts()
    parts["dynamics"].train(training)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(5))
    transform = DisagreementBonus(SCALE, **parts)
    buffer.append_transform(transform)
    env_parts = real_parts(real_env())
    env_parts["dynamics"].train(training)
    env = TransformedEnv(real_env(), DisagreementBonus(SCALE, **env_parts))
    env.to("meta")
    assert parts["dynamics"].training is env_parts["dynamics"].training is training
    assert not any(p.is_meta for p in env_parts["dynamics"].parameters())
    assert not transform.state_dict() and not list(transform.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_does_the_same(copied):
    transform, data = PessimismPenalty(SCALE, **make_parts()), transitions(4)
    assert torch.equal(copied(transform)(data)["next", "reward"], transform(data)["next", "reward"])


def test_nested_keys():
    names = [("agent", "latent"), ("agent", "context"), ("agent", "action")]
    encoder = IdentityEncoder(3, in_keys=[("agent", "observation")], out_keys=names[:2])
    dynamics = random_ensemble(3, 0, 2, in_keys=names)
    data = transitions(4)
    nested = TensorDict(
        {
            "agent": data.select("observation", "action"),
            "next": {"agent": {"gain": data["next", "reward"]}},
        },
        batch_size=[4],
    )
    options = {"reward_key": ("agent", "gain"), "disagreement_key": ("agent", "unknown")}
    out = DisagreementBonus(SCALE, encoder=encoder, dynamics=dynamics, **options)(nested)
    plain = random_ensemble(3, 0, 2)
    plain.load_state_dict(dynamics.state_dict())
    expected = DisagreementBonus(SCALE, encoder=IdentityEncoder(3), dynamics=plain)(data)["next"]
    assert torch.equal(out["next", "agent", "gain"], expected["reward"])
    assert torch.equal(out["next", "agent", "unknown"], expected["disagreement"])
    env = PredictorEnv(encoder, dynamics, None, CONTINUOUS, uncertainty=True)
    env = TransformedEnv(env, DisagreementBonus(SCALE, disagreement_key=("agent", "unknown")))
    check_env_specs(env)


def test_with_other_transforms():
    env = imagined_env(start=torch.zeros(1, 3))
    env = TransformedEnv(env, Compose(DisagreementBonus(SCALE), StepCounter(3)))
    check_env_specs(env)
    out = env.rollout(7, break_when_any_done=False)
    begins = out["step_count"].flatten() == 0
    assert begins.sum() == 3 and (out["disagreement"][begins] == 0).all()
    assert (out["disagreement"][~begins] > 0).all()


@pytest.mark.gpu
def test_model_and_data_on_different_devices():
    parts, data = make_parts(), transitions(5)
    expected = DisagreementBonus(SCALE, **parts)(data)["next", "reward"]
    parts = {name: part.cuda() for name, part in parts.items()}
    out = DisagreementBonus(SCALE, **parts)(data)["next", "reward"]
    assert out.device == expected.device
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    out = DisagreementBonus(SCALE, **parts)(data.to("cuda"))["next", "reward"]
    assert out.is_cuda
