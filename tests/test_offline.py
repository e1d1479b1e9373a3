"""Learning offline: the blocks of docs/offline.md run one after the other, and do what it says."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torchrl.data import TensorDictReplayBuffer, TensorStorage

from layeredrl_trl import (
    CategoricalCrossEntropyPlanner,
    ICEMPlanner,
    IdentityEncoder,
    PessimismPenalty,
    PredictorFactory,
    ProbabilisticEnsemble,
    RewardNet,
    RewardPredictor,
    ValueNet,
    model_report,
)
from layeredrl_trl.data import read_dataset, split_episodes
from tests.data.datasets_on_disk import box, episodes_of, steps, write_minari

PAGE = Path(__file__).parents[1] / "docs" / "offline.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def scope(tmp_path_factory):
    """What the blocks define; the dataset lies in a folder of its own."""
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("offline"))
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"{PAGE.name}: block {number}", "exec"), names)
    return names


def test_the_page_has_all_its_parts():
    titles = re.findall(r"^## (.*)", PAGE.read_text(), re.MULTILINE)
    assert len(titles) == len(BLOCKS) == 4


def test_the_model_is_measured_on_episodes_that_it_has_not_seen(scope):
    seen, unseen = (set(scope[x][:]["episode"].tolist()) for x in ("train", "held_out"))
    assert len(seen) == 16 and len(unseen) == 4 and not seen & unseen


def disagreement_of(policy_weight, scope):
    """Mean disagreement about the steps of a real episode that is planned with a weight for it."""
    model = scope["predictor"].env(scope["env"].action_spec, uncertainty=True, num_particles=3)
    planner = ICEMPlanner(
        model,
        planning_horizon=8,
        optim_steps=3,
        num_candidates=32,
        top_k=4,
        gamma=1.0,
        disagreement=policy_weight,
    )
    torch.manual_seed(0)
    scope["env"].set_seed(1)
    with torch.no_grad():
        taken = scope["env"].rollout(12, TensorDictSequential(model.initial_state, planner))
    parts = {"encoder": scope["predictor"].encoder, "dynamics": scope["predictor"].model}
    seen = TensorDictReplayBuffer(storage=TensorStorage(taken))
    seen.append_transform(PessimismPenalty(1.0, **parts))
    return seen[:]["next", "disagreement"].mean()


def test_a_pessimistic_planner_stays_where_the_model_knows(scope):
    planned = scope["planned"]
    assert planned["action"].shape == (10, 1) and planned["action"].abs().max() <= 2
    pessimistic, optimistic = (disagreement_of(weight, scope) for weight in (-1000.0, 1000.0))
    assert pessimistic < 0.8 * optimistic


def test_imagined_branches_begin_in_the_data_and_are_learned_from(scope):
    data, branches = scope["data"]["observation"], scope["branches"]
    starts = branches["observation"][:, 0]
    assert (starts[:, None] == data).all(-1).any(-1).all()
    gap = branches["next", "disagreement"]
    assert (gap > 0).all()
    replayed = scope["replay"][:]
    assert len(replayed) == 2000 + 2 * 100 * 3
    assert replayed["next", "reward"].isfinite().all()
    moved = [p.grad is not None and p.grad.abs().sum() > 0 for p in scope["actor"].parameters()]
    assert moved and scope["terms"]["loss_actor"].isfinite()


def test_ends_of_branches_are_not_taken_for_terminations(scope):
    branches = scope["branches"]
    assert branches["next", "truncated"][:, -1].all()
    assert torch.equal(
        branches["next", "done"], branches["next", "truncated"] | branches["next", "terminated"]
    )


# --- other kinds of data


def learn_and_plan(dataset, planner, **options):
    """A few steps of learning on one part, the report on the other, one plan."""
    train, held_out = split_episodes(dataset.buffer, 0.3)
    obs_shape, action_spec = dataset.observation_spec.shape, dataset.action_spec
    factory = PredictorFactory(
        partial(ProbabilisticEnsemble, n_models=2, hidden_sizes=(8,)),
        partial(ValueNet, hidden_sizes=(8,)),
        partial(RewardNet, hidden_sizes=(8,)),
        IdentityEncoder,
        RewardPredictor,
    )
    predictor = factory(obs_shape, action_spec)
    loss, _ = predictor.learn(train, 3, 16, 16, dataset.num_steps)
    assert loss.isfinite()
    report = model_report(predictor, held_out, horizon=3)
    assert report.metrics["open_loop", "error"][0].isfinite()
    model = predictor.env(action_spec)
    policy = TensorDictSequential(
        model.initial_state, planner(model, planning_horizon=3, optim_steps=1, **options)
    )
    start = held_out[:]["observation"][:1]
    with torch.no_grad():
        planned = policy(TensorDict(observation=start, batch_size=[1]))
    assert action_spec.is_in(planned["action"][0])


def test_choices_of_a_minari_dataset_are_learned_from_and_planned(tmp_path):
    pytest.importorskip("h5py")
    cart = box(4, dtype=np.float32), spaces.Discrete(3)
    write_minari(tmp_path, episodes_of(*cart), *cart)
    learn_and_plan(
        read_dataset(tmp_path), CategoricalCrossEntropyPlanner, num_candidates=8, top_k=2
    )


def test_a_maze_of_minari_is_learned_from_and_planned(tmp_path):
    pytest.importorskip("h5py")
    entries = spaces.Dict(observation=box(4), achieved_goal=box(2), desired_goal=box(2))
    maze = entries, box(2, bound=1.0, dtype=np.float32)
    write_minari(tmp_path, episodes_of(*maze), *maze)
    learn_and_plan(read_dataset(tmp_path), ICEMPlanner, num_candidates=8, top_k=2)


def test_flat_data_without_last_observations_are_learned_from_and_planned(tmp_path):
    data = steps()
    data["next", "observation"][data["next", "done"].squeeze(-1)] = 0  # as TorchRL reads D4RL
    data.memmap(tmp_path)
    with pytest.warns(UserWarning, match="is not stored"):
        dataset = read_dataset(tmp_path)
    learn_and_plan(dataset, ICEMPlanner, num_candidates=8, top_k=2)
