"""Throughput of a run with 1, 2 and 4 processes that collect, waiting for learning or beside it.

``python -m benchmarks.collectors`` runs the recipe's own parts on Pendulum-v1, with the planner of
its defaults, and prints a row for each way to collect: env steps and learn steps per second, once
the first random phase is over.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from layeredrl_trl.recipes import TrainConfig, make_env
from layeredrl_trl.recipes.agent import Spaces, make_predictor
from layeredrl_trl.recipes.run_folder import RunFolder
from layeredrl_trl.recipes.training import make_parts

_WAYS = {
    "1 process": {},
    "1 process, 4 envs": {"num_envs": 4},
    "2 workers": {"num_workers": 2},
    "2 workers, beside learning": {"num_workers": 2, "asynchronous": True},
    "4 workers": {"num_workers": 4},
    "4 workers, beside learning": {"num_workers": 4, "asynchronous": True},
}


def throughput(config: TrainConfig, folder: Path) -> tuple[float, float]:
    """Env steps and learn steps per second of planning and learning."""
    torch.manual_seed(config.seed)
    env = make_env(config.env)
    spaces = Spaces.of(env)
    env.close()
    parts = make_parts(
        config, RunFolder(folder), make_predictor(config, spaces), None, 0, config.total_frames
    )
    trainer, moments = parts.trainer, []
    trainer.progress_bar = False
    trainer.save_trainer_interval = 10**9

    def note() -> None:
        steps = trainer.optimization_stepper.steps
        moments.append((time.perf_counter(), trainer.collected_frames, steps))

    trainer.register_op("post_steps", note)
    trainer.train()
    later = [moment for moment in moments if moment[1] > 2 * config.init_random_frames]
    seconds, frames, steps = (last - first for first, last in zip(later[0], later[-1], strict=True))
    return frames / seconds, steps / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1200)
    parser.add_argument("--updates-per-frame", type=float, default=1.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    config = TrainConfig(
        total_frames=arguments.frames,
        init_random_frames=200,
        frames_per_batch=40,
        updates_per_frame=arguments.updates_per_frame,
    )
    print(f"{'':28}{'env steps/s':>12}{'learn steps/s':>15}")
    for name, options in _WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            frames, steps = throughput(replace(config, **options), Path(folder))
        print(f"{name:28}{frames:12.1f}{steps:15.1f}", flush=True)


if __name__ == "__main__":
    main()
