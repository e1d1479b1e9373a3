"""Runs that go on from a checkpoint, to the bit as if they had not stopped."""

import errno
import os
import shutil
import signal
from dataclasses import replace

import pytest

from layeredrl_trl.recipes import RecipeError, TrainConfig, train, training
from layeredrl_trl.recipes.run_folder import RunFolder
from layeredrl_trl.trainers import EpisodeLog, PredictorTrainer, episode_log
from tests.recipes.tiny_runs import (
    SHORT,
    TINY,
    checkpoints,
    content_of,
    damage,
    do_at,
    frames_saved,
    rows_of,
)

LENGTH = 100
LONG = replace(TINY, total_frames=LENGTH, updates_per_frame=0.3, checkpoint_interval=20)
KINDS = {
    "Pendulum-v1": {"env": "Pendulum-v1"},
    "CartPole-v1": {"env": "CartPole-v1"},
    "InvertedPendulum-v5": {"env": "InvertedPendulum-v5"},
    "no state": {"env": SHORT},
    "two envs": {"env": "CartPole-v1", "num_envs": 2},
    "phases": {"action_repeat": 2, "planned_frames": 8, "random_frames": 14},
}
MOMENTS = (20, 40, 80)
CASES = [
    *((kind, moment) for kind in list(KINDS)[:4] for moment in MOMENTS),
    *((kind, 60) for kind in list(KINDS)[4:]),
]


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def go_on(folder, frames=LENGTH, env="Pendulum-v1", say=lambda _: None):
    config = TrainConfig(resume=folder, total_frames=frames, env=env)
    return train(config, say=say, given={"env"} if ":" in env else ())


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Make a run of a kind without a stop; its folder is copied after each batch.

    The copies are what ``kill -9`` would have left before the checkpoint of that batch.
    """
    made = {}

    def make(kind):
        if kind not in made:
            logdir = tmp_path_factory.mktemp("whole")
            save = PredictorTrainer.save_trainer

            def copy_and_save(trainer, force_save=False):
                (folder,) = (logdir / "run").iterdir()
                shutil.copytree(folder, logdir / str(trainer.collected_frames))
                save(trainer, force_save)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "_evaluate", lambda *_: None)
                patch.setattr(PredictorTrainer, "save_trainer", copy_and_save)
                config = replace(LONG, logdir=logdir / "run", **KINDS[kind])
                made[kind] = train(config, say=lambda _: None).folder
        return made[kind]

    return make


@pytest.fixture
def config(tmp_path, unevaluated):
    return replace(LONG, logdir=tmp_path, **KINDS["CartPole-v1"])


@pytest.mark.parametrize(("kind", "moment"), CASES)
def test_a_resumed_run_ends_with_the_files_of_one_that_never_stopped(
    kind, moment, whole_runs, unevaluated
):
    whole = whole_runs(kind)
    killed = whole.parent.parent / str(moment + 20)  # 20 steps are lost
    assert frames_saved(killed)[-1] == moment
    run = go_on(killed, env=KINDS[kind].get("env", "Pendulum-v1"))
    assert content_of(run.folder) == content_of(whole)
    assert (
        rows_of(run.folder)["planned"].numel() * replace(LONG, **KINDS[kind]).action_repeat == 100
    )


def test_episodes_of_an_env_without_a_state_end_at_checkpoints(whole_runs):
    """They cannot go on there in a resumed run, and so must not in any other."""
    rows = rows_of(whole_runs("no state"))
    ends = rows["next", "done"].squeeze(-1).nonzero().flatten().tolist()
    assert ends == [11, 19, 31, 39, 51, 59, 71, 79, 91, 99]
    assert rows["next", "truncated"].equal(rows["next", "done"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_batch_with_a_checkpoint(
    number, config, whole_runs, monkeypatch
):
    before, lines = signal.getsignal(number), []
    with monkeypatch.context() as patch:
        do_at(60, lambda: signal.raise_signal(number), patch)
        run = train(replace(config, checkpoint_interval=1000), say=lines.append)
    assert run.interrupted and run.frames == 60 and signal.getsignal(number) is before
    assert frames_saved(run.folder) == [60]
    assert f"Interrupted after 60 steps. Checkpoint: {checkpoints(run.folder)[0]}" in lines
    assert f"train --resume {run.folder} --total-frames 100" in lines[-1]
    assert not go_on(run.folder).interrupted
    saved, whole = content_of(run.folder), content_of(whole_runs("CartPole-v1"))
    differing = [name for name in saved | whole if saved.get(name) != whole.get(name)]
    assert [name.split("/")[1].partition("-")[2] for name in differing] == [
        "config"
    ]  # the interval


def test_a_second_signal_ends_a_run_at_once(config, whole_runs, monkeypatch):
    def interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    lines = []
    with monkeypatch.context() as patch:
        do_at(60, interrupt, patch)
        run = train(config, say=lines.append)
    assert run.interrupted and frames_saved(run.folder) == [20, 40]
    assert f"Interrupted after 60 steps. Checkpoint: {checkpoints(run.folder)[1]}" in lines
    assert content_of(go_on(run.folder).folder) == content_of(whole_runs("CartPole-v1"))


def test_a_second_signal_before_the_first_checkpoint(config, monkeypatch):
    def interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    lines = []
    do_at(20, interrupt, monkeypatch)
    run = train(config, say=lines.append)
    assert run.interrupted and lines == [
        "Interrupted after 20 steps. Checkpoint: none was written yet"
    ]


def test_a_run_interrupted_in_its_first_batch_can_be_gone_on_from(config, whole_runs, monkeypatch):
    with monkeypatch.context() as patch:
        do_at(20, lambda: signal.raise_signal(signal.SIGINT), patch)
        run = train(config, say=lambda _: None)
    assert run.interrupted and run.frames == 20
    assert content_of(go_on(run.folder).folder) == content_of(whole_runs("CartPole-v1"))


@pytest.mark.parametrize(("total_frames", "expected"), [(50, 60), (60, 60), (61, 80)])
def test_a_run_takes_whole_batches(tiny, unevaluated, total_frames, expected):
    """The buffer was too small for the last batch, which took the place of the first steps."""
    run = train(replace(tiny, total_frames=total_frames), say=lambda _: None)
    rows = rows_of(run.folder)
    assert run.frames == len(rows) == expected and frames_saved(run.folder) == [expected]
    assert not rows["planned"][:40].any()
    longer = go_on(run.folder, expected + 5)
    assert longer.frames == len(rows_of(run.folder)) == expected + 20
    assert (rows_of(run.folder)[:expected] == rows).exclude("index").all()


def test_no_slice_goes_from_a_break_into_the_next_episode(tiny, unevaluated, monkeypatch):
    """After an error the env is not where it was."""
    with monkeypatch.context() as patch:
        patch.setattr(training.PlannerLog, "__call__", lambda *_: full())
        with pytest.raises(RecipeError, match="stopped after 20 steps: OSError"):
            train(tiny, say=lambda _: None)
    (folder,) = tiny.logdir.iterdir()
    assert frames_saved(folder) == [20]
    assert go_on(folder, 60).frames == 60
    ends = rows_of(folder)["next", "truncated"].squeeze(-1).nonzero().flatten()
    assert ends.tolist() == [19]


def test_a_finished_run_is_not_resumed(trained):
    with pytest.raises(RecipeError, match="has taken 60 steps already; raise total_frames"):
        go_on(trained, 60, SHORT)


def test_a_resumed_run_shorter_than_its_first_phase(tiny, unevaluated, monkeypatch):
    """It was trained, and then could not be saved."""
    with monkeypatch.context() as patch:
        do_at(20, lambda: signal.raise_signal(signal.SIGINT), patch)
        run = train(tiny, say=lambda _: None)
    with pytest.raises(RecipeError, match="init_random_frames must not exceed total_frames=30"):
        go_on(run.folder, 30)
    assert frames_saved(run.folder) == [20]


def test_a_resumed_run_may_be_shorter_than_it_was_meant_to_be(config, monkeypatch):
    """Its smaller buffer did not take the rows of the larger one, and it could not be resumed."""
    with monkeypatch.context() as patch:
        do_at(60, lambda: signal.raise_signal(signal.SIGINT), patch)
        run = train(replace(config, total_frames=400), say=lambda _: None)
    assert go_on(run.folder, 80).frames == len(rows_of(run.folder)) == 80
    assert go_on(run.folder, 120).frames == len(rows_of(run.folder)) == 120


def test_one_process_writes_to_a_folder(trained, unevaluated):
    """Three that resumed one run raced for its files."""
    before = content_of(trained)
    with RunFolder(trained).locked(), pytest.raises(RecipeError, match="another process is writ"):
        go_on(trained, 80, SHORT)
    assert content_of(trained) == before
    assert go_on(trained, 80, SHORT).frames == 80


def test_a_resumed_run_whose_folder_takes_no_file(trained, monkeypatch):
    """It was trained, and then could not be saved."""
    before = sorted(trained.rglob("*"))
    monkeypatch.setattr(os, "fsync", lambda _: full())
    with pytest.raises(RecipeError, match=r"resume: cannot write to .*No space left on device"):
        go_on(trained, 80, SHORT)
    assert sorted(trained.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "env", "given"),
    [("Pendulum-v1", "CartPole-v1", None), ("CartPole-v1", "Pendulum-v1", {"env"})],
)
def test_a_run_of_another_env_is_not_resumed(kind, env, given, whole_runs):
    """The env that the user named was silently left out; Pendulum-v1 is the default."""
    folder = whole_runs(kind)
    before = sorted(folder.rglob("*"))
    with pytest.raises(RecipeError, match=f"is a run of the environment {kind}, not of '{env}'"):
        train(TrainConfig(resume=folder, total_frames=120, env=env), say=print, given=given)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("given", [None, {"learning_rate", "env", "total_frames"}])
def test_options_that_a_resumed_run_does_not_take_are_told(given, trained, unevaluated):
    config = TrainConfig(resume=trained, total_frames=80, learning_rate=0.5, env=SHORT)
    lines = []
    train(config, say=lines.append, given=given)
    told = [line for line in lines if "stays" in line]
    assert told == ["learning_rate stays 0.001, as it was in the run that is resumed, not 0.5."]
    folder = RunFolder(trained)
    saved = folder.read_config(folder.latest(), device="cpu", env=SHORT)
    assert (saved.learning_rate, saved.total_frames) == (0.001, 80)


def test_a_damaged_checkpoint_is_passed_over(trained, unevaluated):
    damage(checkpoints(trained)[-1])
    with pytest.warns(UserWarning, match="checkpoint-000000000060' is not whole: .*older one"):
        run = go_on(trained, 80, SHORT)
    assert run.frames == 80 and len(rows_of(trained)) == 80
    assert frames_saved(trained) == [40, 80]
    go_on(trained, 100, SHORT)


def test_a_disk_that_fills_up_in_the_middle_of_a_run(config, whole_runs, monkeypatch):
    """The older checkpoint stays, and the run goes on from it as if nothing had been."""
    with monkeypatch.context() as patch:
        do_at(60, lambda: patch.setattr(os, "fsync", lambda _: full()), patch)
        with pytest.raises(
            RecipeError, match=r"after 60 .*No space .*; an older checkpoint is"
        ) as e:
            train(config, say=lambda _: None)
    (folder,) = config.logdir.iterdir()
    assert frames_saved(folder) == [20, 40] and f"--resume {folder}" in str(e.value)
    assert content_of(go_on(folder).folder) == content_of(whole_runs("CartPole-v1"))


def test_a_disk_that_fills_up_before_the_first_checkpoint(config, monkeypatch):
    do_at(60, lambda: monkeypatch.setattr(os, "fsync", lambda _: full()), monkeypatch)
    with pytest.raises(RecipeError, match=r"after 100 .*No space") as error:
        train(replace(config, checkpoint_interval=1000), say=lambda _: None)
    assert "older" not in str(error.value) and "--resume" not in str(error.value)


def test_a_row_that_the_log_could_not_take_whole(config, monkeypatch):
    """Half of it stayed there, and the next row came right after it."""

    class HalfWriter:
        def __init__(self, file):
            self.file = file

        def writerows(self, _):
            self.file.write("60,1")
            full()

    with monkeypatch.context() as patch:
        do_at(60, lambda: patch.setattr(episode_log.csv, "writer", HalfWriter), patch)
        with pytest.raises(RecipeError, match=r"after 60 .*No space"):
            train(config, say=lambda _: None)
    (folder,) = config.logdir.iterdir()
    go_on(folder)
    rows = rows_of(folder)
    ended = rows["next", "terminated"].squeeze(-1).nonzero().flatten() + 1
    assert [step for step, _ in EpisodeLog(folder / "episodes.csv").episodes()] == ended.tolist()
