"""ImaginedBuffer: the layout of its batches, and what may and may not be given to it."""

import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.data import LazyTensorStorage, ListStorage, OneHot, TensorDictReplayBuffer
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    RewardScaling,
)
from torchrl.modules import (
    MLP,
    QValueActor,
    ValueOperator,
)
from torchrl.objectives import DQNLoss, IQLLoss, SoftUpdate, TD3Loss

from layeredrl_trl import IdentityEncoder, SelectEncoder
from tests.envs.imagined import ACTION_SPECS, SplitEncoder, make_env
from tests.problems import DOUBLE_INTEGRATOR, LQREnv
from tests.small_predictors import small_predictor, snapshot
from tests.trainers.imagined_problems import (
    ACTIONS,
    ROLLOUTS,
    KnownDynamics,
    for_spec,
    imagined_buffer,
    known_env,
    real_buffer,
    real_steps,
    rows_of,
    sac,
)

ENTRIES = {
    "observation",
    "action",
    *(("next", key) for key in ("observation", "reward", "done", "terminated", "truncated")),
}
FLAGS = {"done", "terminated", "truncated"}
# ---- contract


@pytest.mark.parametrize("real_ratio", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_a_batch_has_the_layout_of_real_transitions(real_ratio, batch_size):
    imagined = imagined_buffer(real_ratio=real_ratio)
    batch = imagined.sample(batch_size)
    real = imagined.real_buffer.sample(batch_size)
    assert batch.batch_size == (batch_size,)
    assert set(batch.keys(True, True)) == ENTRIES | FLAGS
    for key in batch.keys(True, True):
        assert batch[key].shape == real[key].shape and batch[key].dtype == real[key].dtype, key
    joined = torch.cat([batch, real.select(*batch.keys(True, True))])
    assert joined.batch_size == (2 * batch_size,)
    n_real = (batch["next", "reward"] == 100).sum().item()
    assert n_real == round(real_ratio * batch_size)


@pytest.mark.parametrize("spec", ACTION_SPECS.values(), ids=ACTION_SPECS)
def test_actions_keep_their_encoding(spec):
    buffer = for_spec(spec)
    imagined = imagined_buffer(make_env(spec, **ROLLOUTS), buffer=buffer, length=2, n=30)
    stored = buffer.storage[:]["action"]
    for rows in (imagined.buffer[:], imagined.sample(20)):
        assert rows["action"].dtype == stored.dtype
        assert rows["action"].shape[1:] == stored.shape[1:]
        assert spec.expand(len(rows), *spec.shape).is_in(rows["action"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_are_those_of_the_real_buffer_whose_rows_stay_exact(dtype):
    steps = real_steps().apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    steps["observation"] = steps["observation"] + torch.rand(60, 2, dtype=dtype) / 100
    imagined = imagined_buffer(buffer=real_buffer(steps), real_ratio=0.5)
    batch = imagined.sample(40)
    floats = {x.dtype for x in batch.values(True, True) if x.is_floating_point()}
    assert floats == {dtype}
    real = batch[:20]["observation"]
    assert (real[:, None] == steps["observation"]).all(-1).any(-1).all()


def test_transforms_of_the_real_buffer_are_applied_to_starts_and_real_rows():
    steps = real_steps().apply(lambda x: x.double() if x.is_floating_point() else x)
    scaling = RewardScaling(0.0, 0.5, in_keys=[("next", "reward")])
    buffer = real_buffer(steps, transform=Compose(DoubleToFloat(), scaling))
    batch = imagined_buffer(buffer=buffer, real_ratio=0.5).sample(40)
    assert batch["observation"].dtype == torch.float32
    assert (batch[:20]["next", "reward"] == 50).all()


@pytest.mark.parametrize("n_envs", [None, 3], ids=["ndim 1", "ndim 2"])
def test_storages_of_one_and_two_dims(n_envs):
    steps = real_steps(60)
    if n_envs:
        steps = steps.reshape(n_envs, -1)
    imagined = imagined_buffer(buffer=real_buffer(steps), real_ratio=0.5, n=500)
    assert set(rows_of(imagined.buffer[:]["observation"]).tolist()) == set(range(60))
    assert (rows_of(imagined.sample(40)["observation"]) >= 0).all()


def test_nested_observations_and_entries_that_imagination_cannot_make():
    key = ("agent", "state")
    env = known_env(encoder=IdentityEncoder(2, in_keys=[key]))
    steps = real_steps()
    for part in (steps, steps["next"]):
        part[key] = part.pop("observation")
        part["desired_goal"] = torch.zeros(60, 3)
    steps["collector", "traj_ids"] = torch.zeros(60, dtype=torch.long)
    batch = imagined_buffer(env, buffer=real_buffer(steps)).sample(40)
    kept = set(batch.keys(True, True))
    nested = {"agent": ("agent", "state")}
    assert ("next", *nested["agent"]) in kept and key in kept
    assert not {"desired_goal", ("next", "desired_goal"), ("collector", "traj_ids")} & kept


def test_without_real_rows_only_the_starts_need_be_real():
    steps = real_steps().select("observation", ("next", "done"))
    imagined = imagined_buffer(buffer=real_buffer(steps), real_ratio=0.0)
    assert set(imagined.sample(8).keys(True, True)) == ENTRIES - {("next", "truncated")}
    with pytest.raises(KeyError, match=r"real_buffer: it has no .*action.*only"):
        imagined_buffer(buffer=real_buffer(steps))


# ---- losses of TorchRL


def q_value(obs_dim, n):
    return QValueActor(MLP(obs_dim, n, num_cells=[8]), in_keys=["observation"], spec=OneHot(n))


def dqn(spec):
    return DQNLoss(q_value(3, 4), delay_value=True, action_space=spec)


def td3(spec):
    actor = TensorDictModule(MLP(3, 2, num_cells=[8]), ["observation"], ["action"])
    critic = ValueOperator(MLP(5, 1, num_cells=[8]), ["observation", "action"])
    return TD3Loss(actor, critic, action_spec=spec)


def iql(spec):
    actor, _ = sac(3, spec)
    critic = ValueOperator(MLP(5, 1, num_cells=[8]), ["observation", "action"])
    return IQLLoss(actor, critic, ValueOperator(MLP(3, 1, num_cells=[8]), ["observation"]))


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("continuous", lambda spec: sac(3, spec)[1]),
        ("continuous", td3),
        ("continuous", iql),
        ("one-hot", dqn),
    ],
    ids=["SAC", "TD3", "IQL", "DQN"],
)
def test_losses_of_torchrl_learn_from_a_mixed_batch(kind, make):
    spec = ACTION_SPECS[kind]
    loss = make(spec)
    loss.make_value_estimator(gamma=0.9)
    SoftUpdate(loss, tau=0.1)
    policy = q_value(3, 4) if kind == "one-hot" else None
    imagined = imagined_buffer(
        make_env(spec, **ROLLOUTS), policy, for_spec(spec), n=30, real_ratio=0.3
    )
    terms = loss(imagined.sample(32))
    sum(x for name, x in terms.items() if name.startswith("loss")).backward()
    grads = [p.grad for p in loss.parameters() if p.requires_grad and p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


# ---- learning is not affected


def test_the_model_keeps_its_mode_its_statistics_and_its_gradients():
    predictor = small_predictor(encoder=SelectEncoder(3, [0, 1], [2]))
    predictor.train()
    predictor.model.net.eval()
    modes = [part.training for part in predictor.modules()]
    before = snapshot(predictor)
    env = predictor.env(ACTIONS, **ROLLOUTS)
    steps = real_steps()
    for part in (steps, steps["next"]):
        part["observation"] = torch.randn(60, 3)
    imagined = imagined_buffer(env, buffer=real_buffer(steps), length=3)
    imagined.sample(20)
    assert modes == [part.training for part in predictor.modules()]
    after = snapshot(predictor)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in predictor.parameters())


def test_the_model_imagines_in_evaluation_mode():
    class Moded(KnownDynamics):
        def predict_particles(self, *args, **kwargs):
            modes.append(self.training)
            return super().predict_particles(*args, **kwargs)

    modes: list[bool] = []
    env = known_env(Moded())
    env.train()
    imagined_buffer(env, length=2)
    assert modes == [False, False] and env.world_model.dynamics.training


def test_the_real_buffer_is_not_changed_and_the_seed_decides():
    def rows():
        torch.manual_seed(7)
        buffer = real_buffer()
        stored = buffer.storage[:].clone()
        imagined = imagined_buffer(known_env(KnownDynamics((0.0, 0.1))), buffer=buffer, length=2)
        batch = imagined.sample(30)
        assert (buffer.storage[:] == stored).all() and len(buffer) == 60
        return imagined.buffer[:], batch

    first, second = rows(), rows()
    for a, b in zip(first, second, strict=True):
        assert (a == b).all()


# ---- errors


def soft():
    return known_env(termination="soft")


def many():
    return known_env(KnownDynamics((0.0, 0.1)), num_particles=2)


def lossy():
    return make_env(encoder=SplitEncoder(3), **ROLLOUTS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"env": LQREnv(**DOUBLE_INTEGRATOR)}, TypeError, "env: expected a PredictorEnv.*LQREnv"),
        ({"env": soft()}, ValueError, 'expected termination="sample", got "soft"'),
        ({"env": many()}, ValueError, "expected num_particles=1"),
        ({"env": lossy()}, ValueError, "SplitEncoder cannot decode"),
        ({"policy": 3}, TypeError, "policy: expected a TensorDict module.*int"),
        ({"buffer": [1]}, TypeError, "ImaginedBuffer: real_buffer: expected a TorchRL replay"),
        ({"n": 0}, ValueError, "num_starts must be at least 1"),
        ({"retain": 0}, ValueError, "retain must be at least 1"),
        ({"interval": 2.5}, TypeError, "interval must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"real_ratio": 1.5}, ValueError, r"real_ratio must be in \[0, 1\]"),
        ({"length": 0.5}, ValueError, "length must be at least 1, got 0.5"),
        ({"length": "3"}, TypeError, "length must be a number"),
        ({"length": float("nan")}, ValueError, "length must be finite"),
        ({"exploration_type": "random"}, TypeError, "expected an ExplorationType"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        imagined_buffer(refills=0, **options)


def test_an_empty_buffer_and_no_refill_are_said():
    empty = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
    imagined = imagined_buffer(buffer=empty, refills=0)
    with pytest.raises(ValueError, match="real_buffer: it is empty"):
        imagined.refill()
    with pytest.raises(ValueError, match="call refill first"):
        imagined.sample(4)
    with pytest.raises(TypeError, match="batch_size: give it here"):
        imagined_buffer().sample()


def test_a_schedule_that_falls_below_one_step_is_an_error():
    imagined = imagined_buffer(refills=0, length=lambda steps: 1 - steps)
    with pytest.raises(ValueError, match="length must be at least 1, got -4"):
        imagined.refill(5)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("action", lambda x: x.squeeze(-1), r"action: .*float32 \[1\].*float32 \[\]"),
        ("action", lambda x: x.long(), r"action: .*torch.float32 \[1\].*torch.int64 \[1\]"),
        (("next", "reward"), lambda x: x.expand(-1, 2), r"reward.*float32 \[1\].*float32 \[2\]"),
    ],
    ids=["shape", "kind", "reward"],
)
def test_entries_of_another_shape_or_kind_are_an_error(key, change, message):
    steps = real_steps()
    steps[key] = change(steps[key])
    with pytest.raises(ValueError, match=message):
        imagined_buffer(buffer=real_buffer(steps))


def test_a_buffer_that_keeps_no_columns_is_refused_before_anything_is_imagined():
    buffer = TensorDictReplayBuffer(storage=ListStorage(10))
    buffer.extend(real_steps(10))
    with pytest.raises(TypeError, match="LazyTensorStorage"):
        imagined_buffer(buffer=buffer)
