"""What the tests of the recipe share."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from layeredrl_trl.recipes import Run, TrainConfig, train, training
from tests.recipes.tiny_runs import SHORT, TINY


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> TrainConfig:
    """Options of a tiny run on Pendulum-v1, evaluated for a few steps."""
    monkeypatch.setattr("layeredrl_trl.recipes.evaluation.max_episode_steps", lambda _: 12)
    return replace(TINY, logdir=tmp_path / "runs")


@pytest.fixture
def unevaluated(monkeypatch):
    """Leave the evaluation out, which takes most of the time of a tiny run."""
    monkeypatch.setattr(training, "_evaluate", lambda *_: None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Run, list[str]]:
    """A tiny run on Pendulum-v1, evaluated for a few steps, and the lines that it said."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layeredrl_trl.recipes.evaluation.max_episode_steps", lambda _: 12)
        config = replace(TINY, logdir=tmp_path_factory.mktemp("finished"))
        return train(config, say=lines.append), lines


@pytest.fixture(scope="session")
def _trained(tmp_path_factory) -> Path:
    logdir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_evaluate", lambda *_: None)
        config = replace(TINY, env=SHORT, logdir=logdir, checkpoint_interval=40)
        return train(config, say=lambda _: None).folder


@pytest.fixture
def trained(_trained, tmp_path) -> Path:
    """A copy of the folder of a finished run of 60 steps, with checkpoints at 40 and 60."""
    return Path(shutil.copytree(_trained, tmp_path / "run"))
