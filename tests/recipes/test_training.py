"""The main job on a few steps: what it writes, that it goes on, and what bad input gets."""

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layeredrl_trl.__main__ import main
from layeredrl_trl.recipes import RecipeError, TrainConfig, make_env, results, train, training
from layeredrl_trl.recipes.agent import Spaces, make_policy, make_predictor
from tests.extras import needs_dm_control
from tests.recipes.odd_envs import EPISODE_LENGTH, odd
from tests.recipes.tiny_runs import error_of, frames_saved, rows_of


def test_a_run_leaves_all_its_files(finished):
    run, lines = finished
    files = {path.name for path in run.folder.iterdir()}
    assert {
        "checkpoints",
        "imagination.png",
        "model_report.md",
        "model_report.png",
        "rows",
        "summary.json",
        "tensorboard",
    } <= files
    assert not [name for name in files if name.endswith(".partial")]
    assert run.frames == 60 and len(run.eval_returns) == 2 and not run.interrupted
    text = "\n".join(lines)
    folder = str(run.folder)
    for part in ("mean return of 2", "correlation", "tensorboard --logdir", f"--run {folder}"):
        assert part in text
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["frames"] == 60 and summary["config"]["env"] == "Pendulum-v1"


def test_what_the_planner_thinks_of_its_plans_is_logged(finished):
    run, _ = finished
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for name in ("plan_return", "plan_spread", "plan_std"):
        assert all(math.isfinite(point.value) for point in events.Scalars(f"planner/{name}"))
    assert "model/one_step/nll" in events.Tags()["scalars"]


def test_random_steps_are_marked_as_not_planned(tiny, unevaluated):
    run = train(tiny, say=lambda _: None)
    planned = rows_of(run.folder)["planned"].squeeze(-1)
    assert planned.tolist() == [False] * 40 + [True] * 20


def test_phases_of_random_actions_later_on(tiny, unevaluated):
    config = replace(tiny, total_frames=100, planned_frames=25, random_frames=15)
    run = train(config, say=lambda _: None)
    planned = rows_of(run.folder)["planned"].squeeze(-1)
    assert planned.tolist() == [False] * 40 + [True] * 25 + [False] * 15 + [True] * 20


def test_repeated_steps_count_as_steps(tiny, unevaluated):
    config = replace(tiny, total_frames=120, init_random_frames=80, action_repeat=2)
    run = train(config, say=lambda _: None)
    assert run.frames == 120
    planned = rows_of(run.folder)["planned"].squeeze(-1)
    assert planned.tolist() == [False] * 40 + [True] * 20
    config = TrainConfig(resume=run.folder, total_frames=160)
    longer = train(config, say=lambda _: None)
    assert longer.frames == 160 and len(rows_of(run.folder)) == 80


@pytest.mark.parametrize(
    "env",
    [
        "CartPole-v1",
        "InvertedPendulum-v5",
        pytest.param("dm_control/cartpole-swingup", marks=needs_dm_control),
    ],
)
def test_other_environments(tiny, env):
    run = train(replace(tiny, env=env), say=lambda _: None)
    assert len(run.eval_returns) == 2


def test_the_same_seed_gives_the_same_run(tiny):
    first = train(tiny, say=lambda _: None)
    second = train(tiny, say=lambda _: None)
    other = train(replace(tiny, seed=1), say=lambda _: None)
    assert first.eval_returns == second.eval_returns != other.eval_returns
    assert first.folder != second.folder


def test_episodes_csv_holds_every_finished_episode(tiny, unevaluated):
    run = train(replace(tiny, total_frames=220), say=lambda _: None)
    rows = list(csv.reader((run.folder / "episodes.csv").read_text().splitlines()))
    assert rows[0] == ["env_steps", "return"] and [row[0] for row in rows[1:]] == ["200"]


def test_an_env_that_fails_in_the_middle_of_a_run(tiny):
    """Everything since the last checkpoint was lost."""
    with pytest.raises(RecipeError, match=r"stopped after 0 steps: RuntimeError at odd_envs") as e:
        train(replace(tiny, env=odd("BadStepLater")), say=lambda _: None)
    (folder,) = tiny.logdir.iterdir()
    assert frames_saved(folder) == [0]
    assert f"--resume {folder} --total-frames 60" in str(e.value)
    assert isinstance(e.value.__cause__, RuntimeError)


