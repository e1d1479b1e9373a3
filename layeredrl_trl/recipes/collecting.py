"""How a run collects: one env or several, in this process or in workers."""

from __future__ import annotations

import multiprocessing
import signal
from functools import partial
from typing import NamedTuple

import torch
from torchrl.collectors import BaseCollector, Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.envs import EnvBase, Transform

from layeredrl_trl.planners import Explorer, SamplingPlanner
from layeredrl_trl.predictors import RewardPredictor
from layeredrl_trl.recipes.agent import make_policy
from layeredrl_trl.recipes.config import TrainConfig
from layeredrl_trl.recipes.environments import make_env

_APART = 100_003
"""Distance of the seeds of two workers, each of which may have many envs."""

_SEEDS = 2**31


class Collecting(NamedTuple):
    """A collector, its policy, and the planner inside the policy."""

    collector: BaseCollector
    explorer: Explorer
    planner: SamplingPlanner


def make_collector(config: TrainConfig, predictor: RewardPredictor, frames: int = 0) -> Collecting:
    """Make the collector of a run; it never ends by itself, the trainer stops it.

    With ``num_workers`` it has as many processes. These wait for each other and for learning, or,
    if ``asynchronous``, collect while the trainer learns.

    Args:
        config: options of the run.
        predictor: the planner plans in its model.
        frames: env steps that the run has taken. Workers explore from there on, and with random
            numbers of their own: a resumed run does not begin with the same episodes again.
    """
    repeat, workers = config.action_repeat, config.num_workers
    make = partial(make_env, config.env, num_envs=config.num_envs, action_repeat=repeat)
    env = make(seed=config.seed)
    spec = env.action_spec_unbatched
    policy, planner = make_policy(config, predictor, spec)
    share = repeat * workers
    explorer = Explorer(
        policy,
        spec,
        init_random_steps=max(1, config.init_random_frames // share),
        planned_steps=config.planned_frames // share,
        random_steps=config.random_frames // share,
        planner=planner,
    )
    primer = planner.make_tensordict_primer()
    options = {
        "frames_per_batch": config.frames_per_batch // repeat,
        "total_frames": -1,
        "auto_register_policy_transforms": False,
    }
    if workers == 1:
        env.append_transform(primer)
        collector = Collector(env, explorer, **options)
    else:
        env.close()
        # Each worker gets a copy, and its collector calls it once to try it.
        explorer.steps = frames // share - config.num_envs
        first = workers * frames
        seeds = [(config.seed + _APART * i) % _SEEDS for i in range(first, first + workers)]
        makers = [partial(_make_worker_env, make, primer, seed) for seed in seeds]
        if config.asynchronous:
            options["frames_per_batch"] //= workers
            collector = MultiAsyncCollector(makers, explorer, **options)
        else:
            collector = MultiSyncCollector(makers, explorer, cat_results="stack", **options)
    explorer.steps = 0  # a collector in this process has called the policy once to try it
    return Collecting(collector, explorer, planner)


def _make_worker_env(make: partial[EnvBase], primer: Transform, seed: int) -> EnvBase:
    """Make the env of a worker process, whose random numbers are its own.

    A terminal sends Ctrl-C to the workers, too, and a cluster SIGTERM. They go on, so that the
    process that learns can end the run after its batch; then it ends them.
    """
    if multiprocessing.parent_process() is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    return make(seed=seed).append_transform(primer)
