"""The main job on a few steps: what it writes, that it goes on, and what bad input gets."""

import csv
import errno
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layeredrl_trl.__main__ import main
from layeredrl_trl.recipes import RecipeError, TrainConfig, train, training
from layeredrl_trl.recipes.checkpoint import Checkpoint
from tests.extras import needs_dm_control
from tests.recipes.odd_envs import EPISODE_LENGTH, odd


def test_a_run_leaves_all_its_files(tiny):
    lines = []
    run = train(tiny, say=lines.append)
    files = {path.name for path in run.folder.iterdir()}
    assert {
        "checkpoint.pt",
        "episodes.csv",
        "imagination.png",
        "learning_curve.png",
        "model_report.md",
        "model_report.png",
        "summary.json",
        "tensorboard",
    } <= files
    assert not [name for name in files if name.endswith(".partial")]
    assert run.frames == 60 and len(run.eval_returns) == 2
    text = "\n".join(lines)
    for part in ("mean return of 2", "correlation", "tensorboard --logdir", str(run.checkpoint)):
        assert part in text
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["frames"] == 60 and summary["config"]["env"] == "Pendulum-v1"


def test_what_the_planner_thinks_of_its_plans_is_logged(tiny):
    run = train(tiny, say=lambda _: None)
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for name in ("plan_return", "plan_spread", "plan_std"):
        assert all(math.isfinite(point.value) for point in events.Scalars(f"planner/{name}"))
    assert "model/one_step/nll" in events.Tags()["scalars"]


def test_random_steps_are_marked_as_not_planned(tiny, unevaluated):
    run = train(tiny, say=lambda _: None)
    planned = Checkpoint.load(run.checkpoint).transitions["planned"].squeeze(-1)
    assert planned.tolist() == [False] * 40 + [True] * 20


def test_phases_of_random_actions_later_on(tiny, unevaluated):
    config = replace(tiny, total_frames=100, planned_frames=25, random_frames=15)
    run = train(config, say=lambda _: None)
    planned = Checkpoint.load(run.checkpoint).transitions["planned"].squeeze(-1)
    assert planned.tolist() == [False] * 40 + [True] * 25 + [False] * 15 + [True] * 20


def test_repeated_steps_count_as_steps(tiny, unevaluated):
    config = replace(tiny, total_frames=120, init_random_frames=80, action_repeat=2)
    run = train(config, say=lambda _: None)
    assert run.frames == 120
    planned = Checkpoint.load(run.checkpoint).transitions["planned"].squeeze(-1)
    assert planned.tolist() == [False] * 40 + [True] * 20
    config = TrainConfig(resume=run.checkpoint, total_frames=160)
    longer = train(config, say=lambda _: None)
    assert longer.frames == 160
    assert len(Checkpoint.load(run.checkpoint).transitions["planned"]) == 80


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


