"""Time of a learning step and of a rollout against one size at a time: a table and a picture.

    python -m benchmarks.scaling

What is not varied is that of ``ens5``: 5 members, 4 particles each, batch 256, 128 envs, horizon
10, 100,000 transitions. Least time of several.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torchrl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.workloads import (
    ACTION_DIM,
    BATCH_SIZE,
    BUFFER_SIZE,
    OBSERVATION_DIM,
    WORKLOADS,
    Workload,
    make_buffer,
    make_predictor,
    make_transitions,
)

ENS5 = WORKLOADS["ens5"]
STEPS = 10


def least(work: Callable[[], object], device: str) -> float:
    """Milliseconds."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[2:])


def learning(
    device: str, workload: Workload = ENS5, batch_size: int = BATCH_SIZE, size: int = BUFFER_SIZE
) -> float:
    buffer = make_buffer(make_transitions(size), device)
    predictor = make_predictor(workload, device)
    return least(lambda: predictor.learn(buffer, STEPS, batch_size, batch_size, 0), device) / STEPS


def rolling(device: str, workload: Workload = ENS5, n_envs: int = 128, horizon: int = 10) -> float:
    observation = torch.randn(n_envs, OBSERVATION_DIM, device=device)
    actions = torch.rand(n_envs, horizon, ACTION_DIM, device=device) * 2 - 1
    predictor = make_predictor(workload, device)
    with torch.no_grad():
        return least(lambda: predictor.rollout(observation, actions), device)


def varied(name: str, numbers: Iterable[int]) -> list[Workload]:
    return [dataclasses.replace(ENS5, **{name: number}) for number in numbers]


def curves(device: str) -> dict[str, tuple[str, dict[int, float]]]:
    """Panels: what is varied, what is timed, and milliseconds by size."""
    members, particles = [1, 2, 5, 10, 20], [1, 4, 16]
    batches, sizes, horizons = [64, 256, 1024], [10**4, 10**5, 10**6], [5, 10, 20, 40]
    return {
        "members": (
            "learn",
            {w.n_models: learning(device, w) for w in varied("n_models", members)},
        ),
        "batch": ("learn", {n: learning(device, batch_size=n) for n in batches}),
        "transitions": ("learn", {n: learning(device, size=n) for n in sizes}),
        "members ": (
            "rollout",
            {w.n_models: rolling(device, w) for w in varied("n_models", members)},
        ),
        "particles of a member": (
            "rollout",
            {w.n_particles: rolling(device, w) for w in varied("n_particles", particles)},
        ),
        "horizon": ("rollout", {n: rolling(device, horizon=n) for n in horizons}),
        "envs": ("rollout", {n: rolling(device, n_envs=n) for n in (16, 128, 1024)}),
    }


def draw(panels: dict[str, tuple[str, dict[int, float]]], path: Path) -> None:
    """Double logarithmic, with a line of slope 1 through the last point."""
    figure = Figure(figsize=(2.5 * len(panels), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (varied_size, (work, times)) in zip(
        figure.subplots(1, len(panels)), panels.items(), strict=True
    ):
        sizes, values = list(times), list(times.values())
        axes.loglog(sizes, values, "o-", color="#1f6fb4")
        in_proportion = [values[-1] * size / sizes[-1] for size in sizes]
        axes.loglog(sizes, in_proportion, "--", color="#999999", linewidth=1)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
        axes.minorticks_off()
        axes.set_title(f"{work}: {varied_size.strip()}", fontsize=9)
        axes.set_ylim(1, 400)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("ms (dashed: in proportion)")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path, default=Path("benchmarks/scaling.png"))
    args = parser.parse_args()
    torchrl.logger.setLevel("WARNING")
    torch.set_num_threads(2)
    panels = curves(args.device)
    print("| work | varied | milliseconds at size |\n|---|---|---|")
    for name, (work, times) in panels.items():
        each = ", ".join(f"{size:,}: {value:.2f}" for size, value in times.items())
        print(f"| {work} | {name.strip()} | {each} |")
    draw(panels, args.picture)
    print(f"\n{args.picture}")


if __name__ == "__main__":
    main()
