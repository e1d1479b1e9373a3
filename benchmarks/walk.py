"""How much of the package one step of `learn` and one plan pass through.

`python -m benchmarks.walk` follows both with a tracer and prints, for each: the files and functions
of the package that ran, the lines of these files, the lines that ran, and the package's frames on
the stack at the first matrix product. And of the package as a whole: files, lines, longest file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict

import layeredrl_trl
from benchmarks.workloads import (
    OBSERVATION_DIM,
    WORKLOADS,
    action_spec,
    make_buffer,
    make_predictor,
    make_transitions,
)
from layeredrl_trl.planners import ICEMPlanner

PACKAGE = Path(layeredrl_trl.__file__).parent
PRODUCTS = ("addmm", "baddbmm", "linear")


class Walk(NamedTuple):
    """What was passed through: files, functions as ``(file, first line)``, lines that ran."""

    files: set[str]
    functions: set[tuple[str, int]]
    lines: set[tuple[str, int]]
    hops: int | None


def walk(work: Callable[[], Any]) -> Walk:
    """Trace ``work``."""
    files, functions, lines = set(), set(), set()
    hops: list[int] = []
    prefix = str(PACKAGE)

    def trace(frame: FrameType, event: str, _: Any):
        name = frame.f_code.co_filename
        if not name.startswith(prefix):
            return None
        files.add(name)
        functions.add((name, frame.f_code.co_firstlineno))
        lines.add((name, frame.f_lineno))
        return trace

    def watch(product):
        def watched(*args, **kwargs):
            frame, depth = sys._getframe(1), 0
            while frame is not None:
                depth += frame.f_code.co_filename.startswith(prefix)
                frame = frame.f_back
            hops.append(depth)
            return product(*args, **kwargs)

        return watched

    before = {name: getattr(torch, name) for name in PRODUCTS if hasattr(torch, name)}
    for name, product in before.items():
        setattr(torch, name, watch(product))
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
        for name, product in before.items():
            setattr(torch, name, product)
    return Walk(files, functions, lines, hops[0] if hops else None)


def length(file: str | Path) -> int:
    return Path(file).read_text().count("\n")


def main() -> None:
    workload = WORKLOADS["ens5"]
    predictor, buffer = make_predictor(workload), make_buffer(make_transitions(2000))
    predictor.learn(buffer, 4, 64, 64, 1000)
    env = predictor.env(action_spec(), num_particles=1)
    planner = ICEMPlanner(env, planning_horizon=5, optim_steps=2, num_candidates=32, top_k=6)
    start = TensorDict({"observation": torch.randn(1, OBSERVATION_DIM)}, batch_size=[1])
    state = env.initial_state(start)
    works = {
        "one step of `learn`": lambda: predictor.learn(buffer, 1, 64, 64, 1000),
        "one plan": lambda: planner(state.clone()),
    }
    print("| work | files | lines of these files | functions | lines that ran | hops |")
    print("|---|---|---|---|---|---|")
    for name, work in works.items():
        work()
        seen = walk(work)
        total = sum(map(length, seen.files))
        counts = f"{len(seen.files)} | {total:,} | {len(seen.functions)} | {len(seen.lines):,}"
        print(f"| {name} | {counts} | {seen.hops} |")
    files = sorted(PACKAGE.rglob("*.py"), key=length)
    longest = files[-1].relative_to(PACKAGE).as_posix()
    total = sum(map(length, files))
    print(
        f"\npackage: {len(files)} files, {total:,} lines, longest {longest} ({length(files[-1])})"
    )


if __name__ == "__main__":
    main()
