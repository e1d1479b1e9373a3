"""What a finished run leaves: evaluation episodes, a report on the model, pictures, a summary."""

from __future__ import annotations

import math
from typing import Any

import torch
from torchrl.data import TensorDictReplayBuffer
from torchrl.record.loggers.common import Logger

from layeredrl_trl.diagnostics import ModelReport, ModelReportHook
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.config import TrainConfig
from layeredrl_trl.recipes.evaluation import as_buffer, episode_returns, run_episodes
from layeredrl_trl.recipes.files import replacing, write_json
from layeredrl_trl.recipes.pictures import (
    ImaginationScore,
    draw_imagination,
    draw_learning_curve,
    score_imagination,
)


def write_results(
    config: TrainConfig,
    run: Any,
    predictor: RewardPredictor,
    buffer: TensorDictReplayBuffer,
    logger: Logger,
) -> tuple[list[float], ImaginationScore, ModelReport | None]:
    """Run evaluation episodes, measure the model on them, and write and draw the results.

    Args:
        config: options of the run.
        run: the :class:`~layeredrl_trl.recipes.Run`: its folder, frames, episodes and seconds.
        predictor: is evaluated.
        buffer: the run's transitions.
        logger: gets the scalars.

    Returns:
        The returns of the episodes, how well imagination follows them, and the report.
    """
    horizon, seed, folder = config.planning_horizon, 10_000 + config.seed, run.folder
    rollout = run_episodes(config, predictor, episodes=config.eval_episodes, seed=seed)
    returns = episode_returns(rollout).tolist()
    imagination = score_imagination(predictor, rollout, horizon=horizon)
    logger.log_scalar("eval/mean_return", sum(returns) / len(returns), run.frames)
    correlation = imagination.correlation
    logger.log_scalar("eval/imagined_return_correlation", correlation, run.frames)
    *_, report = write_report(config, run, predictor, as_buffer(rollout), logger)
    if run.episodes:
        draw_learning_curve(folder / "learning_curve.png", config, run.episodes, returns)
    draw_imagination(folder / "imagination.png", predictor, buffer, rollout, imagination)
    content = {
        "config": {name: str(value) for name, value in vars(config).items()},
        "frames": run.frames,
        "seconds": run.seconds,
        "eval_returns": returns,
        "imagined_return_correlation": correlation,
    }
    write_json(folder / "summary.json", content)
    return returns, imagination, report


def write_report(
    config: TrainConfig,
    run: Any,
    predictor: RewardPredictor,
    held_out: TensorDictReplayBuffer,
    logger: Logger,
) -> tuple[list[float], None, ModelReport | None]:
    """Write, draw and log a report on held-out episodes, as :func:`write_results` returns it."""
    report = ModelReportHook(predictor, held_out, config.planning_horizon, writer=logger)(
        run.frames
    )
    with replacing(run.folder / "model_report.md") as file:
        file.write(report.markdown() + "\n")
    report.figure().savefig(run.folder / "model_report.png", dpi=130)
    return [], None, report


def summary(config: TrainConfig, run: Any) -> list[str]:
    """Sum up a finished run in lines for its user."""
    source, kind = config.env, "env steps"
    if config.dataset is not None:
        source, kind = f"{config.dataset} ({config.env})", "optimisation steps"
    files = {
        "learning curve": "learning_curve.png",
        "imagination": "imagination.png",
        "model report": "model_report.md",
        "checkpoints": "checkpoints",
    }
    paths = {name: run.folder / file for name, file in files.items()}
    return [
        "",
        f"{source}, seed {config.seed}: {run.frames} {kind} in {run.seconds:.0f} s",
        *(_returns(run) if run.eval_returns else []),
        *(f"  {name:16} {path}" for name, path in paths.items() if path.exists()),
    ]


def _returns(run: Any) -> list[str]:
    """Say in two lines how well the agent acts, and how well it imagines."""
    returns, value = torch.tensor(run.eval_returns), run.imagination.correlation
    none = "no correlation to be had, one of them is always the same,"
    correlation = none if math.isnan(value) else f"correlation {value:.3f}"
    return [
        f"  mean return of {len(returns)} evaluation episodes: {returns.mean():.1f} "
        f"(worst {returns.min():.1f}, best {returns.max():.1f})",
        f"  imagined against real {run.imagination.horizon}-step returns: "
        f"{correlation} over {run.imagination.segments} segments",
    ]
