"""Runs of a few steps, what their command line prints, and what they leave in their folder."""

import json
import re

from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_trl import TransitionSliceSampler
from layeredrl_trl.__main__ import main
from layeredrl_trl.checkpoints import StoredRows, WholeCheckpoint
from layeredrl_trl.recipes import TrainConfig
from layeredrl_trl.trainers import EpisodeLog
from tests.recipes.odd_envs import odd

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
# An env whose episodes are short, and whose state cannot be saved.
SHORT = odd("Good")


def arguments_of(config, **changes):
    """Write options as the arguments of ``train``."""
    options = {name: x for name, x in vars(config).items() if x != getattr(TrainConfig, name, None)}
    return [
        "train",
        *(f"--{name.replace('_', '-')}={value}" for name, value in (options | changes).items()),
    ]


def error_of(arguments, capsys):
    """Run a command that fails, check that it prints one line of error, and return that line.

    The bar of progress, which has no end of line before it is closed, does not count.
    """
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.endswith("\n")
    lines = [
        line
        for line in printed.splitlines()
        if line.strip() and not re.search("(it|step)/s|s/(it|step)", line)
    ]
    assert len(lines) == 1, printed
    assert lines[0].startswith("error: ") and lines[0].isprintable()
    return lines[0]


def checkpoints(folder):
    """Return the checkpoints of a run, the oldest first."""
    return sorted((folder / "checkpoints").glob("checkpoint-*"))


def frames_saved(folder):
    """Return the env steps at which the checkpoints of a run were written."""
    return [int(path.name.rpartition("-")[2]) for path in checkpoints(folder)]


def rows_of(folder):
    """Return the rows of the latest checkpoint of a run, ``[T]`` or ``[T, N]``."""
    saved = checkpoints(folder)[-1]
    (index,) = saved.glob("components/*replay_buffer/index.json")
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10_000, ndim=json.loads(index.read_text())["ndim"]),
        sampler=TransitionSliceSampler(slice_len=3),
    )
    checkpoint = WholeCheckpoint()
    checkpoint.register("replay_buffer", buffer, adapter=StoredRows(folder / "unused"))
    checkpoint.load(saved)
    return buffer.storage._storage[: buffer.storage.shape[0]]


def content_of(folder):
    """Return all that the latest checkpoint of a run holds, file by file, and its log."""
    saved = checkpoints(folder)[-1]
    files = {
        path.relative_to(saved).as_posix(): path.read_bytes()
        for path in saved.glob("components/**/*")
        if path.is_file()
    }
    log = folder / "episodes.csv"
    return files | {"episodes.csv": log.read_bytes() if log.exists() else b""}


def damage(checkpoint):
    """Change one bit of a checkpoint's largest file."""
    file = max(checkpoint.rglob("*.*"), key=lambda path: path.stat().st_size)
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.unlink()  # rows are links to the same file
    file.write_bytes(whole)


def do_at(frames, action, monkeypatch):
    """Have a run call ``action`` once it has stored so many steps, before it learns from them."""
    note = EpisodeLog.__call__

    def note_and_act(log, batch):
        if log._trainer.collected_frames == frames:
            action()
        return note(log, batch)

    monkeypatch.setattr(EpisodeLog, "__call__", note_and_act)
