"""The main job: collect, learn, plan, evaluate."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.record.loggers.tensorboard import TensorboardLogger
from tqdm import tqdm

from layeredrl_trl import keys
from layeredrl_trl.diagnostics import ModelReport, ModelReportHook
from layeredrl_trl.planners import SamplingPlanner
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.agent import Explorer, make_policy, make_predictor
from layeredrl_trl.recipes.checkpoint import Checkpoint, restore
from layeredrl_trl.recipes.config import RecipeError, TrainConfig
from layeredrl_trl.recipes.environments import make_env
from layeredrl_trl.recipes.evaluation import as_buffer, episode_returns, run_episodes
from layeredrl_trl.recipes.pictures import (
    ImaginationScore,
    draw_imagination,
    draw_learning_curve,
    score_imagination,
)

_STORED = (keys.OBSERVATION, keys.ACTION, keys.PLANNED, keys.TRAJ_IDS)
_STORED_NEXT = (keys.OBSERVATION, keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE)


@dataclass
class Run:
    """What a run has done so far.

    Attributes:
        folder: folder of the run's files.
        frames: number of env steps taken.
        episodes: ``(env steps at its end, return)`` of every finished episode.
        eval_returns: returns of the final evaluation, one per episode.
        imagination: how well imagined returns follow real ones.
        report: report on the model, measured on the evaluation episodes.
        seconds: wall time of training.
        interrupted: whether Ctrl-C ended the run.
    """

    folder: Path
    frames: int = 0
    episodes: list[tuple[int, float]] = field(default_factory=list)
    eval_returns: list[float] = field(default_factory=list)
    imagination: ImaginationScore | None = None
    report: ModelReport | None = None
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def checkpoint(self) -> Path:
        """File of the checkpoint."""
        return self.folder / "checkpoint.pt"


def train(config: TrainConfig, *, say: Callable[[str], None] = print) -> Run:
    """Learn a world model of ``config.env`` and act by planning in it.

    Ctrl-C ends the run early: the checkpoint is written, evaluation and pictures are left out.
    A resumed run draws its episodes, actions and batches with a new seed, see :func:`seed_after`;
    its final evaluation uses the same episodes as that of an uninterrupted run.

    Args:
        config: options of the run.
        say: is called with every line for the user.

    Returns:
        What the run has done; its files lie in ``run.folder``.

    Raises:
        RecipeError: if the environment is not supported, the folder is not writable, or the run
            cannot go on from ``config.resume``; no file has been written then.
    """
    resumed, seed = None, config.seed
    if config.resume is not None:
        resumed = Checkpoint.load(config.resume, config.device)
        config = _resumed_config(config, resumed)
        seed = seed_after(config.seed, resumed.frames)
    torch.manual_seed(seed)
    repeat = config.action_repeat
    env = make_env(config.env, seed=seed, action_repeat=repeat)
    predictor = make_predictor(config, env)
    policy, planner = make_policy(config, predictor, env.action_spec)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(config.total_frames // repeat))
    if resumed is None:
        run = Run(_make_folder(config))
    else:
        restore(predictor, resumed.predictor, config.resume)
        run = Run(config.resume.parent, frames=resumed.frames, episodes=resumed.episodes)
        if resumed.frames:
            transitions = TensorDict(resumed.transitions, batch_size=[resumed.frames // repeat])
            for key in (keys.NEXT_TRUNCATED, keys.NEXT_DONE):  # the env starts a new episode
                transitions.get(key)[-1] = True
            buffer.extend(transitions)
    predictor.writer = logger = TensorboardLogger("tensorboard", log_dir=str(run.folder))
    job = _Job(config, predictor, planner, buffer, logger, run)
    env.append_transform(planner.make_tensordict_primer())
    explorer = Explorer(
        policy,
        env.action_spec,
        init_random_steps=config.init_random_frames // repeat,
        planned_steps=config.planned_frames // repeat,
        random_steps=config.random_frames // repeat,
        planner=planner,
    )
    collector = Collector(
        env,
        explorer,
        frames_per_batch=config.frames_per_batch // repeat,
        total_frames=(config.total_frames - run.frames) // repeat,
        auto_register_policy_transforms=False,
    )
    explorer.steps = run.frames // repeat  # the collector has called the policy once to try it
    layout = {"unit": "step", "dynamic_ncols": True, "mininterval": 0.5, "miniters": 1}
    bar = tqdm(desc=config.env, total=config.total_frames, initial=run.frames, **layout)
    started = time.perf_counter()
    try:
        for batch in collector:
            stored = batch.select(*_STORED, *(("next", key) for key in _STORED_NEXT))
            buffer.extend(stored.reshape(-1))
            new_frames = batch.numel() * repeat
            _note_episodes(job, batch)
            _log_plans(job, batch)
            info = _learn(job, new_frames)
            bar.set_postfix_str(_status(run, info), refresh=False)
            bar.update(new_frames)
            if run.frames % config.checkpoint_interval < new_frames:
                _save(job)
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        bar.close()
        collector.shutdown()
    run.seconds = time.perf_counter() - started
    _save(job)
    if run.interrupted:
        say(f"Interrupted after {run.frames} steps. Checkpoint: {run.checkpoint}")
        say(
            f"  to go on: {_program('python')} -m layeredrl_trl train --resume {run.checkpoint} "
            f"--total-frames {config.total_frames}"
        )
        return run
    _evaluate(job)
    for line in _summary(config, run):
        say(line)
    return run


def seed_after(seed: int, frames: int) -> int:
    """Compute the seed with which a run goes on after ``frames`` env steps, an integer of 31 bits.

    The new seed is a hash of both numbers, so the resumed run does not repeat the random numbers
    of its own start, nor, as with ``seed + frames``, those of another run's start. A run resumed
    twice from the same checkpoint goes on with the same seed, and after 0 steps with its own.
    """
    if frames == 0:
        return seed
    return int(np.random.SeedSequence([seed, frames]).generate_state(1)[0]) >> 1


def _resumed_config(config: TrainConfig, resumed: Checkpoint) -> TrainConfig:
    """Return the checkpoint's options, but with ``total_frames`` and ``resume`` of ``config``."""
    if config.total_frames <= resumed.frames:
        raise RecipeError(
            f"resume: the run has taken {resumed.frames} steps already; raise total_frames, "
            f"which is {config.total_frames}."
        )
    return replace(resumed.config, total_frames=config.total_frames, resume=config.resume)


