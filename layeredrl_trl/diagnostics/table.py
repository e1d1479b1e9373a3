"""The report as a Markdown table: what is measured, its value, and what a good value is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tensordict import TensorDict
from torch import Tensor

from layeredrl_trl.diagnostics.one_step import LEVELS

_Row = tuple[str, str, str]
"""The three cells of a row: the quantity, its value, what a good value is."""


def report_table(metrics: TensorDict, missing: Mapping[str, str], notes: Sequence[str]) -> str:
    """Write the table of a :class:`~layeredrl_trl.diagnostics.ModelReport`.

    Args:
        metrics: the report's metrics.
        missing: the reason why an entry is NaN.
        notes: sentences to put before the table.

    Returns:
        Markdown.
    """
    rows = [
        *_open_loop_rows(metrics["open_loop"], last_step(metrics), missing),
        *_one_step_rows(metrics, missing),
        *_termination_rows(metrics["termination"], missing),
        *_reward_rows(metrics["reward"], metrics["open_loop", "error"].numel(), missing),
    ]
    lines = [f"| {' | '.join(row)} |" for row in (("quantity", "value", "good is"), *rows)]
    lines.insert(1, "|:--|--:|:--|")
    return "\n".join([*(f"{note}  " for note in notes), "", *lines])


def last_step(metrics: TensorDict) -> int:
    """Return the last step of the horizon that any segment has, counted from 0."""
    return int((metrics["open_loop", "segments"] > 0).sum()) - 1


def why_missing(missing: Mapping[str, str], section: str, name: str) -> str:
    """Return the reason why an entry is NaN."""
    return missing.get(f"{section}/{name}", missing.get(section, "not a number"))


def _value(
    x: Tensor | float, missing: Mapping[str, str], section: str, name: str, form: str = ".3g"
) -> str:
    """Format a number, or say why it is NaN."""
    x = float(x)
    return why_missing(missing, section, name) if math.isnan(x) else f"{x:{form}}"


def _open_loop_rows(entries: TensorDict, last: int, missing: Mapping[str, str]) -> list[_Row]:
    def value(x: Tensor, name: str) -> str:
        return _value(x, missing, "open_loop", name)

    rows, horizon = [], entries["error"].numel()
    for step in sorted({0, last}):
        after = f"after {step + 1} imagined step{'s' if step else ''}"
        error = value(entries["error"][step], "error")
        ratio = value(entries["error_ratio"][step], "error_ratio")
        coverage = value(entries["coverage"][step, 1], "coverage")
        in_std = f"in std of the data ({int(entries['segments'][step])} segments)"
        rows += [
            (f"error {after}, {in_std}", error, "near 0; 1 is a blind guess"),
            (f"… over that of “nothing changes”, {after}", ratio, "below 1"),
            (f"80% interval of the particles holds the truth, {after}", coverage, "0.8"),
        ]
    first_error = entries["error"][0]
    useful = f"{int(entries['useful_steps'])} of {last + 1}"
    useful = value(first_error, "useful_steps") if first_error.isnan() else useful
    good = "all of them" if last + 1 == horizon else f"all; no segment has all {horizon} steps"
    return [*rows, ("steps until “nothing changes” is as good", useful, good)]


def _one_step_rows(metrics: TensorDict, missing: Mapping[str, str]) -> list[_Row]:
    one_step, spread = metrics["one_step"], metrics["spread"]
    nll, guess = (
        _value(one_step[name], missing, "one_step", name) for name in ("nll", "nll_guess")
    )
    good = f"low; below {guess}, of one Gaussian fitted to the changes"
    rows = [("negative log-likelihood of one step, nats per latent dim", nll, good)]
    for level, share in zip(LEVELS, one_step["coverage"].tolist(), strict=True):
        value = _value(share, missing, "one_step", "coverage")
        good = f"{level:g}; below it is overconfident"
        rows.append((f"{level:.0%} interval holds the truth, one step", value, good))
    for name, quantity, good in (
        ("spread_over_error", "predicted std over error", "1; below it is overconfident"),
        ("total_correlation", "rank correlation of predicted std and error", "above 0, up to 1"),
        (
            "epistemic_correlation",
            "rank correlation of the members' disagreement and error",
            "above 0, up to 1",
        ),
    ):
        rows.append((quantity, _value(spread[name], missing, "spread", name), good))
    return rows


def _termination_rows(entries: TensorDict, missing: Mapping[str, str]) -> list[_Row]:
    expected = f"{float(entries['expected']):.1f}"
    actual = _value(entries["actual"], missing, "termination", "actual", ".0f")
    rows = [("terminations expected", expected, f"the real number: {actual}")]
    for name, quantity, good in (
        ("precision", "precision of termination (probability over 0.5)", "1"),
        ("recall", "recall of termination (probability over 0.5)", "1"),
        ("auc", "area under the ROC curve of termination", "1; 0.5 is chance"),
    ):
        rows.append((quantity, _value(entries[name], missing, "termination", name), good))
    return rows


def _reward_rows(entries: TensorDict, horizon: int, missing: Mapping[str, str]) -> list[_Row]:
    of_return = f"the return of {horizon} imagined step{'s' if horizon > 1 else ''}"
    constant = "1; 0 is a constant"
    return [
        (quantity, _value(entries[name], missing, "reward", name), good)
        for name, quantity, good in (
            ("explained_variance", "explained variance of the reward", constant),
            ("return_explained_variance", f"explained variance of {of_return}", constant),
            ("return_correlation", f"correlation of {of_return} with the real one", "1"),
        )
    ]
