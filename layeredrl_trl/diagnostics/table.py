"""The report as a Markdown table: what it is, how much it is, and what would be good."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tensordict import TensorDict
from torch import Tensor

from layeredrl_trl.diagnostics.one_step import LEVELS


def report_table(metrics: TensorDict, missing: Mapping[str, str], notes: Sequence[str]) -> str:
    """Write the table of a :class:`~layeredrl_trl.diagnostics.ModelReport`.

    Args:
        metrics: of the report.
        missing: why an entry is NaN.
        notes: put in front.

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
    """Give the last step of the horizon that any segment has, counted from 0."""
    return int((metrics["open_loop", "segments"] > 0).sum()) - 1


def why_missing(missing: Mapping[str, str], section: str, name: str) -> str:
    """Say why an entry is NaN."""
    return missing.get(f"{section}/{name}", missing.get(section, "not a number"))


def _value(
    x: Tensor | float, missing: Mapping[str, str], section: str, name: str, form: str = ".3g"
) -> str:
    x = float(x)
    return why_missing(missing, section, name) if math.isnan(x) else f"{x:{form}}"


def _open_loop_rows(
    entries: TensorDict, last: int, missing: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    rows, horizon = [], entries["error"].numel()
    for step in sorted({0, last}):
        after = f"{step + 1} imagined step{'s' if step else ''}"
        n = int(entries["segments"][step])
        error, ratio, coverage = (
            _value(x, missing, "open_loop", name)
            for name, x in (
                ("error", entries["error"][step]),
                ("error_ratio", entries["error_ratio"][step]),
                ("coverage", entries["coverage"][step, 1]),
            )
        )
        rows += [
            (
                f"error after {after}, in std of the data ({n} segments)",
                error,
                "near 0; 1 is a blind guess",
            ),
            (f"… over that of “nothing changes”, after {after}", ratio, "below 1"),
            (f"80% interval of the particles holds the truth, after {after}", coverage, "0.8"),
        ]
    useful = int(entries["useful_steps"])
    value = _value(entries["error"][0], missing, "open_loop", "useful_steps")
    value = value if entries["error"][0].isnan() else f"{useful} of {last + 1}"
    good = "all of them" if last + 1 == horizon else f"all; no segment has all {horizon} steps"
    rows.append(("steps until “nothing changes” is as good", value, good))
    return rows


def _one_step_rows(metrics: TensorDict, missing: Mapping[str, str]) -> list[tuple[str, str, str]]:
    one_step, spread = metrics["one_step"], metrics["spread"]
    guess = _value(one_step["nll_guess"], missing, "one_step", "nll_guess")
    rows = [
        (
            "negative log-likelihood of one step, nats per latent dim",
            _value(one_step["nll"], missing, "one_step", "nll"),
            f"low; below {guess}, of one Gaussian fitted to the changes",
        )
    ]
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


def _termination_rows(
    entries: TensorDict, missing: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    actual = _value(entries["actual"], missing, "termination", "actual", ".0f")
    rows = [
        ("terminations expected", f"{float(entries['expected']):.1f}", f"the real number: {actual}")
    ]
    for name, quantity, good in (
        ("precision", "precision of termination (probability over 0.5)", "1"),
        ("recall", "recall of termination (probability over 0.5)", "1"),
        ("auc", "area under the ROC curve of termination", "1; 0.5 is chance"),
    ):
        rows.append((quantity, _value(entries[name], missing, "termination", name), good))
    return rows


def _reward_rows(
    entries: TensorDict, horizon: int, missing: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    of_return = f"the return of {horizon} imagined step{'s' if horizon > 1 else ''}"
    return [
        (quantity, _value(entries[name], missing, "reward", name), good)
        for name, quantity, good in (
            ("explained_variance", "explained variance of the reward", "1; 0 is a constant"),
            (
                "return_explained_variance",
                f"explained variance of {of_return}",
                "1; 0 is a constant",
            ),
            ("return_correlation", f"correlation of {of_return} with the real one", "1"),
        )
    ]
