"""The main job: collect, learn, plan, evaluate."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.record.loggers.tensorboard import TensorboardLogger
from tqdm import tqdm

from layeredrl_trl import keys
from layeredrl_trl.diagnostics import ModelReport, ModelReportHook
from layeredrl_trl.planners import SamplingPlanner
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.agent import Explorer, make_policy, make_predictor
from layeredrl_trl.recipes.checkpoint import Checkpoint, restore
from layeredrl_trl.recipes.config import TrainConfig
from layeredrl_trl.recipes.environments import make_env
from layeredrl_trl.recipes.errors import RecipeError, describe, quote
from layeredrl_trl.recipes.evaluation import as_buffer, episode_returns, run_episodes
from layeredrl_trl.recipes.files import (
    check_writable,
    make_folder,
    replacing,
    write_csv,
    write_json,
)
from layeredrl_trl.recipes.memory import check_memory
from layeredrl_trl.recipes.pictures import (
    ImaginationScore,
    draw_imagination,
    draw_learning_curve,
    score_imagination,
)

_STORED = (keys.OBSERVATION, keys.ACTION, keys.PLANNED, keys.TRAJ_IDS)
_STORED_NEXT = tuple(
    ("next", key)
    for key in (keys.OBSERVATION, keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE)
)


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


def train(
    config: TrainConfig,
    *,
    say: Callable[[str], None] = print,
    given: Collection[str] | None = None,
) -> Run:
    """Learn a world model of ``config.env`` and act by planning in it.

    Ctrl-C ends the run early: the checkpoint is written, evaluation and pictures are left out. So
    does an error, say of the environment, but that is raised. A resumed run draws its episodes,
    actions and batches with a new seed, see :func:`seed_after`; its final evaluation uses the same
    episodes as that of an uninterrupted run.

    Args:
        config: options of the run.
        say: is called with every line for the user.
        given: names of the options that the user chose; by default those that differ from their
            defaults. A resumed run tells which of them it leaves as they are in the checkpoint.

    Returns:
        What the run has done; its files lie in ``run.folder``.

    Raises:
        RecipeError: if the environment is not supported, the run does not fit into memory, the
            folder is not writable, or the run cannot go on from ``config.resume``; no file has
            been written then. Or if the run fails later on; its checkpoint has been written then.
    """
    resumed, seed = None, config.seed
    if config.resume is not None:
        resumed = Checkpoint.load(config.resume, config.device)
        check_writable(config.resume.parent)
        config = _resumed_config(config, resumed, say, given)
        seed = seed_after(config.seed, resumed.frames)
    torch.manual_seed(seed)
    repeat = config.action_repeat
    env = make_env(config.env, seed=seed, action_repeat=repeat)
    check_memory(config, env)
    predictor = make_predictor(config, env)
    policy, planner = make_policy(config, predictor, env.action_spec)
    frames_before = resumed.frames if resumed else 0
    n_batches = math.ceil((config.total_frames - frames_before) / config.frames_per_batch)
    new_frames = n_batches * config.frames_per_batch
    total_frames = frames_before + new_frames
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(total_frames // repeat))
    if resumed is None:
        run = Run(make_folder(config.logdir, config.env, config.seed))
    else:
        restore(predictor, resumed.predictor, config.resume)
        _refill(buffer, resumed, config.resume, env)
        run = Run(config.resume.parent, frames=frames_before, episodes=resumed.episodes)
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
        total_frames=new_frames // repeat,
        auto_register_policy_transforms=False,
    )
    explorer.steps = run.frames // repeat  # the collector has called the policy once to try it
    layout = {"unit": "step", "dynamic_ncols": True, "mininterval": 0.5, "miniters": 1}
    bar = tqdm(desc=config.env, total=total_frames, initial=run.frames, **layout)
    started = time.perf_counter()
    try:
        for batch in collector:
            stored = batch.select(*_STORED, *_STORED_NEXT)
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
    except Exception as error:
        raise _failed(job, error) from error
    finally:
        bar.close()
        collector.shutdown()
    run.seconds = time.perf_counter() - started
    try:
        _save(job)
    except OSError as error:
        raise _failed(job, error) from error
    if run.interrupted:
        say(f"Interrupted after {run.frames} steps. Checkpoint: {run.checkpoint}")
        say(f"  to go on: {_resume_command(job)}")
        return run
    try:
        _evaluate(job)
    except Exception as error:
        raise RecipeError(
            f"the run is over and its checkpoint written, but not all of its results: "
            f"{describe(error)}. To evaluate it: {_evaluate_command(run)}"
        ) from error
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


def _resumed_config(
    config: TrainConfig,
    resumed: Checkpoint,
    say: Callable[[str], None],
    given: Collection[str] | None,
) -> TrainConfig:
    """Return the checkpoint's options, but with ``total_frames`` and ``resume`` of ``config``."""
    if config.total_frames <= resumed.frames:
        raise RecipeError(
            f"resume: the run has taken {resumed.frames} steps already; raise total_frames, "
            f"which is {config.total_frames}."
        )
    for option in fields(TrainConfig):
        name, value = option.name, getattr(config, option.name)
        there = getattr(resumed.config, name)
        chosen = value != option.default if given is None else name in given
        if name in ("total_frames", "resume", "device", "num_threads") or not chosen:
            continue
        if name == "env" and value != there:
            raise RecipeError(
                f"resume: {quote(config.resume)} is a checkpoint of the environment {there}, not "
                f"of {quote(value)}; leave out --env, or give a checkpoint of that environment."
            )
        if value != there:
            say(f"{name} stays {there}, as it was in the run that is resumed, not {value}.")
    # without resume, so that lengths are checked against total_frames
    longer = replace(resumed.config, total_frames=config.total_frames)
    return replace(longer, resume=config.resume)


