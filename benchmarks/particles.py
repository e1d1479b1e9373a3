"""Does a plan need all particles? Trained agents plan with one particle a candidate, and with more.

    python -m benchmarks.particles runs/learning_curves/Reacher*/seed*/*/*/checkpoint.pt

Each checkpoint acts in the same episodes with each number of particles, so differences are paired.
With one, candidates are dealt out to the members of the ensemble.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
import torchrl

from layeredrl_trl.recipes import episode_returns, make_env, run_episodes
from layeredrl_trl.recipes.agent import make_predictor
from layeredrl_trl.recipes.checkpoint import Checkpoint, restore


def mean_return(path: Path, num_particles: int, episodes: int) -> tuple[str, float, float]:
    """Environment, mean return of its episodes and milliseconds per action."""
    checkpoint = Checkpoint.load(path, "cpu")
    config = dataclasses.replace(checkpoint.config, num_particles=num_particles)
    predictor = make_predictor(config, make_env(config.env))
    restore(predictor, checkpoint.predictor, path)
    start = time.perf_counter()
    rollout = run_episodes(config, predictor, episodes=episodes, seed=20_000)
    seconds = time.perf_counter() - start
    actions = rollout.shape[1] * episodes
    return config.env, episode_returns(rollout).mean().item(), 1e3 * seconds / actions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 5, 20])
    parser.add_argument("--episodes", type=int, default=10)
    args = parser.parse_args()
    torchrl.logger.setLevel("WARNING")
    torch.set_num_threads(1)
    results: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for path in args.checkpoints:
        for number in args.particles:
            env, value, cost = mean_return(path, number, args.episodes)
            results[env, number].append((value, cost))
            print(f"{path}: {number} particles {value:.1f}, {cost:.1f} ms", flush=True)
    print("\n| environment | particles | mean | of each checkpoint | ms per action |")
    print("|---|---|---|---|---|")
    for (env, number), pairs in results.items():
        values, costs = zip(*pairs, strict=True)
        each = ", ".join(f"{value:.1f}" for value in values)
        print(
            f"| `{env}` | {number} | {statistics.mean(values):.1f} | {each} "
            f"| {statistics.median(costs):.1f} |"
        )


if __name__ == "__main__":
    main()
