"""Folders that no two runs share, and files that are complete or not there."""

import csv
import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from layeredrl_trl.recipes import RecipeError, files


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    """Each looked for a free name first and made the folder later."""
    monkeypatch.setattr(files.time, "strftime", lambda _: "20260101-000000")
    together = Barrier(8)

    def start(_):
        together.wait()
        return [files.make_folder(tmp_path / "runs", "Pendulum-v1", 3) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        folders = [folder for some in pool.map(start, range(8)) for folder in some]
    assert len(set(folders)) == 80 and all(folder.is_dir() for folder in folders)
    assert min(folders).name == "Pendulum-v1_seed3_20260101-000000"


def test_a_name_that_another_run_takes_at_the_last_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(files.time, "strftime", lambda _: "now")
    monkeypatch.setattr(files.Path, "exists", lambda _: False)
    (tmp_path / "A_seed0_now").mkdir()
    assert files.make_folder(tmp_path, "A", 0).name == "A_seed0_now-2"


@pytest.mark.parametrize(
    "env_id",
    ["module:Name-v0", "my.module:space/Name-v0", "../../x", "/etc/x", "..", "a b\0\n", "é" * 500],
)
def test_names_of_folders(env_id, tmp_path):
    folder = files.make_folder(tmp_path / "runs", env_id, 2**31 - 1)
    assert folder.parent == tmp_path / "runs" and folder.resolve().parent == tmp_path / "runs"
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", folder.name)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    """TensorBoard's thread failed on it, with a traceback."""
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecipeError, match=r"logdir: cannot write to .*No space left on device"):
        files.make_folder(tmp_path, "A", 0)
    with pytest.raises(RecipeError, match=r"resume: cannot write to .*No space left on device"):
        files.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("logdir", ["file", "file/runs", "a\0b", "a" * 300])
def test_a_logdir_that_cannot_be_made(logdir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="logdir: cannot write to"):
        files.make_folder(tmp_path / logdir, "A", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", ["csv", "json", "text"])
def test_a_file_that_cannot_be_completed_leaves_the_older_one(write, tmp_path, monkeypatch):
    """The table of episodes was emptied before it was written."""
    path = tmp_path / "x.txt"
    path.write_text("older")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        if write == "csv":
            files.write_csv(path, [("a", "b")])
        elif write == "json":
            files.write_json(path, {"a": 1})
        else:
            with files.replacing(path) as file:
                file.write("newer")
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_older_file_is_not_disturbed(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("older")
    with path.open() as older:
        with files.replacing(path) as file:
            file.write("newer")
        assert older.read() == "older"
    assert path.read_text() == "newer" and list(tmp_path.iterdir()) == [path]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    """NaN is no JSON: only Python reads it."""
    nan, inf = float("nan"), float("inf")
    content = {"a": nan, "b": [1.0, inf, {"c": -inf}], "d": "NaN", "e": (nan, 2), "f": True}
    files.write_json(tmp_path / "x.json", content)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert read == {
        "a": None,
        "b": [1.0, None, {"c": None}],
        "d": "NaN",
        "e": [None, 2],
        "f": True,
    }


def test_csv(tmp_path):
    files.write_csv(tmp_path / "x.csv", [("steps", "return"), (200, -1.5)])
    with (tmp_path / "x.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["steps", "return"], ["200", "-1.5"]]
