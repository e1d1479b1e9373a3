"""Kernels of replayed CUDA graphs, and the time of the host for one, counted without a GPU.

    python -m benchmarks.replays

Work is recorded on the CPU by the tests' stand-in for CUDA graphs. Views and allocations are not
counted; in a graph each kernel takes some 2 us at least. The host's time is that of a replay that
does nothing, on one thread: least of several.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest.mock import patch

import torch
import torchrl
from tensordict import TensorDict
from torch.utils._pytree import tree_leaves

from benchmarks.workloads import (
    ACTION_DIM,
    BATCH_SIZE,
    GAMMA,
    OBSERVATION_DIM,
    WORKLOADS,
    action_spec,
    make_buffer,
    make_predictor,
    make_transitions,
)
from layeredrl_trl.modules import mlp, recorded
from layeredrl_trl.objectives import update
from layeredrl_trl.planners import ICEMPlanner
from tests.replaying import Recorder

N_ENVS = 8
N_CALLS = 30


def storages(x: object) -> set[int]:
    tensors = (y for y in tree_leaves(x) if isinstance(y, torch.Tensor))
    return {y.untyped_storage().data_ptr() for y in tensors}


def is_kernel(function, given: object, outputs: list[torch.Tensor]) -> bool:
    """Whether an operation computes: it writes in place, or gives memory of its own."""
    name = function._schema.name.partition("::")[2]
    is_new = bool(storages(outputs) - storages(given))
    return name.endswith("_") or (is_new and not name.startswith("empty"))


class Counter:
    """In place of what records: counts kernels, and replays nothing."""

    def __init__(self) -> None:
        self.kernels = 0

    def __call__(self, work: Callable[[], object], device: torch.device):
        recorder, state = Recorder(), torch.get_rng_state()
        with recorder:
            outputs = work()
        torch.set_rng_state(state)
        self.kernels = sum(is_kernel(f, (a, k), o) for f, a, k, o in recorder.steps)
        return (lambda: None), outputs


def least(work: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(N_CALLS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    torchrl.logger.setLevel("WARNING")
    torch.set_num_threads(1)
    counter = Counter()
    buffer = make_buffer(make_transitions(3000))
    print("| work | kernels | host, us |\n|---|---|---|")
    with (
        patch.object(recorded, "record", counter),
        patch.object(recorded, "can_record", lambda _: True),
        patch.object(update, "can_record", lambda _: True),
        patch.object(mlp, "_pays_in_pieces", lambda *_: False),  # on a CPU only
    ):
        for name, workload in WORKLOADS.items():
            predictor = make_predictor(workload, compile=False)
            predictor.learn(buffer, 10, BATCH_SIZE, BATCH_SIZE, 0)
            kernels = counter.kernels
            for n in (20, 400):
                predictor.learn(buffer, 10, 2, 2, 0)
                seconds = least(lambda p=predictor, n=n: p.learn(buffer, n, 2, 2, 0)) / n
                print(f"| learn, {name}, {n} steps a call | {kernels} | {1e6 * seconds:.0f} |")
            observation = torch.randn(N_ENVS, OBSERVATION_DIM)
            actions = torch.rand(N_ENVS, 15, ACTION_DIM)
            with torch.no_grad():
                seconds = least(lambda p=predictor, o=observation, a=actions: p.rollout(o, a))
            print(f"| rollout of 15 steps, {name} | {counter.kernels} | {1e6 * seconds:.0f} |")
            env = predictor.env(action_spec(), num_particles=1)
            planner = ICEMPlanner(
                env, planning_horizon=15, optim_steps=6, num_candidates=128, top_k=12, gamma=GAMMA
            )
            state = env.initial_state(TensorDict(observation=observation, batch_size=[N_ENVS]))
            seconds = least(lambda p=planner, s=state: p(s.copy()))
            print(f"| plan of 6 rounds, {name} | {counter.kernels} | {1e6 * seconds:.0f} |")


if __name__ == "__main__":
    main()
