"""Runs of a few steps, and what their command line prints."""

import re

from layeredrl_trl.__main__ import main
from layeredrl_trl.recipes import TrainConfig
from tests.recipes.odd_envs import odd

TINY = TrainConfig(
    total_frames=60,
    init_random_frames=40,
    frames_per_batch=20,
    updates_per_frame=0.1,
    batch_size=16,
    hidden_size=16,
    planning_horizon=3,
    num_candidates=8,
    top_k=2,
    optim_steps=1,
    eval_episodes=2,
)
# An env whose episodes are short.
SHORT = odd("Good")


def arguments_of(config, **changes):
    """Write options as the arguments of ``train``."""
    options = {name: x for name, x in vars(config).items() if x != getattr(TrainConfig, name, None)}
    return [
        "train",
        *(f"--{name.replace('_', '-')}={value}" for name, value in (options | changes).items()),
    ]


def error_of(arguments, capsys):
    """Run a command that fails, check that it prints one line of error, and return that line.

    The bar of progress, which has no end of line before it is closed, does not count.
    """
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.endswith("\n")
    lines = [
        line
        for line in printed.splitlines()
        if line.strip() and not re.search("step/s|s/step", line)
    ]
    assert len(lines) == 1, printed
    assert lines[0].startswith("error: ") and lines[0].isprintable()
    return lines[0]
