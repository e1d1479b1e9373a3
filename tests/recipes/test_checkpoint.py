"""Checkpoints: what they restore, and files that are none."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from layeredrl_trl.recipes import RecipeError, TrainConfig, make_env, train
from layeredrl_trl.recipes.agent import make_predictor
from layeredrl_trl.recipes.checkpoint import Checkpoint, restore
from tests.recipes.tiny_runs import SHORT, TINY, error_of


def tensors(state):
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def test_a_full_disk_leaves_the_older_checkpoint(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def full(*_args, **_kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        Checkpoint(TINY, frames=1, episodes=[], predictor={}, transitions={}).save(checkpoint)
    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_checkpoint_restores_every_number(tiny):
    run = train(tiny, say=lambda _: None)
    saved = Checkpoint.load(run.checkpoint)
    assert saved.config == tiny
    predictor = make_predictor(tiny, make_env(tiny.env))
    restore(predictor, saved.predictor, run.checkpoint)
    for key, value in tensors(predictor.state_dict()).items():
        torch.testing.assert_close(value, saved.predictor[key], rtol=0, atol=0)


def test_a_checkpoint_of_another_architecture(checkpoint):
    saved = Checkpoint.load(checkpoint)
    predictor = make_predictor(replace(saved.config, hidden_size=8), make_env(SHORT))
    before = {key: value.clone() for key, value in tensors(predictor.state_dict()).items()}
    with pytest.raises(RecipeError, match=r"another architecture.*here \[.*in the file \["):
        restore(predictor, saved.predictor, checkpoint)
    after = predictor.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_checkpoint_without_all_of_the_state(checkpoint):
    saved = Checkpoint.load(checkpoint)
    predictor = make_predictor(saved.config, make_env(SHORT))
    with pytest.raises(RecipeError, match="is damaged"):
        restore(predictor, tensors(saved.predictor), checkpoint)


def test_options_that_are_numbers_of_numpy(tmp_path):
    """They made a checkpoint that could not be read again."""
    config = replace(TINY, seed=np.int64(3), gamma=np.float32(0.5))
    Checkpoint(config, 0, [], {}, {}).save(tmp_path / "checkpoint.pt")
    options = Checkpoint.load(tmp_path / "checkpoint.pt").config
    assert (options.seed, options.gamma) == (3, 0.5)
    assert type(options.seed) is int and type(options.gamma) is float


def edited(content, entry, value):
    *outer, last = entry.split("/")
    for name in outer:
        content = content[name]
    if value is None:
        del content[last]
    else:
        content[last] = value


def flip(whole):
    """Change the bytes of the pickle that lies in a checkpoint."""
    at = whole.index(b"data.pkl") + 200
    return whole[:at] + bytes(255 - x for x in whole[at : at + 50]) + whole[at + 50 :]


FILES = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"hello\n" * 100,
    "other text": lambda whole: Path(__file__).read_bytes(),
    "cut after 100 bytes": lambda whole: whole[:100],
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "cut at the end": lambda whole: whole[:-1],
    "flipped": flip,
}


@pytest.fixture(params=["evaluate --checkpoint", "train --resume"])
def command(request):
    return request.param.split()


def error_about(command, path, capsys):
    """Return the error of a command about a file; it changes nothing next to the file."""
    before = sorted(path.parent.iterdir()) if path.parent.exists() else None
    error = error_of([*command, str(path)], capsys)
    assert before == (sorted(path.parent.iterdir()) if path.parent.exists() else None)
    return error


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_files_that_are_no_checkpoints(content, command, checkpoint, capsys):
    checkpoint.write_bytes(content(checkpoint.read_bytes()))
    assert "cannot be read" in error_about(command, checkpoint, capsys)


@pytest.mark.parametrize(
    "content", [None, [1], torch.ones(3), {"a": torch.ones(3)}, {"format": "another/1"}]
)
def test_files_that_torch_wrote_for_others(content, command, tmp_path, capsys):
    torch.save(content, tmp_path / "x.pt")
    assert "was not written by" in error_about(command, tmp_path / "x.pt", capsys)


def test_files_that_hold_a_module(command, tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    assert "cannot be read" in error_about(command, tmp_path / "x.pt", capsys)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch is about to drop TorchScript
def test_files_of_torchscript(command, tmp_path, capsys):
    """Torch's warning about it was a second line."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "cannot be read" in error_about(command, tmp_path / "x.pt", capsys)
    assert caught == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("nowhere.pt", "there is no file"),
        (".", "is a folder"),
        ("a" * 300, "cannot be read"),
        ("a\0b", "there is no file"),
    ],
)
def test_files_that_are_not_there(path, text, command, tmp_path, capsys):
    assert text in error_about(command, tmp_path / path, capsys)


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("config", None, "is damaged"),
        ("config", "x", "is damaged"),
        ("frames", -20, "is damaged"),
        ("frames", "60", "is damaged"),
        ("episodes", ["x"], "is damaged"),
        ("more", 1, "is damaged"),
        ("config/seed", -1, "an option in .* is wrong: seed must not be negative"),
        ("config/logdir", 3, "an option in .* is wrong"),
        ("config/new_option", 3, r"another version, with the unknown options \['new_option'\]"),
        ("config/env", "Pendulum-v1", "of another architecture"),
        ("config/env", "no_such_module:Good-v0", "is not found"),
        ("config/hidden_size", 2**16, "GiB of memory"),
        ("predictor", {}, "of another architecture"),
    ],
)
def test_files_that_are_damaged(entry, value, text, command, checkpoint, capsys):
    content = torch.load(checkpoint)
    edited(content, entry, value)
    torch.save(content, checkpoint)
    error = error_about(command, checkpoint, capsys)
    assert re.search(text, error)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("frames", 40),
        ("frames", 2000),
        ("transitions", {}),
        ("transitions/action", None),
        ("transitions/action", torch.zeros(5, 2)),
        ("transitions/action", torch.zeros(60, 3)),
        ("transitions/next/observation", torch.zeros(60, 1)),
    ],
)
def test_transitions_that_do_not_fit(entry, value, checkpoint):
    content = torch.load(checkpoint)
    edited(content, entry, value)
    torch.save(content, checkpoint)
    with pytest.raises(RecipeError, match=r"does not hold the .* transitions of its .* steps"):
        train(TrainConfig(resume=checkpoint), say=lambda _: None)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
