"""Learn five environments from scratch, some seeds each: a table of all returns, and the curves.

    python -m benchmarks.learning_curves                      # all of the table in the README
    python -m benchmarks.learning_curves --tasks pendulum --seeds 0 1 --workers 1

Each run is the command line of the library, in a process of its own, with one thread. A run that
is there already is not done again, so the script can be stopped and gone on with. It must have the
same options and the same version: of all source files of the package, of torch, torchrl and the
simulators. `--any-version` also takes runs of older versions, and the table names these.
What counts is the mean return of the evaluation episodes after the last step, never that of the
best seed or of the best checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import layeredrl_trl

PACKAGE = Path(layeredrl_trl.__file__).parent
UNKNOWN = "unknown version"  # of runs from before versions were noted


@dataclass(frozen=True)
class Task:
    """An environment, the options to learn it with, and what it must reach."""

    env: str
    frames: int
    target: float
    options: tuple[str, ...] = ()

    def command(self, seed: int, folder: Path) -> list[str]:
        return [
            *("train", "--env", self.env, "--seed", str(seed)),
            *("--total-frames", str(self.frames), *self.options, "--logdir", str(folder)),
        ]

    @property
    def shown(self) -> str:
        """The command line, as one would type it."""
        return " ".join(["python -m layeredrl_trl", *self.command(0, Path("X"))[:-2]]).replace(
            "--seed 0", "--seed N"
        )


_FEW = ("--eval-episodes", "5")  # of 500 to 1,000 actions

TASKS = {
    "pendulum": Task("Pendulum-v1", 2000, -180.0),
    "inverted-pendulum": Task("InvertedPendulum-v5", 3000, 1000.0, _FEW),
    # returns differ by the goal that is drawn, by some 2.4 per episode
    "reacher": Task(
        "Reacher-v5",
        10_000,
        -6.0,
        ("--gamma", "0.9", "--planning-horizon", "8", "--eval-episodes", "50"),
    ),
    "cartpole": Task("CartPole-v1", 3000, 475.0, _FEW),
    "swingup": Task(
        "dm_control/cartpole-swingup",
        10_000,
        800.0,
        ("--action-repeat", "2", "--planning-horizon", "20", *_FEW),
    ),
}


def code_version(package: Path = PACKAGE) -> str:
    """Name what a run's numbers depend on beside its options, as a folder may be called."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    parts = [f"code-{digest.hexdigest()[:12]}"]
    for name in ("torch", "torchrl", "torchrl-nightly", "gymnasium", "mujoco"):
        try:
            parts.append(f"{name}-{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "_".join(parts)


def find(place: Path, version: str, any_version: bool) -> Path | None:
    """Summary of the last run of a version; where there is none, of any if that will do."""
    found = list((place / version).glob("*/summary.json"))
    if not found and any_version:
        found = [*place.glob("*/*/summary.json"), *place.glob("*/summary.json")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def run(task: Task, seed: int, folder: Path, any_version: bool = False) -> dict:
    """Learn, or read what an earlier run has left; the content of its ``summary.json``."""
    options = " ".join(task.options) or "default"
    place = folder / f"{task.env}_{task.frames}_{options}".replace("/", "_").replace(" ", "_")
    place, version = place / f"seed{seed}", code_version()
    found = find(place, version, any_version)
    if found is None:
        own = place / version
        own.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "layeredrl_trl", *task.command(seed, own)]
        with (own / "log.txt").open("w") as log:
            subprocess.run(
                command,
                stdout=log,
                stderr=log,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        found = find(own.parent, version, any_version=False)
        assert found is not None
    summary = json.loads(found.read_text())
    episodes = np.loadtxt(found.with_name("episodes.csv"), delimiter=",", skiprows=1, ndmin=2)
    summary["episodes"] = episodes.tolist()
    summary["seed"] = seed
    summary["version"] = UNKNOWN if found.parents[1] == place else found.parents[1].name
    summary["is_current"] = summary["version"] == version
    mean = statistics.mean(summary["eval_returns"])
    reused = "" if summary["is_current"] else f" ({summary['version']})"
    print(f"{task.env} seed {seed}: {mean:.1f}{reused}", flush=True)
    return summary


def versions(runs: list[dict]) -> str:
    """Which seeds were run by which version."""
    seeds = defaultdict(list)
    for one in runs:
        seeds["this version" if one["is_current"] else one["version"]].append(str(one["seed"]))
    if len(seeds) == 1:
        return next(iter(seeds))
    return "; ".join(f"{version}: seeds {', '.join(own)}" for version, own in seeds.items())


def table(results: dict[str, list[dict]]) -> str:
    lines = [
        "| environment | env steps | must reach | median | all seeds | training, median |",
        "|---|---|---|---|---|---|",
    ]
    reused = not all(one["is_current"] for runs in results.values() for one in runs)
    if reused:
        lines = [f"{lines[0]} version |", f"{lines[1]}---|"]
    for name, runs in results.items():
        task = TASKS[name]
        means = [statistics.mean(r["eval_returns"]) for r in runs]
        seconds = statistics.median(r["seconds"] for r in runs)
        lines.append(
            f"| `{task.env}` | {task.frames:,} | {task.target:g} "
            f"| **{statistics.median(means):.1f}** "
            f"| {', '.join(f'{mean:.1f}' for mean in means)} | {seconds / 60:.1f} min |"
            + (f" {versions(runs)} |" if reused else "")
        )
    return "\n".join(lines)


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Draw the returns of the training episodes of every seed, and the target."""
    figure = Figure(figsize=(3.6 * len(results), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, runs) in zip(
        np.atleast_1d(figure.subplots(1, len(results))), results.items(), strict=True
    ):
        task = TASKS[name]
        for one in runs:
            steps, returns = np.array(one["episodes"]).T
            axes.plot(steps, returns, color="#1f6fb4", alpha=0.5, linewidth=1)
        means = [statistics.mean(one["eval_returns"]) for one in runs]
        axes.scatter([task.frames] * len(means), means, color="#222222", s=14, zorder=3)
        axes.axhline(task.target, color="#c44e52", linestyle="--", linewidth=1)
        axes.set_title(task.env.removeprefix("dm_control/"), fontsize=10)
        axes.set(xlabel="environment steps", xlim=(0, task.frames * 1.03))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("return of an episode")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--folder", type=Path, default=Path("runs/learning_curves"))
    parser.add_argument(
        "--any-version",
        action="store_true",
        help="take runs of older code rather than do them again; the table names their versions",
    )
    args = parser.parse_args()
    with ThreadPoolExecutor(args.workers) as pool:
        jobs: dict[str, list[Future]] = {name: [] for name in args.tasks}
        for seed in args.seeds:
            for name in args.tasks:
                job = pool.submit(run, TASKS[name], seed, args.folder, args.any_version)
                jobs[name].append(job)
        results = {name: [job.result() for job in of_task] for name, of_task in jobs.items()}
    print()
    print(table(results))
    print()
    for name in results:
        print(f"    {TASKS[name].shown}")
    picture = args.folder / "learning_curves.png"
    draw(results, picture)
    print(f"\n{picture}")


if __name__ == "__main__":
    main()
