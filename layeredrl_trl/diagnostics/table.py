"""The report as a Markdown table: what is measured, its value, and what a good value is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from tensordict import TensorDict

from layeredrl_trl.diagnostics.one_step import LEVELS

_Row = tuple[str, str, str]
"""The three cells of a row: the quantity, its value, what a good value is."""


def report_table(metrics: TensorDict, missing: Mapping[str, str], notes: Sequence[str]) -> str:
    """Write the table of a :class:`~layeredrl_trl.diagnostics.ModelReport` in Markdown.

    ``missing`` and ``notes`` are those of the report.
    """

    def value(section: str, name: str, *index: int, form: str = ".3g") -> str:
        """Format a number, or say why it is NaN."""
        x = float(metrics[section, name][index])
        return why_missing(missing, section, name) if math.isnan(x) else f"{x:{form}}"

    open_loop = metrics["open_loop"]
    rows = [
        *_open_loop_rows(open_loop, last_step(metrics), partial(value, "open_loop")),
        *_other_rows(open_loop["error"].numel(), value),
    ]
    head = ["", "| quantity | value | good is |", "|:--|--:|:--|"]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*(f"{note}  " for note in notes), *head, *lines])


def last_step(metrics: TensorDict) -> int:
    """Return the last step of the horizon that any segment has, counted from 0."""
    return int((metrics["open_loop", "segments"] > 0).sum()) - 1


def why_missing(missing: Mapping[str, str], section: str, name: str) -> str:
    """Return the reason why an entry is NaN."""
    return missing.get(f"{section}/{name}", missing.get(section, "not a number"))


def _open_loop_rows(entries: TensorDict, last: int, value: Callable[..., str]) -> list[_Row]:
    rows, horizon, known = [], entries["error"].numel(), not entries["error"][0].isnan()
    for step in sorted({0, last}):
        after = f"after {step + 1} imagined step{'s' if step else ''}"
        in_std = f"in std of the data ({int(entries['segments'][step])} segments)"
        coverage = f"80% interval of the particles holds the truth, {after}"
        rows += [
            (f"error {after}, {in_std}", value("error", step), "near 0; 1 is a blind guess"),
            (f"… over that of “nothing changes”, {after}", value("error_ratio", step), "below 1"),
            (coverage, value("coverage", step, 1), "0.8"),
        ]
    useful = f"{int(entries['useful_steps'])} of {last + 1}" if known else value("error", 0)
    good = "all of them" if last + 1 == horizon else f"all; no segment has all {horizon} steps"
    return [*rows, ("steps until “nothing changes” is as good", useful, good)]


def _other_rows(horizon: int, value: Callable[..., str]) -> list[_Row]:
    one_step, spread, event, reward = (
        partial(value, section) for section in ("one_step", "spread", "termination", "reward")
    )
    nll = "negative log-likelihood of one step, nats per latent dim"
    guess = f"low; below {one_step('nll_guess')}, of one Gaussian fitted to the changes"
    coverages = [
        (
            f"{level:.0%} interval holds the truth, one step",
            one_step("coverage", i),
            f"{level:g}; below it is overconfident",
        )
        for i, level in enumerate(LEVELS)
    ]
    disagreement = "rank correlation of the members' disagreement and error"
    correlated = "above 0, up to 1"
    actual = f"the real number: {event('actual', form='.0f')}"
    of_return = f"the return of {horizon} imagined step{'s' if horizon > 1 else ''}"
    explained = "1; 0 is a constant"
    return [
        (nll, one_step("nll"), guess),
        *coverages,
        ("predicted std over error", spread("spread_over_error"), "1; below it is overconfident"),
        ("rank correlation of predicted std and error", spread("total_correlation"), correlated),
        (disagreement, spread("epistemic_correlation"), correlated),
        ("terminations expected", event("expected", form=".1f"), actual),
        ("precision of termination (probability over 0.5)", event("precision"), "1"),
        ("recall of termination (probability over 0.5)", event("recall"), "1"),
        ("area under the ROC curve of termination", event("auc"), "1; 0.5 is chance"),
        ("explained variance of the reward", reward("explained_variance"), explained),
        (f"explained variance of {of_return}", reward("return_explained_variance"), explained),
        (f"correlation of {of_return} with the real one", reward("return_correlation"), "1"),
    ]
