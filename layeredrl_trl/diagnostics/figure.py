"""The report as a figure of six panels. Matplotlib is optional: the extra ``demo`` brings it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDict

from layeredrl_trl.diagnostics.one_step import LEVELS
from layeredrl_trl.diagnostics.table import why_missing

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
except ImportError as error:  # only drawing needs it
    _NO_MATPLOTLIB = error
else:
    _NO_MATPLOTLIB = None

_REAL, _MODEL, _GUESS, _MUTED = "#222222", "#2b6cb0", "#c05621", "#9a9a9a"
_SHADES = ("#90bce0", "#5591c9", "#1f4e82")


def draw_report(metrics: TensorDict, missing: Mapping[str, str]) -> Figure:
    """Draw a :class:`~layeredrl_trl.diagnostics.ModelReport`.

    Args:
        metrics: of the report.
        missing: why an entry is NaN; said in its panel.

    Returns:
        The figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    if _NO_MATPLOTLIB is not None:
        raise ImportError(
            "A report's figure needs matplotlib: pip install 'layeredrl_trl[demo]', or use "
            "markdown() and scalars(), which do not."
        ) from _NO_MATPLOTLIB
    figure = Figure(figsize=(13, 7.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    (error, coverage, pit), (spread, termination, returns) = figure.subplots(2, 3)
    _draw_error(error, metrics["open_loop"], missing)
    _draw_coverage(coverage, metrics["open_loop"], missing)
    _draw_pit(pit, metrics["one_step"], missing)
    _draw_spread(spread, metrics["spread"], missing)
    _draw_termination(termination, metrics["termination"], missing)
    _draw_returns(returns, metrics, missing)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10.5)
    return figure


def _draw_error(axes: Axes, entries: TensorDict, missing: Mapping[str, str]) -> None:
    axes.set(
        title="Error of imagined steps",
        xlabel="imagined steps",
        ylabel="RMS error (std of the data)",
    )
    if not entries["error"].isfinite().any():
        return _say(axes, why_missing(missing, "open_loop", "error"))
    steps = torch.arange(1, entries["error"].numel() + 1)
    style = {"marker": "o", "markersize": 3}
    axes.plot(steps, entries["persistence_error"], color=_GUESS, label="“nothing changes”", **style)
    axes.plot(steps, entries["error"], color=_MODEL, label="the model", **style)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def _draw_coverage(axes: Axes, entries: TensorDict, missing: Mapping[str, str]) -> None:
    axes.set(
        title="Do the particles hold the truth?",
        xlabel="imagined steps",
        ylabel="fraction within the interval",
        ylim=(0, 1.03),
    )
    coverage = entries["coverage"]
    if not coverage.isfinite().any():
        return _say(axes, why_missing(missing, "open_loop", "coverage"))
    steps = torch.arange(1, len(coverage) + 1)
    for level, shade, share in zip(LEVELS, _SHADES, coverage.unbind(1), strict=True):
        axes.axhline(level, color=shade, linewidth=1, linestyle="--")
        label = f"{100 * level:.0f}% interval"
        axes.plot(steps, share, color=shade, marker="o", markersize=3, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower left", title="dashed: as it should be")


def _draw_pit(axes: Axes, entries: TensorDict, missing: Mapping[str, str]) -> None:
    axes.set(
        title="Calibration of one step",
        xlabel="where the truth lies in the prediction (PIT)",
        ylabel="density",
        xlim=(0, 1),
    )
    density = entries["pit_histogram"]
    if not density.isfinite().any():
        return _say(axes, why_missing(missing, "one_step", "pit_histogram"))
    left = [i / density.numel() for i in range(density.numel())]
    axes.bar(left, density.tolist(), width=left[1], align="edge", color=_MODEL, alpha=0.75)
    axes.axhline(1, color=_REAL, linewidth=1, linestyle="--", label="calibrated")
    axes.set_ylim(top=1.3 * max(1.0, density.max().item()))
    axes.text(
        0.5,
        0.97,
        "high ends: overconfident · high middle: too wide",
        transform=axes.transAxes,
        ha="center",
        va="top",
        fontsize=8.5,
        color="#555555",
    )


def _draw_spread(axes: Axes, entries: TensorDict, missing: Mapping[str, str]) -> None:
    axes.set(
        title="Does it know where it errs?",
        xlabel="predicted std (std of the data)",
        ylabel="RMS error (std of the data)",
    )
    total, error = entries["total_std"], entries["total_error"]
    if not (total.isfinite() & error.isfinite()).any():
        return _say(axes, why_missing(missing, "spread", "total_std"))
    axes.plot(total, error, color=_MODEL, marker="o", markersize=5, label="predicted std, in all")
    shown = [total, error]
    if entries["epistemic_correlation"].isfinite():
        shown += [entries["epistemic_std"], entries["epistemic_error"]]
        label = "disagreement of the members"
        axes.plot(*shown[2:], color=_GUESS, marker="s", markersize=4, label=label)
    values = torch.cat(shown)
    values = values[values.isfinite() & (values > 0)]
    ends = [values.min().item() / 1.3, values.max().item() * 1.3]
    axes.plot(ends, ends, color=_REAL, linewidth=1, linestyle="--", label="std = error")
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())  # they would run into each other
    axes.set_ylim(top=4 * ends[1])  # room for the legend
    axes.legend(frameon=False, loc="upper left")


def _draw_termination(axes: Axes, entries: TensorDict, missing: Mapping[str, str]) -> None:
    axes.set(
        title="Termination",
        xlabel="predicted probability",
        ylabel="fraction that terminated",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    if entries["actual"].isfinite():
        expected, actual = entries["expected"], entries["actual"]
        axes.set_title(f"Termination: {expected:.0f} expected, {actual:.0f} real")
    if not entries["recall"].isfinite():
        return _say(axes, why_missing(missing, "termination", "recall"))
    axes.plot([0, 1], [0, 1], color=_REAL, linewidth=1, linestyle="--", label="calibrated")
    prob, rate, count = (entries[f"bin_{name}"] for name in ("prob", "rate", "count"))
    there = count > 0
    axes.plot(prob[there], rate[there], color=_MODEL, linewidth=1)
    sizes = 15 + 25 * count[there].log10()
    axes.scatter(prob[there], rate[there], s=sizes, color=_MODEL, zorder=3)
    for x, y, n in zip(prob[there], rate[there], count[there], strict=True):
        below = y > 0.85
        axes.annotate(
            f"{n:.0f}",
            (x, y),
            xytext=(0, -9 if below else 8),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=8,
            color="#555555",
        )
    axes.legend(frameon=False, loc="upper left", title="numbers: transitions")


def _draw_returns(axes: Axes, metrics: TensorDict, missing: Mapping[str, str]) -> None:
    entries, horizon = metrics["reward"], metrics["open_loop", "error"].numel()
    axes.set(
        title="Imagined and real returns",
        xlabel=f"real return of {horizon} steps",
        ylabel="imagined return",
    )
    real, imagined = entries["real_return"], entries["imagined_return"]
    if not real.numel():
        return _say(axes, why_missing(missing, "reward", "return_correlation"))
    ends = torch.stack([real.min(), real.max()])
    axes.plot(ends, ends, color=_REAL, linewidth=1, linestyle="--", label="equal")
    axes.scatter(real, imagined, s=12, color=_MODEL, alpha=0.5, linewidths=0)
    if entries["return_correlation"].isfinite():
        axes.set_title(f"Returns: correlation {entries['return_correlation']:.3f}")
    axes.legend(frameon=False, loc="upper left")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#555555")
