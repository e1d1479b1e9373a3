"""The cache of learning curves: runs are taken again only of the version that is being tabled."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import learning_curves
from benchmarks.learning_curves import TASKS, UNKNOWN, code_version, run, table

TASK = TASKS["pendulum"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two files, in place of the library."""
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text("one = 1\n")
    (package / "part" / "two.py").write_text("two = 2\n")
    monkeypatch.setattr(learning_curves, "code_version", lambda: code_version(package))
    return package


@pytest.fixture
def commands(monkeypatch):
    """Runs that only leave their files; returns the commands."""
    commands = []

    def leave_files(command, **kwargs):
        commands.append(command)
        leave_run(Path(command[command.index("--logdir") + 1]), -100.0 - len(commands))

    monkeypatch.setattr(learning_curves.subprocess, "run", leave_files)
    return commands


def leave_run(folder, value, name="run"):
    (folder / name).mkdir(parents=True)
    summary = {"eval_returns": [value], "seconds": 60.0}
    (folder / name / "summary.json").write_text(json.dumps(summary))
    (folder / name / "episodes.csv").write_text("env_steps,return\n200,-1000.0\n")


def test_a_run_is_done_once(package, commands, tmp_path):
    one, again = (run(TASK, 0, tmp_path / "runs") for _ in range(2))
    assert one == again and one["is_current"] and len(commands) == 1
    run(TASK, 1, tmp_path / "runs")
    assert len(commands) == 2


def test_runs_of_older_code_were_taken_for_runs_of_this_one(package, commands, tmp_path):
    old = run(TASK, 0, tmp_path / "runs")
    (package / "part" / "two.py").write_text("two = 3\n")
    new = run(TASK, 0, tmp_path / "runs")
    assert len(commands) == 2 and new["version"] != old["version"]
    assert (old["eval_returns"], new["eval_returns"]) == ([-101.0], [-102.0])


def test_any_version_takes_them_and_says_so(package, commands, tmp_path):
    old = run(TASK, 0, tmp_path / "runs")
    (package / "part" / "two.py").write_text("two = 3\n")
    reused = run(TASK, 0, tmp_path / "runs", any_version=True)
    assert reused["eval_returns"] == old["eval_returns"] and not reused["is_current"]
    new = run(TASK, 1, tmp_path / "runs", any_version=True)
    assert new["is_current"] and len(commands) == 2
    text = table({"pendulum": [reused, new]})
    assert f"{old['version']}: seeds 0; this version: seeds 1" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1
    run(TASK, 0, tmp_path / "runs")  # a run of this version goes before the older one
    assert run(TASK, 0, tmp_path / "runs", any_version=True)["is_current"]
    assert "version" not in table({"pendulum": [new]})


def test_runs_from_before_versions_were_noted(package, commands, tmp_path):
    place = tmp_path / "runs" / "Pendulum-v1_2000_default" / "seed0"
    leave_run(place, -1.0, "early")
    leave_run(place, -2.0, "late")
    os.utime(place / "early" / "summary.json", (1, 1))
    reused = run(TASK, 0, tmp_path / "runs", any_version=True)
    assert reused["eval_returns"] == [-2.0] and not commands
    assert f"| {UNKNOWN} |" in table({"pendulum": [reused]})
    assert run(TASK, 0, tmp_path / "runs")["is_current"] and commands


def test_the_version_is_that_of_all_source_files(package):
    first = code_version(package)
    assert first == code_version(package) and "_torch-" in first and "_torchrl-" in first
    (package / "notes.md").write_text("not code")
    assert code_version(package) == first
    (package / "part" / "three.py").write_text("")
    more = code_version(package)
    (package / "part" / "three.py").rename(package / "three.py")
    assert len({first, more, code_version(package)}) == 3
