"""What the tests of the recipe share."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from layeredrl_trl.recipes import TrainConfig, train, training
from tests.recipes.tiny_runs import SHORT, TINY


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> TrainConfig:
    """Options of a tiny run on Pendulum-v1, evaluated for a few steps."""
    monkeypatch.setattr("layeredrl_trl.recipes.evaluation.max_episode_steps", lambda _: 12)
    return replace(TINY, logdir=tmp_path / "runs")


@pytest.fixture
def unevaluated(monkeypatch):
    """Leave the evaluation out, which takes most of the time of a tiny run."""
    monkeypatch.setattr(training, "_evaluate", lambda _: None)
    monkeypatch.setattr(training, "_summary", lambda *_: [])


@pytest.fixture(scope="session")
def _trained(tmp_path_factory) -> Path:
    config = replace(TINY, env=SHORT, logdir=tmp_path_factory.mktemp("trained"))
    return train(config, say=lambda _: None).checkpoint


@pytest.fixture
def checkpoint(_trained, tmp_path) -> Path:
    """A copy of the checkpoint of a finished run of 60 steps, in a folder of its own."""
    folder = tmp_path / "run"
    folder.mkdir()
    return Path(shutil.copy(_trained, folder))
