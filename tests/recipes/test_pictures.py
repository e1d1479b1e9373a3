"""Pictures of models that are no good, which are drawn all the same."""

from dataclasses import replace

import pytest
import torch

from layeredrl_trl.recipes import make_env, run_episodes
from layeredrl_trl.recipes.agent import Spaces, make_predictor
from layeredrl_trl.recipes.evaluation import as_buffer
from layeredrl_trl.recipes.pictures import draw_imagination, draw_learning_curve, score_imagination
from tests.recipes.tiny_runs import SHORT, TINY


def draw(config, predictor, path):
    rollout = run_episodes(config, predictor, episodes=1, seed=0)
    score = score_imagination(predictor, rollout, horizon=3)
    draw_imagination(path, predictor, as_buffer(rollout), rollout, score)
    return score


@pytest.mark.parametrize("n_models", [1, 5])
def test_a_model_that_has_diverged(n_models, tmp_path):
    """An axis in log scale found nothing positive, and the run died after its training."""
    config = replace(TINY, env=SHORT, n_models=n_models)
    predictor = make_predictor(config, Spaces.of(make_env(SHORT)))
    with torch.no_grad():
        for parameter in predictor.model.parameters():
            parameter.fill_(torch.nan)
    score = draw(config, predictor, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert score.imagined.isnan().all()


def test_returns_that_are_not_finite(tmp_path):
    returns = [float("nan"), float("inf")]
    draw_learning_curve(tmp_path / "x.png", TINY, [(10, float("nan"))], returns)
    assert (tmp_path / "x.png").stat().st_size > 5_000
