"""Kernels of replayed CUDA graphs, and the time of the host for one, counted without a GPU.

    python -m benchmarks.replays

Work is recorded on the CPU by the tests' stand-in for CUDA graphs. Views and allocations are not
counted; in a graph each kernel takes some 2 us at least. "Compiled" counts what is left where steps
of the model are generated code, whose kernels are counted in that code. The host's time is that of
a replay that does nothing, on one thread: least of several.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
import torchrl
from tensordict import TensorDict
from torch._inductor.utils import run_and_get_code
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
from layeredrl_trl.acceleration import cuda_graphs, device_update, ensemble_rollout, pieces
from layeredrl_trl.planners import ICEMPlanner
from layeredrl_trl.predictors import RewardPredictor
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
        self.kernels_of_step = 0  # in its generated code
        self.kernels = 0
        self.compiled = 0

    def __call__(self, work: Callable[[], object], device: torch.device):
        recorder, state, parts = Recorder(), torch.get_rng_state(), []
        step = ensemble_rollout._step

        def noted(*given):
            start = len(recorder.steps)
            outcome = step(*given)
            parts.append((start, len(recorder.steps)))
            return outcome

        with recorder, patch.object(ensemble_rollout, "_step", noted):
            outputs = work()
        torch.set_rng_state(state)
        count = [is_kernel(f, (a, k), o) for f, a, k, o in recorder.steps]
        self.kernels = sum(count)
        self.compiled = self.kernels + sum(self.kernels_of_step - sum(count[a:b]) for a, b in parts)
        return (lambda: None), outputs


def kernels_of_step(predictor: RewardPredictor) -> int:
    """Kernels in the code of a step of the model: products, and what is generated."""
    env = predictor.env(action_spec(), compile_imagine=True)
    state = env.initial_state(TensorDict(observation=torch.randn(9, OBSERVATION_DIM), batch_size=9))
    with torch.no_grad():
        _, (code,) = run_and_get_code(env.imagine, state, torch.rand(9, 2, ACTION_DIM))
    return len(re.findall(r"extern_kernels\.\w+\(|cpp_fused\w*\(", code.partition("def call")[2]))


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
    print("| work | kernels | compiled | host, us |\n|---|---|---|---|")
    with (
        patch.object(cuda_graphs, "record", counter),
        patch.object(cuda_graphs, "can_record", lambda _: True),
        patch.object(device_update, "can_record", lambda _: True),
        patch.object(pieces, "should_split", lambda _: False),  # on a CPU only
    ):
        for name, workload in WORKLOADS.items():
            predictor = make_predictor(workload, cudagraphs=True)
            counter.kernels_of_step = kernels_of_step(predictor)
            predictor.learn(buffer, 10, BATCH_SIZE, BATCH_SIZE, 0)
            kernels = counter.kernels
            for n in (20, 400):
                predictor.learn(buffer, 10, 2, 2, 0)
                seconds = least(lambda p=predictor, n=n: p.learn(buffer, n, 2, 2, 0)) / n
                print(f"| learn, {name}, {n} steps a call | {kernels} | | {1e6 * seconds:.0f} |")
            observation = torch.randn(N_ENVS, OBSERVATION_DIM)
            actions = torch.rand(N_ENVS, 15, ACTION_DIM)
            env = predictor.env(action_spec(), cudagraphs=True)
            state = env.initial_state(TensorDict(observation=observation, batch_size=[N_ENVS]))
            with torch.no_grad():
                seconds = least(lambda e=env, s=state, a=actions: e.imagine(s, a))
            kernels = f"{counter.kernels} | {counter.compiled}"
            print(f"| rollout of 15 steps, {name} | {kernels} | {1e6 * seconds:.0f} |")
            env = predictor.env(action_spec(), num_particles=1)
            planner = ICEMPlanner(
                env,
                planning_horizon=15,
                optim_steps=6,
                num_candidates=128,
                top_k=12,
                gamma=GAMMA,
                cudagraphs=True,
            )
            state = env.initial_state(TensorDict(observation=observation, batch_size=[N_ENVS]))
            seconds = least(lambda p=planner, s=state: p(s.copy()))
            kernels = f"{counter.kernels} | {counter.compiled}"
            print(f"| plan of 6 rounds, {name} | {kernels} | {1e6 * seconds:.0f} |")


if __name__ == "__main__":
    main()
