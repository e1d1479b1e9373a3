"""The main job on a few steps: what it writes, that it goes on, and what bad input gets."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layeredrl_trl.__main__ import main
from layeredrl_trl.recipes import RecipeError, TrainConfig, make_env, train, training
from layeredrl_trl.recipes.agent import make_predictor
from layeredrl_trl.recipes.checkpoint import Checkpoint, restore
from tests.extras import needs_dm_control

TINY = TrainConfig(
    total_frames=60,
    init_random_frames=40,
    frames_per_batch=20,
    updates_per_frame=0.1,
    batch_size=16,
    hidden_size=16,
    planning_horizon=3,
    num_candidates=8,
    top_k=2,
    optim_steps=1,
    eval_episodes=2,
)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> TrainConfig:
    monkeypatch.setattr("layeredrl_trl.recipes.evaluation.max_episode_steps", lambda _: 12)
    return replace(TINY, logdir=tmp_path / "runs")


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


def test_random_steps_are_marked_as_not_planned(tiny):
    run = train(tiny, say=lambda _: None)
    planned = Checkpoint.load(run.checkpoint).transitions["planned"].squeeze(-1)
    assert planned.tolist() == [False] * 40 + [True] * 20


def test_phases_of_random_actions_later_on(tiny):
    config = replace(tiny, total_frames=100, planned_frames=25, random_frames=15)
    run = train(config, say=lambda _: None)
    planned = Checkpoint.load(run.checkpoint).transitions["planned"].squeeze(-1)
    assert planned.tolist() == [False] * 40 + [True] * 25 + [False] * 15 + [True] * 20


def test_repeated_steps_count_as_steps(tiny):
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


def test_ctrl_c_saves_a_checkpoint_that_can_be_gone_on_from(tiny, monkeypatch):
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


def test_a_resumed_run_began_with_the_same_episodes_again(tiny):
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


def test_a_finished_run_is_not_resumed(tiny):
    run = train(tiny, say=lambda _: None)
    with pytest.raises(RecipeError, match="has taken 60 steps already; raise total_frames"):
        train(replace(tiny, resume=run.checkpoint))


def test_a_full_disk_leaves_the_older_checkpoint(tiny, monkeypatch):
    run = train(tiny, say=lambda _: None)
    before = run.checkpoint.read_bytes()

    def full(*_args, **_kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        Checkpoint.save(
            Checkpoint(config=tiny, frames=1, episodes=[], predictor={}, transitions={}),
            run.checkpoint,
        )
    assert run.checkpoint.read_bytes() == before
    assert not run.checkpoint.with_suffix(".partial").exists()


def test_a_checkpoint_restores_every_number(tiny):
    run = train(tiny, say=lambda _: None)
    checkpoint = Checkpoint.load(run.checkpoint)
    assert checkpoint.config == tiny
    predictor = make_predictor(tiny, make_env(tiny.env))
    restore(predictor, checkpoint.predictor, run.checkpoint)
    for key, value in predictor.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, checkpoint.predictor[key], rtol=0, atol=0)


def test_a_checkpoint_of_another_architecture(tiny):
    run = train(tiny, say=lambda _: None)
    checkpoint = Checkpoint.load(run.checkpoint)
    predictor = make_predictor(replace(tiny, hidden_size=8), make_env(tiny.env))
    before = {k: v for k, v in predictor.state_dict().items() if isinstance(v, torch.Tensor)}
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(RecipeError, match=r"another architecture.*here \[.*in the file \["):
        restore(predictor, checkpoint.predictor, run.checkpoint)
    after = predictor.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_evaluate_prints_every_episode(tiny, capsys):
    run = train(tiny, say=lambda _: None)
    assert main(["evaluate", "--checkpoint", str(run.checkpoint), "--episodes", "2"]) == 0
    out = capsys.readouterr().out
    assert "episode   2: return" in out and "mean return" in out


def test_episodes_csv_holds_every_finished_episode(tiny):
    run = train(replace(tiny, total_frames=220), say=lambda _: None)
    rows = list(csv.reader((run.folder / "episodes.csv").read_text().splitlines()))
    assert rows[0] == ["env_steps", "return"] and [row[0] for row in rows[1:]] == ["200"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "--env", "Pendulm-v1"], "no environment 'Pendulm-v1'.*Pendulum-v1"),
        (["train", "--env", "Blackjack-v1"], "no observation made of vectors"),
        pytest.param(
            ["train", "--env", "dm_control/cart"],
            "no task 'dm_control/cart'",
            marks=needs_dm_control,
        ),
        (["train", "--resume", "nowhere.pt"], "no file 'nowhere.pt'"),
        (["evaluate", "--checkpoint", "nowhere.pt"], "no file 'nowhere.pt'"),
        (["evaluate", "--checkpoint", __file__], "cannot be read"),
    ],
)
def test_a_wrong_option_gets_one_line_and_writes_nothing(
    arguments, text, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(text, error)
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_the_planner_refuses_gets_one_line_too(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--num-candidates", "2", "--top-k", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no room" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_the_final_evaluation_is_no_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "run_episodes", interrupt)
    options = "--total-frames 40 --init-random-frames 40 --updates-per-frame 0"
    arguments = ["train", "--logdir", str(tmp_path), *options.split()]
    assert main(arguments) == 130
    assert "Interrupted" in capsys.readouterr().err
    assert list(tmp_path.glob("*/checkpoint.pt"))


def test_a_run_interrupted_at_once_can_be_gone_on_from(tiny, monkeypatch):
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


def test_an_unwritable_log_folder(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["train", "--logdir", str(blocked / "runs")]) == 2
    error = capsys.readouterr().err
    assert "logdir: cannot write to" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--seed", "x"], ["train", "--foo"]])
def test_an_unknown_choice_names_the_choices(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert any(word in text for word in ("train, evaluate", "--seed INT", "options: --foo"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"total_frames": 0}, "total_frames must be positive"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"gamma": float("nan")}, "gamma must be a finite number, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number, got inf"),
        ({"updates_per_frame": float("inf")}, "updates_per_frame must be a finite number"),
        ({"clip_grad_max_norm": float("nan")}, "clip_grad_max_norm must be a finite number"),
        ({"seed": float("nan")}, "seed must be an integer, got nan"),
        ({"batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"n_models": True}, "n_models must be an integer, got True"),
        ({"learning_rate": "x"}, "learning_rate must be a finite number, got x"),
        ({"terminal_value": "no"}, "terminal_value must be True or False, got no"),
        ({"planner": "cme"}, r"planner must be one of \['icem', 'cem', 'mppi'\], got cme"),
        ({"top_k": 200}, "top_k must not exceed num_candidates=128"),
        ({"init_random_frames": 9999}, "init_random_frames must not exceed"),
        ({"device": "tpu"}, "device must be cpu"),
        ({"updates_per_frame": -1.0}, "must not be negative"),
        ({"planned_frames": -1}, "planned_frames must not be negative"),
        ({"planned_frames": 5}, "planned_frames and random_frames must both"),
        ({"num_particles": 7}, "num_particles must be below n_models=5 or a multiple"),
        (
            {"action_repeat": 2, "planned_frames": 7, "random_frames": 2},
            "planned_frames must be a multiple of action_repeat=2, got 7",
        ),
        ({"action_repeat": 7}, "total_frames must be a multiple of action_repeat=7, got 3000"),
    ],
)
def test_options_out_of_range(change, text):
    with pytest.raises(RecipeError, match=text):
        TrainConfig(**change)


def test_recipe_uses_only_the_public_api():
    for path in Path(training.__file__).parent.glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith("from layeredrl_trl") and ".recipes" not in line:
                module = line.split()[1]
                assert module.count(".") <= 1, f"{path.name}: {line}"