def test_ctrl_c_saves_a_checkpoint_that_can_be_gone_on_from(tiny, unevaluated, monkeypatch):
    learn, calls = training._learn, []

    def interrupted_learn(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(*args, **kwargs)

    monkeypatch.setattr(training, "_learn", interrupted_learn)
    lines = []
    run = train(tiny, say=lines.append)
    assert run.interrupted and run.frames == 40 and "--resume" in lines[-1]
    saved = Checkpoint.load(run.checkpoint)
    assert saved.frames == 40 and len(saved.transitions["observation"]) == 40

    monkeypatch.setattr(training, "_learn", learn)
    resumed = train(replace(tiny, resume=run.checkpoint), say=lambda _: None)
    assert resumed.folder == run.folder and resumed.frames == 60
    again = Checkpoint.load(resumed.checkpoint)
    for key in ("observation", "action", "planned"):
        kept = again.transitions[key][:40]
        torch.testing.assert_close(kept, saved.transitions[key], rtol=0, atol=0)
    assert again.frames == 60
    ends = again.transitions["next"]["truncated"].squeeze(-1).nonzero().flatten()
    assert ends.tolist() == [39]  # no slice may go from the interrupted episode into the next


def test_a_resumed_run_began_with_the_same_episodes_again(tiny, unevaluated):
    tiny = replace(tiny, updates_per_frame=0.0)
    run = train(tiny, say=lambda _: None)
    first, saved = Checkpoint.load(run.checkpoint), run.checkpoint.read_bytes()
    firsts, lasts = first.transitions["observation"], []
    for _ in range(2):
        run.checkpoint.write_bytes(saved)
        train(TrainConfig(resume=run.checkpoint, total_frames=80), say=lambda _: None)
        lasts.append(Checkpoint.load(run.checkpoint).transitions["observation"][60:])
    torch.testing.assert_close(lasts[0], lasts[1], rtol=0, atol=0)
    assert not torch.equal(lasts[0][0], firsts[0])


def test_seeds_to_go_on_with():
    assert training.seed_after(7, 0) == 7
    seeds = {
        training.seed_after(seed, frames) for seed in range(30) for frames in range(1, 300, 10)
    }
    assert len(seeds) == 900 and not seeds & set(range(1000))
    assert all(0 < seed < 2**31 for seed in seeds)
    assert training.seed_after(0, 1000) == training.seed_after(0, 1000)


def test_a_finished_run_is_not_resumed(tiny, unevaluated):
    run = train(tiny, say=lambda _: None)
    with pytest.raises(RecipeError, match="has taken 60 steps already; raise total_frames"):
        train(replace(tiny, resume=run.checkpoint))


def test_episodes_csv_holds_every_finished_episode(tiny, unevaluated):
    run = train(replace(tiny, total_frames=220), say=lambda _: None)
    rows = list(csv.reader((run.folder / "episodes.csv").read_text().splitlines()))
    assert rows[0] == ["env_steps", "return"] and [row[0] for row in rows[1:]] == ["200"]


def test_a_run_interrupted_at_once_can_be_gone_on_from(tiny, unevaluated, monkeypatch):
    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(training, "_note_episodes", interrupt)
        run = train(tiny, say=lines.append)
    assert run.interrupted and run.frames == 0
    assert f"--total-frames {tiny.total_frames}" in "".join(lines)
    config = TrainConfig(resume=run.checkpoint, total_frames=60)
    assert train(config, say=lambda _: None).frames == 60


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_ctrl_c_between_storing_a_batch_and_counting_it(tiny, unevaluated, monkeypatch):
    """The checkpoint held more transitions than steps, and could not be resumed."""
    note, calls = training._note_episodes, []

    def interrupted_note(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        note(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_note_episodes", interrupted_note)
        run = train(tiny, say=lambda _: None)
    assert run.interrupted and run.frames == 20
    resumed = train(TrainConfig(resume=run.checkpoint, total_frames=60), say=lambda _: None)
    assert resumed.frames == 60


@pytest.mark.parametrize(("total_frames", "expected"), [(50, 60), (60, 60), (61, 80)])
def test_a_run_takes_whole_batches(tiny, unevaluated, total_frames, expected):
    """The buffer was too small for the last batch, which took the place of the first steps."""
    run = train(replace(tiny, total_frames=total_frames), say=lambda _: None)
    saved = Checkpoint.load(run.checkpoint)
    assert run.frames == saved.frames == len(saved.transitions["action"]) == expected
    assert not saved.transitions["planned"][:40].any()
    config = TrainConfig(resume=run.checkpoint, total_frames=expected + 5)
    assert train(config, say=lambda _: None).frames == expected + 20


def test_a_resumed_run_shorter_than_its_first_phase(tiny, unevaluated, monkeypatch):
    """It was trained, and then could not be saved."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "_note_episodes", interrupt)
        run = train(tiny, say=lambda _: None)
    before = sorted(run.folder.rglob("*"))
    with pytest.raises(RecipeError, match="init_random_frames must not exceed total_frames=20"):
        train(TrainConfig(resume=run.checkpoint, total_frames=20), say=lambda _: None)
    assert sorted(run.folder.rglob("*")) == before


def test_a_resumed_run_whose_folder_takes_no_file(checkpoint, monkeypatch):
    """It was trained, and then could not be saved."""
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecipeError, match=r"resume: cannot write to .*No space left on device"):
        train(TrainConfig(resume=checkpoint, total_frames=80), say=lambda _: None)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.parametrize(
    ("options", "given", "text"),
    [
        ({"env": "CartPole-v1"}, None, "is a checkpoint of the environment tests.*:Good-v0, not"),
        ({}, {"env"}, "is a checkpoint of the environment tests.*:Good-v0, not of 'Pendulum-v1'"),
    ],
)
def test_a_checkpoint_of_another_env_is_not_resumed(options, given, text, checkpoint):
    """The env that the user named was silently left out."""
    config = TrainConfig(resume=checkpoint, total_frames=80, **options)
    with pytest.raises(RecipeError, match=text):
        train(config, say=lambda _: None, given=given)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.parametrize("given", [None, {"learning_rate", "env", "total_frames"}])
def test_options_that_a_resumed_run_does_not_take_are_told(given, checkpoint, unevaluated):
    options = {"learning_rate": 0.5, "env": odd("Good")}
    config, lines = TrainConfig(resume=checkpoint, total_frames=80, **options), []
    train(config, say=lines.append, given=given)
    told = [line for line in lines if "stays" in line]
    assert told == ["learning_rate stays 0.001, as it was in the run that is resumed, not 0.5."]
    assert Checkpoint.load(checkpoint).config.learning_rate == 0.001


def test_an_env_that_fails_in_the_middle_of_a_run(tiny):
    """Everything since the last checkpoint was lost."""
    with pytest.raises(RecipeError, match=r"stopped after 0 steps: RuntimeError at odd_envs") as e:
        train(replace(tiny, env=odd("BadStepLater")), say=lambda _: None)
    (folder,) = tiny.logdir.iterdir()
    assert Checkpoint.load(folder / "checkpoint.pt").frames == 0
    assert f"--resume {folder / 'checkpoint.pt'} --total-frames 60" in str(e.value)
    assert isinstance(e.value.__cause__, RuntimeError)


@pytest.mark.parametrize("interval", [20, 1000])
def test_a_disk_that_fills_up_in_the_middle_of_a_run(tiny, interval, monkeypatch):
    fsync, calls = os.fsync, []

    def full_soon(file):
        calls.append(file)
        if len(calls) > (3 if interval == 20 else 1):  # a test of the disk, checkpoint, table
            full()
        fsync(file)

    monkeypatch.setattr(os, "fsync", full_soon)
    text = (
        "after 40 .*No space .*; an older checkpoint is" if interval == 20 else "after 60 .*No sp"
    )
    with pytest.raises(RecipeError, match=text):
        train(replace(tiny, checkpoint_interval=interval), say=lambda _: None)
    (folder,) = tiny.logdir.iterdir()
    if interval == 20:
        assert Checkpoint.load(folder / "checkpoint.pt").frames == 20
    assert not list(folder.glob("*.partial"))


def test_an_evaluation_that_fails(tiny, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no picture")

    monkeypatch.setattr(training, "draw_imagination", broken)
    with pytest.raises(RecipeError, match=r"checkpoint written, but not .*: no picture.*evaluate"):
        train(tiny, say=lambda _: None)
    (folder,) = tiny.logdir.iterdir()
    assert Checkpoint.load(folder / "checkpoint.pt").frames == 60


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
    assert main(["evaluate", "--checkpoint", str(run.checkpoint), "--episodes", "1"]) == 0
    assert "odd/Good-v3: mean return 12.0 of 1 episodes" in capsys.readouterr().out


def test_observations_of_integers_beside_floats(tiny):
    """They stopped the run at its first step."""
    run = train(replace(tiny, env=odd("ChoiceInDictObservation")), say=lambda _: None)
    assert run.frames == 60


def test_recipe_uses_only_the_public_api():
    for path in Path(training.__file__).parent.glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith("from layeredrl_trl") and ".recipes" not in line:
                module = line.split()[1]
                assert module.count(".") <= 1, f"{path.name}: {line}"