class _Job(NamedTuple):
    """A run and its parts."""

    config: TrainConfig
    predictor: RewardPredictor
    planner: SamplingPlanner
    buffer: TensorDictReplayBuffer
    logger: TensorboardLogger
    run: Run


def _save(job: _Job) -> None:
    """Write the checkpoint and the table of episodes."""
    config, run = replace(job.config, resume=None), job.run
    transitions = job.buffer[:].exclude(keys.INDEX).to_dict() if len(job.buffer) else {}
    state = job.predictor.state_dict()
    Checkpoint(config, run.frames, run.episodes, state, transitions).save(run.checkpoint)
    with (run.folder / "episodes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("env_steps", "return"), *run.episodes])


def _learn(job: _Job, new_frames: int) -> dict[str, float]:
    """Take the optimisation steps that are due; those of the first random phase all at its end."""
    config, frames = job.config, job.run.frames
    if frames < config.init_random_frames:
        return {}
    due = new_frames if frames - new_frames >= config.init_random_frames else frames
    n_steps, n = round(config.updates_per_frame * due), config.batch_size
    if not n_steps:
        return {}
    sizes = {"batch_size": n, "model_batch_size": n}
    _, info = job.predictor.learn(job.buffer, n_steps, **sizes, n_total_env_steps=frames)
    return info


def _evaluate(job: _Job) -> None:
    """Run evaluation episodes, measure the model on them, and write and draw the results."""
    config, predictor, run, folder = job.config, job.predictor, job.run, job.run.folder
    horizon, seed = config.planning_horizon, 10_000 + config.seed
    rollout = run_episodes(config, predictor, episodes=config.eval_episodes, seed=seed)
    run.eval_returns = episode_returns(rollout).tolist()
    mean_return = sum(run.eval_returns) / len(run.eval_returns)
    job.logger.log_scalar("eval/mean_return", mean_return, run.frames)
    run.imagination = score_imagination(predictor, rollout, horizon=horizon)
    correlation = run.imagination.correlation
    job.logger.log_scalar("eval/imagined_return_correlation", correlation, run.frames)
    make_report = ModelReportHook(predictor, as_buffer(rollout), horizon, writer=job.logger)
    run.report = make_report(run.frames)
    (folder / "model_report.md").write_text(run.report.markdown() + "\n")
    run.report.figure().savefig(folder / "model_report.png", dpi=130)
    draw_learning_curve(folder / "learning_curve.png", config, run.episodes, run.eval_returns)
    draw_imagination(folder / "imagination.png", predictor, job.buffer, rollout, run.imagination)
    summary = {
        "config": {name: str(value) for name, value in vars(config).items()},
        "frames": run.frames,
        "seconds": run.seconds,
        "eval_returns": run.eval_returns,
        "imagined_return_correlation": correlation,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _make_folder(config: TrainConfig) -> Path:
    """Make a new folder for the run's files."""
    name = f"{config.env.replace('/', '_')}_seed{config.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = config.logdir / name, 1
    while folder.exists():
        number += 1
        folder = config.logdir / f"{name}-{number}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(
            f"logdir: cannot write to {str(config.logdir)!r}: {error.strerror}."
        ) from error
    return folder


def _note_episodes(job: _Job, batch: TensorDictBase) -> None:
    """Count the env steps of a batch, and keep and log the episodes that ended in it."""
    run, repeat = job.run, job.config.action_repeat
    returns = batch.get(("next", "episode_reward")).flatten()
    before = run.frames
    run.frames += batch.numel() * repeat
    for i in batch.get(keys.NEXT_DONE).flatten().nonzero().flatten().tolist():
        step, value = before + (i + 1) * repeat, returns[i].item()
        run.episodes.append((step, value))
        job.logger.log_scalar("train/episode_return", value, step)


def _log_plans(job: _Job, batch: TensorDictBase) -> None:
    """Log each of the planner's statistics, as its mean over the planned steps of a batch."""
    planned = batch.get(keys.PLANNED)
    if not planned.any():
        return
    for key in job.planner.statistics_keys:
        value = batch.get(key)[planned].mean().item()
        job.logger.log_scalar(f"planner/{key}", value, job.run.frames)


def _status(run: Run, info: dict[str, float]) -> str:
    """Describe the latest episode and losses in one line."""
    numbers = [f"return {run.episodes[-1][1]:.0f}"] if run.episodes else []
    names = ("loss_reward", "loss_value", "nll")
    return ", ".join(numbers + [f"{name} {info[name]:.3g}" for name in names if name in info])


def _summary(config: TrainConfig, run: Run) -> list[str]:
    returns, value = torch.tensor(run.eval_returns), run.imagination.correlation
    none = "no correlation to be had, one of them is always the same,"
    correlation = none if math.isnan(value) else f"correlation {value:.3f}"
    return [
        "",
        f"{config.env}, seed {config.seed}: {run.frames} env steps in {run.seconds:.0f} s",
        f"  mean return of {len(returns)} evaluation episodes: {returns.mean():.1f} "
        f"(worst {returns.min():.1f}, best {returns.max():.1f})",
        f"  imagined against real {run.imagination.horizon}-step returns: "
        f"{correlation} over {run.imagination.segments} segments",
        f"  learning curve   {run.folder / 'learning_curve.png'}",
        f"  imagination      {run.folder / 'imagination.png'}",
        f"  model report     {run.folder / 'model_report.md'} (and .png)",
        f"  checkpoint       {run.checkpoint}",
        f"  act with it      {_program('python')} -m layeredrl_trl evaluate "
        f"--checkpoint {run.checkpoint}",
        f"  all the scalars  {_program('tensorboard')} --logdir {run.folder}",
    ]


def _program(name: str) -> str:
    """Return the path of a program next to this Python, relative to the working folder if in it."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
