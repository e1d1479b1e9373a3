"""Learning from slices of real steps whose goals are replaced in hindsight."""

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import (
    LazyTensorStorage,
    TensorDictReplayBuffer,
)
from torchrl.envs import CatTensors, Compose, DoubleToFloat, GymEnv, GymWrapper
from torchrl.objectives import SoftUpdate

from layeredrl_trl import keys
from layeredrl_trl.data import HindsightGoals, TransitionSliceSampler
from layeredrl_trl.diagnostics import model_report
from layeredrl_trl.modules import (
    LinearEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    SelectEncoder,
    ValueNet,
)
from layeredrl_trl.objectives import RewardPredictorLoss
from layeredrl_trl.predictors import RewardPredictor
from tests.data.goal_episodes import (
    ACHIEVED,
    GOAL,
    NEXT_ACHIEVED,
    NEXT_GOAL,
)
from tests.extras import needs_gymnasium_robotics
from tests.toy_envs import GoalEnv

# --- learning


def goal_buffer(env, slice_len, transforms=(), n=200, **options):
    """Real steps of a goal-based env; their entries are joined after the goals are replaced."""
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(n),
        sampler=TransitionSliceSampler(slice_len=options.pop("drawn", slice_len or 3)),
        batch_size=options.pop("batch_size", 32 * (slice_len or 3)),
    )

    def reward(slices):
        gap = slices[NEXT_ACHIEVED] - slices[NEXT_GOAL]
        return -gap.norm(dim=-1, keepdim=True)

    buffer.append_transform(HindsightGoals(buffer.storage, slice_len, reward, **options))
    entries = ["observation", ACHIEVED, GOAL]
    for prefix in ((), ("next",)):
        names = [(*prefix, key) if prefix else key for key in entries]
        joined = CatTensors(names, names[0], sort=False, del_keys=False)
        buffer.append_transform(joined)
    for transform in transforms:
        buffer.append_transform(transform)
    collector = Collector(
        env,
        None,
        frames_per_batch=n,
        total_frames=n,
        set_truncated=True,
        auto_register_policy_transforms=False,
    )
    for data in collector:
        buffer.extend(data)
    collector.shutdown()
    return buffer


def point_maze():
    return GymEnv("gymnasium_robotics:PointMaze_UMaze-v3", max_episode_steps=30)


ENVS = [
    pytest.param(lambda: GymWrapper(GoalEnv(episode_length=9)), id="toy"),
    pytest.param(point_maze, id="PointMaze", marks=needs_gymnasium_robotics),
]
DOUBLES = Compose(DoubleToFloat(in_keys=["observation", ("next", "observation")]))


@pytest.mark.parametrize("make_env", ENVS)
def test_a_loss_learns_from_slices_of_one_goal(make_env):
    encoder = LinearEncoder(8, 6, 2)
    parts = encoder, ProbabilisticEnsemble(6, 2, 2), RewardNet(6, 2, 2), ValueNet(6, 2)
    loss = RewardPredictorLoss(*parts, k_steps=2, n_steps=3)
    SoftUpdate(loss, tau=0.01)
    buffer = goal_buffer(make_env(), loss.slice_len, [DOUBLES], her_ratio=1.0)
    sample = buffer.sample()
    slices = sample.reshape(-1, loss.slice_len)
    for key in ("observation", ("next", "observation")):
        goals = slices[key][..., 6:]
        assert slices[key].shape[-1] == 8
        assert torch.equal(goals, slices["observation"][:, :1, 6:].expand_as(goals))
    moved = slices[NEXT_ACHIEVED] - slices[NEXT_GOAL]
    torch.testing.assert_close(
        slices[keys.NEXT_REWARD][slices[keys.MASK]],
        -moved.norm(dim=-1, keepdim=True).float()[slices[keys.MASK]],
        atol=1e-4,
        rtol=1e-4,
    )
    terms = loss(sample)
    total = sum(term for key, term in terms.items() if key.startswith("loss_"))
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in loss.parameters() if p.grad is not None)


@pytest.mark.parametrize("make_env", ENVS[:1])
@pytest.mark.parametrize("asked", [True, False])
def test_a_predictor_learns_from_slices_of_one_goal(make_env, asked):
    encoder = SelectEncoder(8, list(range(6)), [6, 7])
    options = {"condition_on_context": True}
    parts = ProbabilisticEnsemble(6, 2, 2, **options), ValueNet(6, 2), RewardNet(6, 2, 2), encoder
    predictor = RewardPredictor(*parts, 6, 2, k_steps=2, n_steps=2)
    length = predictor.loss_module.slice_len
    buffer = goal_buffer(make_env(), length if asked else None, [DOUBLES], drawn=length)
    seen = []
    buffer.append_transform(lambda data: seen.append(data.clone()) or data)
    loss, info = predictor.learn(buffer, 3, 16, 16, 0)
    assert loss.isfinite() and info["skipped"] == 0
    assert seen
    for batch in seen:
        goals = batch["observation"].reshape(-1, length, 8)[..., 6:]
        assert (goals == goals[:, :1]).all()
    assert predictor.sample_model_batch(buffer, 20)["context"].shape == (20, 2)
    targets = predictor.compute_targets(buffer, 20, 2, 2)
    assert (targets["context"] == targets["context"][:, :1]).all()
    if not asked:  # slices of other lengths
        assert predictor.compute_targets(buffer, 20, 4, 3).shape == (20, 4)
        report = model_report(predictor, buffer, 6, n_segments=20, n_transitions=50)
        assert report.metrics["one_step", "nll"].isfinite()


@pytest.mark.filterwarnings("ignore:Slices join steps")  # as the NaN is no next observation
def test_a_step_that_is_not_finite_is_named():
    """The predictor looks at single steps then, of which each is a slice."""
    encoder = SelectEncoder(8, list(range(6)), [6, 7])
    parts = ProbabilisticEnsemble(6, 2, 2), ValueNet(6, 2), RewardNet(6, 2, 2), encoder
    predictor = RewardPredictor(*parts, 6, 2, k_steps=2, n_steps=2)
    buffer = goal_buffer(GymWrapper(GoalEnv(episode_length=9)), None, [DOUBLES])
    buffer.storage._storage["observation"][5] = torch.nan
    with pytest.warns(UserWarning, match="'observation': 1 of 200 rows is not finite.* 5"):
        predictor.learn(buffer, 20, 32, 32, 0)