def _refill(buffer: TensorDictReplayBuffer, resumed: Checkpoint, path: Path, env: EnvBase) -> None:
    """Put the transitions of a checkpoint into an empty buffer, and end their last episode."""
    n_rows = resumed.frames // resumed.config.action_repeat
    if not n_rows:
        return
    like = env.fake_tensordict()
    try:
        transitions = TensorDict(resumed.transitions, batch_size=[n_rows])
        transitions = transitions.select(*_STORED, *_STORED_NEXT)
        for key in (keys.ACTION, keys.OBSERVATION, *_STORED_NEXT):
            transitions.get(key).view(n_rows, *like.get(key).shape)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(
            f"checkpoint: {quote(path)} cannot be resumed, as it does not hold the {n_rows} "
            f"transitions of its {resumed.frames} steps ({type(error).__name__})."
        ) from error
    for key in (keys.NEXT_TRUNCATED, keys.NEXT_DONE):  # the env starts a new episode
        transitions.get(key)[-1] = True
    buffer.extend(transitions)


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
    transitions = {}
    if run.frames:  # Ctrl-C may have come between storing a batch and counting it
        stored = job.buffer[: run.frames // config.action_repeat]
        transitions = stored.exclude(keys.INDEX).to_dict()
    state = job.predictor.state_dict()
    Checkpoint(config, run.frames, run.episodes, state, transitions).save(run.checkpoint)
    write_csv(run.folder / "episodes.csv", [("env_steps", "return"), *run.episodes])


def _failed(job: _Job, error: Exception) -> RecipeError:
    """Write a checkpoint after an error in the middle of a run, and make the error to raise."""
    text = f"the run has stopped after {job.run.frames} steps: {describe(error)}."
    try:
        _save(job)
    except Exception as second:
        older = "; an older checkpoint is there" if job.run.checkpoint.exists() else ""
        text += f" No checkpoint could be written then ({describe(second)}){older}."
    if job.run.checkpoint.exists():
        text += f" To go on: {_resume_command(job)}"
    return RecipeError(text)


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
    with replacing(folder / "model_report.md") as file:
        file.write(run.report.markdown() + "\n")
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
    write_json(folder / "summary.json", summary)


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
        f"  act with it      {_evaluate_command(run)}",
        f"  all the scalars  {_program('tensorboard')} --logdir {run.folder}",
    ]


def _resume_command(job: _Job) -> str:
    return (
        f"{_program('python')} -m layeredrl_trl train --resume {job.run.checkpoint} "
        f"--total-frames {job.config.total_frames}"
    )


def _evaluate_command(run: Run) -> str:
    return f"{_program('python')} -m layeredrl_trl evaluate --checkpoint {run.checkpoint}"


def _program(name: str) -> str:
    """Return the path of a program next to this Python, relative to the working folder if in it."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