def test_an_evaluation_that_fails(tiny, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no picture")

    monkeypatch.setattr(results, "draw_imagination", broken)
    with pytest.raises(RecipeError, match=r"checkpoint written, but not .*: no picture.*evaluate"):
        train(tiny, say=lambda _: None)
    (folder,) = tiny.logdir.iterdir()
    assert frames_saved(folder) == [60]


def test_an_id_with_a_module_from_beginning_to_end(tiny, monkeypatch, capsys):
    """Gymnasium's spec() knew no such ids, and the run died after its training."""
    monkeypatch.undo()
    config = replace(tiny, env="tests.recipes.odd_envs:odd/Good-v3")
    run = train(config, say=lambda _: None)
    assert run.folder.name.startswith("tests.recipes.odd_envs_odd_Good-v3_seed0_")
    assert run.eval_returns == [EPISODE_LENGTH] * 2
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["imagined_return_correlation"] is None  # every return is the same
    monkeypatch.delitem(sys.modules, "tests.recipes.odd_envs")  # as in a fresh process
    monkeypatch.delitem(gymnasium.registry, "odd/Good-v3")
    monkeypatch.delitem(gymnasium.registry, "Good-v0")
    command = ["evaluate", "--run", str(run.folder), "--episodes", "1"]
    assert "give --env with this id" in error_of(command, capsys)
    assert "tests.recipes.odd_envs" not in sys.modules  # a file names no code
    assert main([*command, "--env", config.env]) == 0
    assert "odd/Good-v3: mean return 12.0 of 1 episodes" in capsys.readouterr().out


def test_observations_of_integers_beside_floats(tiny):
    """They stopped the run at its first step."""
    run = train(replace(tiny, env=odd("ChoiceInDictObservation")), say=lambda _: None)
    assert run.frames == 60


def test_a_pessimist_loses_by_disagreement(tiny):
    spaces = Spaces.of(make_env("Pendulum-v1"))
    for pessimism in (0.0, 0.5):
        config = replace(tiny, pessimism=pessimism)
        _, planner = make_policy(config, make_predictor(config, spaces), spaces.action_spec)
        assert planner.score.disagreement == -pessimism


@pytest.mark.parametrize("env", ["Pendulum-v1", None])
def test_learns_from_a_dataset(tiny, env, tmp_path):
    real = make_env("Pendulum-v1", seed=3)
    episodes = [real.rollout(50, set_truncated=True) for _ in range(4)]
    torch.cat(episodes).memmap(tmp_path / "data")
    options = {"dataset": str(tmp_path / "data"), "total_frames": 150, "pessimism": 0.5}
    lines, given = [], {"env"} if env else set()
    run = train(replace(tiny, **options), say=lines.append, given=given)
    assert run.frames == 150 and frames_saved(run.folder) == [150]
    assert len(run.eval_returns) == (2 if env else 0)
    assert run.report is not None and (run.folder / "model_report.md").exists()
    assert not list(run.folder.glob("checkpoints/*/components/*replay_buffer"))
    config = TrainConfig(resume=run.folder, total_frames=200)
    assert train(config, say=lambda _: None, given=()).frames == 200


@pytest.mark.parametrize(
    ("options", "given", "text"),
    [
        ({"dataset": "nowhere"}, (), "dataset: 'nowhere' cannot be used: "),
        ({"env": "CartPole-v1"}, {"env"}, "numbers, but the environment 'CartPole-v1' has"),
    ],
)
def test_a_dataset_that_does_not_fit(options, given, text, tiny, tmp_path):
    torch.cat([make_env("Pendulum-v1").rollout(20, set_truncated=True)] * 2).memmap(
        tmp_path / "data"
    )
    options = {"dataset": str(tmp_path / "data")} | options
    with pytest.raises(RecipeError, match=text):
        train(replace(tiny, **options), say=lambda _: None, given=given)
    assert not tiny.logdir.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"num_envs": 2},
        pytest.param({"num_workers": 2}, marks=pytest.mark.slow),
        pytest.param({"num_workers": 2, "asynchronous": True}, marks=pytest.mark.slow),
    ],
)
def test_ways_to_collect(options, tiny, unevaluated):
    run = train(replace(tiny, **options), say=lambda _: None)
    rows = rows_of(run.folder)
    assert rows.numel() == run.frames == 60 and rows["planned"].any()
    longer = train(TrainConfig(resume=run.folder, total_frames=100), say=lambda _: None)
    rows = rows_of(run.folder)
    assert longer.frames == rows.numel() == 100
    columns = rows.unsqueeze(1) if rows.ndim == 1 else rows
    ids = columns["collector", "traj_ids"]
    same = ids[1:] == ids[:-1]
    follows = columns["next", "observation"][:-1] == columns["observation"][1:]
    ends = columns["next", "done"][:-1, :, 0]
    assert follows.all(-1)[same & ~ends].all() and same.any()


def test_recipe_uses_only_the_public_api():
    for path in Path(training.__file__).parent.glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith("from layeredrl_trl") and ".recipes" not in line:
                module = line.split()[1]
                assert module.count(".") <= 1, f"{path.name}: {line}"
