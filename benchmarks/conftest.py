"""Two threads, as the numbers in the README; and a table of ratios at the end."""

from __future__ import annotations

import platform

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    torch.set_num_threads(2)


def pytest_terminal_summary(terminalreporter, config):
    """Print the least time of each benchmark, and how it compares to the first of its group."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    groups: dict[str, list] = {}
    for benchmark in session.benchmarks:
        if not benchmark.stats.data:  # it failed
            continue
        groups.setdefault(benchmark.group, []).append(benchmark)
    write = terminalreporter.write_line
    terminalreporter.section("least times; ratio: time of the first over that of the other")
    write(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 2 threads")
    write("")
    write("| work | who | ms | ratio |")
    write("|---|---|---|---|")
    for group, members in groups.items():
        times = [1e3 * b.stats.min / b.extra_info.get("divide", 1) for b in members]
        for benchmark, time in zip(members, times, strict=True):
            ratio = "" if benchmark is members[0] else f"{times[0] / time:.2f}"
            write(f"| {group} | {benchmark.name} | {time:.3g} | {ratio} |")
