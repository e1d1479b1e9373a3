"""The main job: collect, learn, plan, evaluate, by a ``PredictorTrainer``."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.record.loggers.tensorboard import TensorboardLogger

from layeredrl_trl import keys
from layeredrl_trl.data import TransitionSliceSampler
from layeredrl_trl.diagnostics import ModelReport, ModelReportHook
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.agent import Spaces, make_policy, make_predictor
from layeredrl_trl.recipes.collecting import make_collector
from layeredrl_trl.recipes.config import TrainConfig
from layeredrl_trl.recipes.environments import make_env
from layeredrl_trl.recipes.errors import RecipeError, describe, quote
from layeredrl_trl.recipes.files import check_writable, make_folder
from layeredrl_trl.recipes.memory import check_memory
from layeredrl_trl.recipes.offline import NO_ENV, Offline, open_dataset
from layeredrl_trl.recipes.pictures import ImaginationScore
from layeredrl_trl.recipes.results import summary, write_report, write_results
from layeredrl_trl.recipes.run_folder import RunFolder
from layeredrl_trl.trainers import EpisodeLog, PlannerLog, PredictorTrainer

STORED = (
    *(keys.OBSERVATION, keys.ACTION, keys.PLANNED, keys.TRAJ_IDS),
    *(keys.NEXT_OBSERVATION, keys.NEXT_REWARD),
    *(keys.NEXT_TERMINATED, keys.NEXT_TRUNCATED, keys.NEXT_DONE),
)
"""Entries that a run stores of each step."""


@dataclass
class Run:
    """What a run has done.

    Attributes:
        folder: folder of the run's files.
        frames: number of env steps taken.
        episodes: ``(env steps at its end, return)`` of every finished episode.
        eval_returns: returns of the final evaluation, one per episode.
        imagination: how well imagined returns follow real ones.
        report: report on the model, measured on the evaluation episodes.
        seconds: wall time of training.
        interrupted: whether a signal ended the run.
    """

    folder: Path
    frames: int = 0
    episodes: list[tuple[int, float]] = field(default_factory=list)
    eval_returns: list[float] = field(default_factory=list)
    imagination: ImaginationScore | None = None
    report: ModelReport | None = None
    seconds: float = 0.0
    interrupted: bool = False


class Parts(NamedTuple):
    """The parts of a run."""

    predictor: RewardPredictor
    trainer: PredictorTrainer
    log: EpisodeLog | None
    offline: Offline | None


def train(
    config: TrainConfig,
    *,
    say: Callable[[str], None] = print,
    given: Collection[str] | None = None,
) -> Run:
    """Learn a world model of ``config.env`` and act by planning in it.

    Ctrl-C and SIGTERM end the run after the current batch, with a checkpoint; evaluation and
    pictures are left out. A second one ends it at once. An error of the environment, say, is raised
    after a checkpoint was written. A resumed run goes on from its latest whole checkpoint, to the
    bit as if it had not stopped (see :class:`~layeredrl_trl.trainers.PredictorTrainer`).

    Args:
        config: options of the run.
        say: is called with every line for the user.
        given: names of the options that the user chose; by default those that differ from their
            defaults. A resumed run tells which of them it leaves as they are in the checkpoint.

    Returns:
        What the run has done; its files lie in ``run.folder``.

    Raises:
        RecipeError: if the environment is not supported, the run does not fit into memory, the
            folder is not writable or another process writes to it, or the run cannot go on from
            ``config.resume``; no file has been written then. Or if the run fails later on; its
            checkpoint has been written then.
    """
    with ExitStack() as stack:
        saved, most_frames = None, config.total_frames
        if config.resume is not None:
            folder = RunFolder(config.resume)
            folder.latest()  # before the lock, which would make a file in a folder of no run
            check_writable(folder.path)
            stack.enter_context(folder.locked())
            saved = folder.latest()
            there = folder.read_config(saved, device=config.device, env=config.env)
            most_frames = max(config.total_frames, there.total_frames)
            config = _resumed_config(config, there, _frames_at(saved), say, given)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(config.seed)
        config, spaces, offline = _open_source(config, given)
        check_memory(replace(config, total_frames=most_frames), spaces)
        predictor = make_predictor(config, spaces)
        make_policy(config, predictor, spaces.action_spec)  # refuses options that do not fit
        if config.resume is None:
            folder = RunFolder(make_folder(config.logdir, config.env, config.seed))
            stack.enter_context(folder.locked())
        frames = 0 if saved is None else _frames_at(saved)
        parts = make_parts(config, folder, predictor, offline, frames, most_frames)
        stack.callback(parts.trainer.collector.shutdown)
        if saved is not None:
            _load(parts, saved)
        run = _train(config, folder, parts, say)
        if not run.interrupted:
            _evaluate(config, run, parts, say)
        return run


def make_parts(
    config: TrainConfig,
    folder: RunFolder,
    predictor: RewardPredictor,
    offline: Offline | None,
    frames: int,
    most_frames: int,
) -> Parts:
    """Put the parts of a run together that has taken ``frames`` env steps.

    Its buffer has room for ``most_frames``, the largest ``total_frames`` that the run ever had: a
    smaller buffer does not take the rows of a larger one.
    """
    slice_len = predictor.loss_module.slice_len
    checkpoint = folder.checkpoint(replace(config, total_frames=most_frames))
    options = {
        "predictor": predictor,
        "total_frames": config.total_frames,
        "batch_size": config.batch_size,
        "logger": TensorboardLogger("tensorboard", log_dir=str(folder.path)),
        "log_interval": config.frames_per_batch,
        "save_trainer_interval": config.checkpoint_interval,
        "checkpoint": checkpoint,
        "checkpoint_rotation": folder.rotation,
    }
    if offline is not None:
        interval = {"interval": config.checkpoint_interval}
        report = ModelReportHook(predictor, offline.held_out, config.planning_horizon, **interval)
        buffer = offline.feed(slice_len)
        trainer = PredictorTrainer(collector=None, replay_buffer=buffer, hooks=[report], **options)
        return Parts(predictor, trainer, None, offline)
    collector, explorer, planner = make_collector(config, predictor, frames)
    batch = config.frames_per_batch
    rows = -(-most_frames // batch) * batch // config.action_repeat
    has_columns = config.num_envs * config.num_workers > 1 and not config.asynchronous
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(rows, ndim=1 + has_columns),
        sampler=TransitionSliceSampler(slice_len=slice_len),
    )
    checkpoint.register("replay_buffer", buffer, adapter=folder.stored_rows())
    log = EpisodeLog(folder.path / "episodes.csv")
    trainer = PredictorTrainer(
        collector=collector,
        replay_buffer=buffer,
        updates_per_frame=config.updates_per_frame,
        planner=explorer,
        init_random_frames=config.init_random_frames,
        stored_keys=STORED,
        frame_skip=config.action_repeat,
        hooks=[log, PlannerLog(planner)],
        **options,
    )
    return Parts(predictor, trainer, log, None)


def _open_source(
    config: TrainConfig, given: Collection[str] | None
) -> tuple[TrainConfig, Spaces, Offline | None]:
    """Look at what a run learns from: an environment, or a dataset that may name one."""
    if config.dataset is None:
        env = make_env(config.env, seed=config.seed, action_repeat=config.action_repeat)
        spaces = Spaces.of(env)
        env.close()
        return config, spaces, None
    chosen = config.env != TrainConfig.env if given is None else "env" in given
    is_known = config.env != NO_ENV and (chosen or config.resume is not None)
    offline = open_dataset(config, config.env if is_known else None)
    return replace(config, env=offline.env_id or NO_ENV), offline.spaces, offline


def _train(config: TrainConfig, folder: RunFolder, parts: Parts, say: Callable[[str], None]) -> Run:
    """Train, and say how to go on if a signal or an error ends it early."""
    trainer, started = parts.trainer, time.perf_counter()
    interrupted = False
    try:
        with trainer.stop_on_signal():
            trainer.train()
        interrupted = trainer.collected_frames < config.total_frames
    except KeyboardInterrupt:  # the second signal: nothing is saved
        interrupted = True
    except Exception as error:
        raise _failed(config, folder, parts, error) from error
    if interrupted:
        saved = folder.rotation.latest()
        frames = trainer.collected_frames
        say(f"Interrupted after {frames} steps. Checkpoint: {saved or 'none was written yet'}")
        if saved is not None:
            say(f"  to go on: {_resume_command(config, folder)}")
    return Run(
        folder.path,
        frames=trainer.collected_frames,
        episodes=parts.log.episodes() if parts.log else [],
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
    )


def _load(parts: Parts, saved: Path) -> None:
    """Load a checkpoint into the parts of a run."""
    try:
        parts.trainer.load_from_file(saved)
    except Exception as error:  # of a checkpoint whose files are as they were written
        raise RecipeError(f"resume: {quote(saved)} cannot be used: {describe(error)}.") from error


def _frames_at(saved: Path) -> int:
    """Return the env steps that a run had taken at a checkpoint."""
    return int(saved.name.rpartition("-")[2])


def _resumed_config(
    config: TrainConfig,
    there: TrainConfig,
    frames: int,
    say: Callable[[str], None],
    given: Collection[str] | None,
) -> TrainConfig:
    """Return the options ``there`` of a run that has taken ``frames`` env steps.

    ``total_frames`` and ``resume`` are those of ``config``.
    """
    if config.total_frames <= frames:
        raise RecipeError(
            f"resume: the run has taken {frames} steps already; raise total_frames, which is "
            f"{config.total_frames}."
        )
    for option in fields(TrainConfig):
        name, value, old = option.name, getattr(config, option.name), getattr(there, option.name)
        chosen = value != option.default if given is None else name in given
        if name in ("total_frames", "resume", "device", "num_threads", "logdir") or not chosen:
            continue
        if name == "env" and value != old:
            raise RecipeError(
                f"resume: {quote(config.resume)} is a run of the environment {old}, not of "
                f"{quote(value)}; leave out --env, or give a run of that environment."
            )
        if value != old:
            say(f"{name} stays {old}, as it was in the run that is resumed, not {value}.")
    # without resume, so that lengths are checked against total_frames
    longer = replace(there, total_frames=config.total_frames)
    return replace(longer, resume=config.resume)


def _failed(config: TrainConfig, folder: RunFolder, parts: Parts, error: Exception) -> RecipeError:
    """Write a checkpoint after an error in the middle of a run, and make the error to raise."""
    text = f"the run has stopped after {parts.trainer.collected_frames} steps: {describe(error)}."
    try:
        parts.trainer.save_after_error()
    except Exception as second:
        older = "; an older checkpoint is there" if folder.rotation.latest() else ""
        text += f" No checkpoint could be written then ({describe(second)}){older}."
    if folder.rotation.latest():
        text += f" To go on: {_resume_command(config, folder)}"
    return RecipeError(text)


def _evaluate(config: TrainConfig, run: Run, parts: Parts, say: Callable[[str], None]) -> None:
    """Evaluate the agent, write and draw the results, and sum them up."""
    trainer, offline = parts.trainer, parts.offline
    held_out = offline.held_out if offline is not None and offline.env_id is None else None
    try:
        given = config, run, parts.predictor, trainer.replay_buffer, trainer.logger
        report = *given[:3], held_out, trainer.logger
        results = write_results(*given) if held_out is None else write_report(*report)
    except Exception as error:
        raise RecipeError(
            f"the run is over and its checkpoint written, but not all of its results: "
            f"{describe(error)}. To evaluate it: {_evaluate_command(config, run.folder)}"
        ) from error
    run.eval_returns, run.imagination, run.report = results
    for line in summary(config, run):
        say(line)
    if held_out is None:
        say(f"  act with it      {_evaluate_command(config, run.folder)}")
    say(f"  all the scalars  {_program('tensorboard')} --logdir {run.folder}")


def _resume_command(config: TrainConfig, folder: RunFolder) -> str:
    return (
        f"{_program('python')} -m layeredrl_trl train --resume {folder.path} "
        f"--total-frames {config.total_frames}{_env_option(config)}"
    )


def _evaluate_command(config: TrainConfig, folder: Path) -> str:
    return f"{_program('python')} -m layeredrl_trl evaluate --run {folder}{_env_option(config)}"


def _env_option(config: TrainConfig) -> str:
    """Write an id with a module, which is never taken from a file."""
    return f" --env {config.env}" if ":" in config.env else ""


def _program(name: str) -> str:
    """Return the path of a program next to this Python, relative to the working folder if in it."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
