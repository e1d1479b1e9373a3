"""The table of finished episodes, and the planner's statistics."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from layeredrl_trl.trainers import EpisodeLog, PlannerLog


class Logger(list):
    def log_scalar(self, name, value, step):
        self.append((name, value, step))


def log_of(path, skip=1):
    trainer = SimpleNamespace(collected_frames=0, frame_skip=skip, logger=Logger())
    trainer.register_module = trainer.register_op = lambda *_: None
    log = EpisodeLog(path)
    log.register(trainer)
    return log, trainer


def batch_of(done, returns):
    done, returns = torch.tensor(done).bool(), torch.tensor(returns)
    following = {"done": done.unsqueeze(-1), "episode_reward": returns.unsqueeze(-1)}
    return TensorDict({"next": following}, batch_size=done.shape)


def feed(log, trainer, batch):
    trainer.collected_frames += batch.numel() * trainer.frame_skip
    return log(batch)


@pytest.mark.parametrize(
    ("skip", "done", "expected"),
    [
        (1, [[0, 1, 0], [1, 0, 1]], [(2, 2.0), (4, 1.0), (6, 3.0)]),
        (2, [[0, 1, 0], [1, 0, 1]], [(4, 2.0), (8, 1.0), (12, 3.0)]),
    ],
)
def test_env_steps_of_one_env(tmp_path, skip, done, expected):
    """Counted by hand: a step of the env counts ``skip`` times."""
    log, trainer = log_of(tmp_path / "episodes.csv", skip)
    for flags in done:
        feed(log, trainer, batch_of(flags, [1.0, 2.0, 3.0]))
    assert log.episodes() == expected
    assert trainer.logger == [("train/episode_return", value, step) for step, value in expected]


def test_env_steps_of_envs_side_by_side(tmp_path):
    """After the first step of both envs two steps are taken, and so on."""
    log, trainer = log_of(tmp_path / "episodes.csv")
    out = feed(log, trainer, batch_of([[0, 1, 0], [1, 1, 0]], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert log.episodes() == [(2, 4.0), (4, 2.0), (4, 5.0)]
    assert out == {"return": 5.0, "log_pbar": True}
    assert feed(log, trainer, batch_of([[0], [0]], [[1.0], [2.0]])) is None
    feed(log, trainer, batch_of([[1], [0]], [[7.0], [8.0]]))
    assert log.episodes()[-1] == (10, 7.0)


def test_goes_back_to_the_length_of_a_checkpoint(tmp_path):
    log, trainer = log_of(tmp_path / "episodes.csv")
    assert log.episodes() == [] and log.state_dict() == {"length": 0}
    feed(log, trainer, batch_of([1], [1.0]))
    state = log.state_dict()
    feed(log, trainer, batch_of([1], [2.0]))
    log.load_state_dict(state)
    assert log.state_dict() == state
    feed(log, trainer, batch_of([1], [3.0]))
    assert log.episodes() == [(1, 1.0), (3, 3.0)]


def test_back_to_the_beginning(tmp_path):
    log, trainer = log_of(tmp_path / "episodes.csv")
    state = log.state_dict()
    feed(log, trainer, batch_of([1], [1.0]))
    log.load_state_dict(state)
    feed(log, trainer, batch_of([1], [2.0]))
    assert log.episodes() == [(2, 2.0)]


def test_rows_that_are_missing_are_told(tmp_path):
    log, _ = log_of(tmp_path / "episodes.csv")
    with pytest.raises(ValueError, match=r"episodes\.csv has 0 bytes, fewer than 20"):
        log.load_state_dict({"length": 20})


def test_statistics_are_means_over_planned_steps():
    planner = SimpleNamespace(statistics_keys=("plan_return",))
    values = torch.tensor([[torch.nan], [1.0], [3.0]])
    batch = TensorDict(plan_return=values, planned=~values.isnan(), batch_size=[3])
    assert PlannerLog(planner)(batch) == {"planner/plan_return": 2.0}
    assert PlannerLog(planner)(batch[:1]) is None
    assert PlannerLog(planner)(batch[1:].exclude("planned")) == {"planner/plan_return": 2.0}
