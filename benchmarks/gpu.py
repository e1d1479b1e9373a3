"""Check and time everything on a GPU, in one call of a few minutes, and print a table.

    python -m benchmarks.gpu                     # on a machine with CUDA
    python -m benchmarks.gpu --device cpu        # that the script works, where there is none

First the numbers are checked against the CPU, then learning steps, rollouts and plans are timed,
with the floor of each by arithmetic: operations of the networks over the measured rate of a matrix
product. TF32 is off unless asked for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torchrl
from tensordict import TensorDict

from benchmarks.workloads import (
    ACTION_DIM,
    BATCH_SIZE,
    BUFFER_SIZE,
    GAMMA,
    OBSERVATION_DIM,
    WORKLOADS,
    Workload,
    action_spec,
    make_buffer,
    make_predictor,
    make_transitions,
)
from layeredrl_trl.planners import ICEMPlanner


def sync(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def least(work: Callable[[], object], device: str, rounds: int = 8) -> float:
    """Seconds of the fastest call, after two to warm up."""
    times = []
    for _ in range(rounds + 2):
        sync(device)
        start = time.perf_counter()
        work()
        sync(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def matrix_rate(device: str, n: int) -> float:
    """Operations per second of a product of matrices of ``n`` rows."""
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    return 2 * n**3 / least(lambda: a @ b, device)


def work_of(net: torch.nn.Module) -> int:
    """Multiplications and additions of one row through all members of a network."""
    return 2 * sum(p.numel() for p in net.parameters() if p.ndim > 1)


def floor_of_learning(predictor, workload: Workload) -> int:
    """Operations of a step: forward, and twice as many backward; targets forward only."""
    model = work_of(predictor.model)
    heads = work_of(predictor.rew_func) + work_of(predictor.val_func)
    rows = BATCH_SIZE * workload.k_steps
    return 3 * BATCH_SIZE * model + rows * (3 * heads + work_of(predictor.val_func))


def floor_of_rollout(predictor, workload: Workload, rows: int) -> int:
    """Operations of ``rows`` steps of all particles."""
    one_member = work_of(predictor.model) / workload.n_models
    particles = workload.n_models * workload.n_particles
    return int(rows * particles * (one_member + work_of(predictor.rew_func)))


def check(device: str) -> None:
    """Deterministic rollouts, and losses, are those of the CPU."""
    for workload in WORKLOADS.values():
        there, here = make_predictor(workload, device), make_predictor(workload)
        there.load_state_dict(here.state_dict())
        observation, actions = torch.randn(16, OBSERVATION_DIM), torch.rand(16, 5, ACTION_DIM)
        results = [
            p.rollout(observation.to(d), actions.to(d), deterministic=True)[0]["next", "reward"]
            for p, d in ((there, device), (here, "cpu"))
        ]
        torch.testing.assert_close(results[0].cpu(), results[1], rtol=1e-3, atol=1e-4)
        buffer = make_buffer(make_transitions(2000))
        batch = here.compute_targets(buffer, 64, workload.k_steps, 3)
        single = here.sample_model_batch(buffer, 64)
        for p in (there, here):
            p.eval()
        losses = [
            p.loss(batch.to(d), single.to(d))[0].detach().cpu()
            for p, d in ((there, device), (here, "cpu"))
        ]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
        print(f"{workload.name}: rollouts and losses are those of the CPU", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument(
        "--compile", action="store_true", help="also compiled and captured learning"
    )
    args = parser.parse_args()
    device = args.device
    torchrl.logger.setLevel("WARNING")
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    print(f"torch {torch.__version__}, {device}", end="")
    print("" if device == "cpu" else f", {torch.cuda.get_device_name()}")
    check(device)
    rate = matrix_rate(device, 1024 if device == "cpu" else 8192)
    print(f"matrix product: {rate / 1e12:.2f} TFLOP/s\n\n| work | ms | floor, ms | ratio |")
    print("|---|---|---|---|")

    def report(work: str, seconds: float, operations: int) -> None:
        floor = operations / rate
        print(f"| {work} | {1e3 * seconds:.3f} | {1e3 * floor:.3f} | {seconds / floor:.1f} |")

    variants: dict[str, dict[str, bool]] = {"eager": {"compile": False}}
    if args.compile:
        variants["compiled"] = {"compile": True}
    if args.compile and device != "cpu":
        variants["captured"] = {"compile": True, "cudagraphs": True}
    buffer = make_buffer(make_transitions(BUFFER_SIZE), device)
    for workload in WORKLOADS.values():
        for name, options in variants.items():
            predictor = make_predictor(workload, device, **options)

            def learn(predictor=predictor):
                predictor.learn(buffer, 20, BATCH_SIZE, BATCH_SIZE, 0)

            label = f"learn, {workload.name}, {name}"
            report(label, least(learn, device) / 20, floor_of_learning(predictor, workload))
        predictor = make_predictor(workload, device)
        for n_envs, horizon in ((128, 10), (1024, 15)):
            observation = torch.randn(n_envs, OBSERVATION_DIM, device=device)
            actions = torch.rand(n_envs, horizon, ACTION_DIM, device=device)

            @torch.no_grad()
            def roll(predictor=predictor, observation=observation, actions=actions):
                predictor.rollout(observation, actions)

            seconds = least(roll, device, 4)
            operations = floor_of_rollout(predictor, workload, n_envs * horizon)
            report(f"rollout, {workload.name}, {n_envs} x {horizon}", seconds, operations)
        env = predictor.env(action_spec(device), num_particles=1)
        planner = ICEMPlanner(
            env, planning_horizon=15, optim_steps=6, num_candidates=128, top_k=12, gamma=GAMMA
        ).to(device)
        rows = sum(planner._num_candidates(i) for i in range(6)) * 15 * 8
        particles = workload.n_models * workload.n_particles
        observation = torch.randn(8, OBSERVATION_DIM, device=device)
        state = env.initial_state(
            TensorDict(observation=observation, batch_size=[8], device=device)
        )
        report(
            f"plan, {workload.name}, 8 envs, one particle",
            least(lambda p=planner, s=state: p(s.copy()), device, 4),
            floor_of_rollout(predictor, workload, rows) // particles,
        )


if __name__ == "__main__":
    main()
