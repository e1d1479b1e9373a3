"""Peak memory of learning and of rollouts, beyond imports, buffer and networks: a table.

    python -m benchmarks.memory

Each number is of a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from itertools import product

import torch
import torchrl

from benchmarks.bare import BareImagination, BareLearner
from benchmarks.workloads import (
    ACTION_DIM,
    BATCH_SIZE,
    BUFFER_SIZE,
    OBSERVATION_DIM,
    WORKLOADS,
    make_buffer,
    make_predictor,
    make_transitions,
)


def make_work(work: str, name: str, who: str) -> Callable[[], object]:
    workload = WORKLOADS[name]
    if work == "learn":
        columns = make_transitions(BUFFER_SIZE)
        if who == "bare":
            learner = BareLearner(workload, columns)
            return lambda: [learner.step() for _ in range(50)]
        buffer, predictor = make_buffer(columns), make_predictor(workload)
        return lambda: predictor.learn(buffer, 50, BATCH_SIZE, BATCH_SIZE, 0)
    observation, actions = torch.randn(1024, OBSERVATION_DIM), torch.rand(1024, 15, ACTION_DIM)
    imagination = (BareImagination if who == "bare" else make_predictor)(workload)
    return torch.no_grad()(lambda: imagination.rollout(observation, actions))


def peak(work: str, name: str, who: str) -> float:
    """MiB by which the work raises the peak of this process."""
    run = make_work(work, name, who)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torchrl.logger.setLevel("WARNING")
    torch.set_num_threads(1)
    if args.child:
        print(peak(*args.child))
        return
    print("| work | bare, MiB | ours, MiB |\n|---|---|---|")
    for work, name in product(("learn", "rollout 1,024 x 15"), WORKLOADS):
        numbers = []
        for who in ("bare", "ours"):
            command = [sys.executable, "-m", "benchmarks.memory", "--child", work, name, who]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            out = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            numbers.append(float(out.stdout.split()[-1]))
        print(f"| {work}, {name} | {numbers[0]:.0f} | {numbers[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
