"""Two threads, as the numbers in the README; and a table of ratios at the end.

The machine drifts by a quarter from minute to minute, so what is compared takes turns: each round
of a benchmark comes right behind one of what it is compared to.
"""

from __future__ import annotations

import platform
import time

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture
def take_turns(benchmark):
    """Time work in turns with what it is compared to."""

    def take(group, name, work, other_name, other_work, *, rounds, calls=1, divide=1):
        """Time ``calls`` of each in a round; what is reported is divided by ``divide``."""
        others = []

        def repeat(work):
            for _ in range(calls):
                work()

        def other_first():
            start = time.perf_counter()
            repeat(other_work)
            others.append(time.perf_counter() - start)

        benchmark.group, benchmark.name = group, name
        benchmark.pedantic(repeat, (work,), setup=other_first, rounds=rounds, warmup_rounds=2)
        least = min(others[2:] or [float("nan")])  # pytest without benchmarks: one round
        benchmark.extra_info |= {
            "divide": calls * divide,
            "other": other_name,
            "other_least": least,
        }

    return take


def pytest_terminal_summary(terminalreporter, config):
    """Print the least time of each benchmark, and how it compares to the other."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    write = terminalreporter.write_line
    terminalreporter.section("least times; ratio: time of the other over ours")
    write(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 2 threads")
    write("")
    write("| work | who | ms | other | ms | ratio |")
    write("|---|---|---|---|---|---|")
    for benchmark in session.benchmarks:
        if not benchmark.stats.data:  # it failed
            continue
        info = benchmark.extra_info
        ours, other = (
            1e3 * seconds / info["divide"] for seconds in (benchmark.stats.min, info["other_least"])
        )
        write(
            f"| {benchmark.group} | {benchmark.name} | {ours:.3g} | {info['other']} "
            f"| {other:.3g} | {other / ours:.2f} |"
        )
