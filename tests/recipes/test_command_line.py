"""The command line: what it prints, and that every error is one line with exit status 2."""

import os
import re
import runpy
import sys
import threading

import pytest
import torch

import layeredrl_trl.__main__ as command_line
from layeredrl_trl.__main__ import main
from layeredrl_trl.recipes import memory, results
from tests.extras import needs_dm_control
from tests.recipes.odd_envs import odd
from tests.recipes.tiny_runs import SHORT, TINY, arguments_of, error_of


def test_evaluate_prints_every_episode(trained, capsys):
    assert main(["evaluate", "--run", str(trained), "--env", SHORT, "--episodes", "2"]) == 0
    out = capsys.readouterr().out
    assert "episode   2: return 12.0" in out and "mean return 12.0 of 2 episodes" in out


def test_train(tmp_path, capsys):
    assert main(arguments_of(TINY, env=SHORT, logdir=tmp_path, eval_episodes=1)) == 0
    assert "mean return of 1 evaluation episodes: 12.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "--env", "Pendulm-v1"], "no environment 'Pendulm-v1'.*Pendulum-v1"),
        (["train", "--env", ""], "no environment ''"),
        (["train", "--env", "../../x"], "an id looks like"),
        (["train", "--env", "a:b:c"], "module 'a:b'"),
        (["train", "--env", "\udcff"], r"no environment '\\udcff'"),
        (["train", "--env", "Blackjack-v1"], "no observation made of vectors"),
        (["train", "--env", odd("MultiDiscreteAction")], "the action space MultiDiscrete"),
        (["train", "--env", odd("BadStep")], "fails in its first steps"),
        pytest.param(
            ["train", "--env", "dm_control/cart"],
            "no task 'dm_control/cart'",
            marks=needs_dm_control,
        ),
        (["train", "--seed", "-1"], "seed must not be negative, got -1"),
        (["train", "--seed", "9" * 4000], "seed must be at most 2,147,483,647, got an integer of"),
        (["train", "--seed", "9" * 5000], "--seed: .*digits"),
        (["train", "--updates-per-frame", "inf"], "updates_per_frame must be a finite number"),
        (["train", "--frames-per-batch", "1000000"], "must not exceed total_frames=3000"),
        (["train", "--total-frames", "1000000000"], "GiB of memory"),
        (["train", "--hidden-size", "60000"], "GiB of memory"),
        (["train", "--num-candidates", "2", "--top-k", "2"], "no room"),
        (["train", "--device", "cpu:0"], "device must be cpu, cuda or cuda:N"),
        (["train", "--logdir", "file"], "logdir: cannot write to 'file'"),
        (["train", "--logdir", "file/runs"], "logdir: cannot write to 'file/runs'"),
        (["train", "--logdir", "a\0b"], "logdir: cannot write to"),
        (["train", "--resume", "nowhere"], "no folder 'nowhere'"),
        (["train", "--resume", "file"], "no folder 'file'"),
        (["train", "--resume", "."], "no whole checkpoint"),
        (["train", "--dataset", "file"], "dataset: 'file' cannot be used"),
        (["train", "--num-envs", "3"], "frames_per_batch must be a multiple of .* = 6"),
        (["train", "--asynchronous"], "asynchronous must be False with num_workers=1"),
        (["evaluate", "--run", "nowhere"], "no folder 'nowhere'"),
        (["evaluate", "--run", "."], "no whole checkpoint"),
        (["evaluate", "--run", "file", "--episodes", "0"], "episodes must be positive"),
        (["evaluate", "--run", "file", "--episodes", "1000000"], "episodes must be at most"),
        (["evaluate", "--run", "file", "--seed", "-1"], "seed must not be negative"),
        # what tyro says
        ([], "Expected one of {train, evaluate}"),
        (["trian"], "options: trian; Available subcommands: train, evaluate"),
        (["evaluate"], "--run PATH"),
        (["train", "--foo"], "options: --foo"),
        (["train", "--sed", "3"], "meant: --seed INT"),
        (["train", "--seed"], "Missing value for argument '--seed'"),
        (["train", "--seed", "x"], "--seed: invalid literal .*'x'"),
        (["train", "--seed", "a\nb"], "--seed: invalid literal"),
        (["train", "--total-frames", "10**15"], "--total-frames: invalid literal"),
        (["train", "--planner", "cme"], "invalid choice 'cme' .*'icem', 'cem', 'mppi'"),
    ],
    ids=lambda x: ascii(" ".join(x))[:60] if isinstance(x, list) else "",
)
def test_a_wrong_option_gets_one_line_and_writes_nothing(
    arguments, text, capsys, tmp_path, monkeypatch
):
    """Some of these had a traceback, or a box of several lines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert re.search(text, error_of(arguments, capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_error_of_an_option_is_not_touched_by_tyro(capsys):
    assert error_of(["train", "--gamma", "2"], capsys) == "error: gamma must be in [0, 1], got 2.0."


BOX = """\
\x1b[31m╭─ \x1b[1mValue error\x1b[0m\x1b[31m ──────────╮\x1b[0m
\x1b[31m│\x1b[0m \x1b[1mError parsing --seed:\x1b[0m a long  \x1b[31m│\x1b[0m
\x1b[31m│\x1b[0m reason                 \x1b[31m│\x1b[0m
\x1b[31m│ ─────────────────────── │\x1b[0m
\x1b[31m│\x1b[0m Argument helptext:      \x1b[31m│\x1b[0m
\x1b[31m│\x1b[0m     --seed INT          \x1b[31m│\x1b[0m
\x1b[31m╰─────────────────────────╯\x1b[0m
"""


@pytest.mark.parametrize("text", [BOX, re.sub(r"\x1b\[\d*m", "", BOX)], ids=["colours", "plain"])
def test_the_box_of_tyro(text):
    line = command_line._in_the_box(text)
    assert line == "--seed: a long reason; see `python -m layeredrl_trl --help`."


@pytest.mark.parametrize("environment", [{"COLUMNS": "40"}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_the_box_of_tyro_in_other_terminals(environment, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = "Unrecognized options: trian; Available subcommands: train, evaluate; see"
    assert text in error_of(["trian"], capsys)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_is_no_error(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert not exit_.value.code and "train" in capsys.readouterr().out


def test_an_env_that_fails_later_on(tmp_path, capsys):
    error = error_of(arguments_of(TINY, env=odd("BadStepLater"), logdir=tmp_path), capsys)
    assert "the run has stopped after 0 steps: RuntimeError at odd_envs.py" in error
    (folder,) = tmp_path.iterdir()
    command = ["evaluate", "--run", str(folder), "--env", odd("BadStepLater")]
    error = error_of(command, capsys)
    assert "an evaluation episode failed: RuntimeError at odd_envs.py" in error
    assert "report" not in error  # it is the env's doing


def test_an_evaluation_that_does_not_fit_into_memory(trained, monkeypatch, capsys):
    monkeypatch.setattr(memory, "machine_memory", lambda: 2**20)
    command = ["evaluate", "--run", str(trained), "--env", SHORT, "--episodes"]
    assert "eval_episodes, num_candidates" in error_of([*command, "1000"], capsys)
    assert main([*command, "1"]) == 0


@pytest.mark.parametrize("arguments", [["--env", "Pendulum-v1"], ["--env=Pendulum-v1"]])
def test_an_env_that_is_not_that_of_the_checkpoint(arguments, trained, capsys):
    """Its module would be imported, so that the id has to be given; another one does not do."""
    command = ["train", "--resume", str(trained), "--total-frames", "80", *arguments]
    assert "give --env with this id" in error_of(command, capsys)


def test_an_error_that_nobody_foresaw(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise LookupError("two\nlines")

    monkeypatch.setattr(command_line, "train", broken)
    error = error_of(["train"], capsys)
    assert re.search(r"LookupError at test_command_line.py:\d+: two lines. .* report it", error)
    monkeypatch.setenv("LAYEREDRL_TRL_TRACEBACK", "1")
    assert main(["train"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_in_the_final_evaluation_is_no_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "run_episodes", interrupt)
    options = "--total-frames 40 --init-random-frames 40 --updates-per-frame 0.1"
    assert main(["train", "--logdir", str(tmp_path), *options.split()]) == 130
    assert "Interrupted" in capsys.readouterr().err
    assert list(tmp_path.glob("*/checkpoints/checkpoint-*040"))


def test_an_error_in_a_thread_is_told_by_the_main_thread_only(monkeypatch, capsys):
    """TensorBoard's thread printed a traceback where the disk was full."""

    def fail():
        raise OSError("full")

    def broken(*args, **kwargs):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        fail()

    hook = threading.excepthook
    monkeypatch.setattr(command_line, "train", broken)
    assert error_of(["train"], capsys) == "error: full"
    assert threading.excepthook is hook


def test_output_that_nobody_reads(trained, monkeypatch):
    """Python itself complained about the closed pipe when it ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["evaluate", "--run", str(trained), "--env", SHORT, "--episodes", "1"]) == 2
        stdout.flush()


def test_a_name_that_the_terminal_cannot_print(tmp_path, monkeypatch):
    """The results of a finished run ended in an error of encoding."""
    with open(tmp_path / "out", "w", encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(command_line, "evaluate", lambda _: print("runs/é"))
        assert main(["evaluate", "--run", "x"]) == 0
    assert (tmp_path / "out").read_text() == "runs/\\xe9\n"


def test_the_number_of_threads(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(command_line, "evaluate", lambda _: None)
    assert main(["evaluate", "--run", "x", "--num-threads", "3"]) == 0
    assert seen == [3]


@pytest.mark.parametrize("package", ["tyro", "tqdm", "matplotlib"])
def test_a_missing_package_of_the_extra(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    monkeypatch.delitem(sys.modules, "layeredrl_trl.__main__")  # runpy warns of it
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("layeredrl_trl.__main__")
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert package in error and "pip install 'layeredrl_trl[demo]'" in error
