import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchrl.checkpoint import CheckpointError, CheckpointRotation

from layeredrl_trl.checkpoints import publishing
from layeredrl_trl.checkpoints.publishing import remove_leftovers
from tests.checkpoints.checkpointed import assert_equal, files_in, whole_state
from tests.checkpoints.whole_runs import Everything

# Interrupted saves.


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch, again):
    run, other = Everything(tmp_path, 1), Everything(tmp_path / "other", 2)
    rotation = CheckpointRotation(tmp_path / "run", keep_last=2)
    first, before = rotation.save(run.checkpoint, step=1), run.state()
    run.go_on(1)
    folders = (tmp_path / "run", tmp_path / "rows")
    files = [files_in(folder) for folder in folders]
    for fails_at in range(99):
        calls = []

        def full(descriptor, calls=calls, fails_at=fails_at):
            calls.append(descriptor)
            if len(calls) == fails_at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                path = rotation.save(run.checkpoint, step=1 if again else 2)
            except CheckpointError as error:
                assert "No space left on device" in str(error) and "\n" not in str(error)
            else:
                break
        assert [files_in(folder) for folder in folders] == files
        if fails_at % 9 == 0:
            other.checkpoint.load(first)
            assert_equal(other.state()["buffer"], before["buffer"])
    assert fails_at > 10
    other.checkpoint.load(path)
    assert_equal(other.state()["buffer"], whole_state(run.buffer))


def test_no_file_is_written_through_a_mapping(tmp_path, monkeypatch):
    """On a full disk, writing to a mapping of a file kills the process (SIGBUS)."""
    mapped, from_file = [], torch.from_file

    def watched(filename, *args, **options):
        mapped.append(os.path.realpath(filename))
        return from_file(filename, *args, **options)

    run = Everything(tmp_path, 1)
    monkeypatch.setattr(torch, "from_file", watched)
    run.checkpoint.save(tmp_path / "a")
    assert len(mapped) == 4 and not [name for name in mapped if str(tmp_path) in name]


KILLED = """
import itertools, logging, os, signal, sys, warnings
from pathlib import Path
import torch
from torchrl.checkpoint import CheckpointRotation
from layeredrl_trl.checkpoints import publishing
from layeredrl_trl.checkpoints.publishing import remove_leftovers
from layeredrl_trl.checkpoints.stored_rows import StoredRows
from layeredrl_trl.checkpoints.whole_checkpoint import WholeCheckpoint, latest_whole
from tests.checkpoints.checkpointed import assert_equal, make_buffer, transitions, whole_state

logging.getLogger("torchrl").setLevel(logging.ERROR)
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # what it is for is a power cut
CHANGES = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "ctypes.dlsym"}

def make(run):
    buffer, counters = make_buffer(), {"frames": 0}
    checkpoint = WholeCheckpoint(counters=counters, layer=torch.nn.Linear(2, 2))
    rows = StoredRows(run / "rows", chunk_rows=8)
    return buffer, counters, checkpoint.register("buffer", buffer, adapter=rows)

def die_at(turn, run):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in CHANGES and (event == "ctypes.dlsym" or str(run) in str(args[0])):
            seen += 1
            if seen == turn:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def kill_saves(run, same, stride):
    buffer, counters, checkpoint = make(run)
    rotation = CheckpointRotation(run, keep_last=1)
    buffer.extend(transitions(30))
    path = rotation.save(checkpoint, step=1)
    states = {0: whole_state(buffer)}
    buffer.extend(transitions(25, 1))
    counters["frames"] = 1
    states[1] = whole_state(buffer)
    outcomes = []
    for turn in itertools.count(1, stride):
        child = os.fork()
        if child == 0:
            die_at(turn, run)
            rotation.save(checkpoint, step=1 if same else 2)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        for cleared in (False, True):
            if cleared:
                remove_leftovers(run)
                assert not [p for p in run.iterdir() if p.name.startswith(".")]
            whole = latest_whole(rotation)
            other, loaded, into = make(run.with_name("other"))
            into.load(whole)
            assert_equal(whole_state(other), states[loaded["frames"]])
        assert rotation.latest() == whole
        outcomes.append(loaded["frames"])
        if loaded["frames"] == 1:  # back to the older one, for the next turn
            for path in rotation.checkpoints():
                path.rename(run / f"gone-{turn}-{path.name}")
            buffers = make(run)
            buffers[0].extend(transitions(30))
            rotation.save(buffers[2], step=1)
        if status == 0:
            return outcomes
        assert status == signal.SIGKILL

warnings.simplefilter("error")
run, stride = Path(sys.argv[1]), int(sys.argv[2])
exchange = publishing._exchange
for name, same in (("new", False), ("same", True), ("moved", True)):
    publishing._exchange = (lambda *_: False) if name == "moved" else exchange
    (run / name).mkdir()
    outcomes = kill_saves(run / name / "run", same, stride)
    print(name, len(outcomes), outcomes.count(0), outcomes.count(1))
"""


@pytest.mark.parametrize(
    "stride", [25, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, stride):
    """In a new process: fork, kill -9 at the n-th change of the file system, see what is there."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), str(stride)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    for line in done.stdout.splitlines():
        _, turns, older, newer = line.split()
        assert int(turns) * stride > 40 and int(older) > 0 and int(newer) > 0


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    number = "0" * 32
    kept = ["checkpoint-1", "rows", ".git", ".checkpoint-1.stage-x", "damaged-checkpoint-2"]
    removed = [f".checkpoint-{k}.{kind}-{number}" for k, kind in enumerate(("stage", "delete"))]
    removed += [f".checkpoint-1.backup-{number}", f"..checkpoint-1.stage-{number}.stage-{number}"]
    for name in (*kept, *removed):
        (tmp_path / name / "more").mkdir(parents=True)
    (tmp_path / f".checkpoint-4.archive-{number}").touch()
    (tmp_path / f".checkpoint-5.backup-{number}").mkdir()
    assert len(remove_leftovers(tmp_path)) == len(removed) + 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "checkpoint-5"])
    assert remove_leftovers(tmp_path) == remove_leftovers(tmp_path / "none") == []


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is a call of Linux")
def test_older_one_and_newer_one_change_places_in_one_step(tmp_path, monkeypatch):
    """So that a reader finds one of them at any moment; Linux can do that."""
    for name in ("stage", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    monkeypatch.delattr(os, "rename")
    publishing.publish(tmp_path / "stage", tmp_path / "here")
    assert set(files_in(tmp_path)) == {"here/stage"}


def test_older_one_goes_back_where_a_rename_fails(tmp_path, monkeypatch):
    for name in ("stage", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    rename = os.rename

    def refuse(source, target):
        if Path(source).name == "stage":
            raise OSError(errno.EIO, "no")
        rename(source, target)

    monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError):
        publishing.publish(tmp_path / "stage", tmp_path / "here")
    assert set(files_in(tmp_path)) == {"stage/stage", "here/here"}
