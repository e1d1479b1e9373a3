"""The report as a figure of six panels. Matplotlib is optional: the extra ``demo`` brings it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDict

from layeredrl_trl.diagnostics.one_step import LEVELS
from layeredrl_trl.diagnostics.table import why_missing

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
except ImportError as error:  # only drawing needs matplotlib
    _NO_MATPLOTLIB = error
else:
    _NO_MATPLOTLIB = None

_MODEL, _GUESS = "#2b6cb0", "#c05621"
_SHADES = ("#90bce0", "#5591c9", "#1f4e82")
_IDEAL = {"color": "#222222", "linewidth": 1, "linestyle": "--"}
_REMARK = {"color": "#555555", "ha": "center"}


def draw_report(metrics: TensorDict, missing: Mapping[str, str]) -> Figure:
    """Draw the metrics of a :class:`~layeredrl_trl.diagnostics.ModelReport`.

    A panel that has nothing to show says why, see ``missing``.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    if _NO_MATPLOTLIB is not None:
        raise ImportError(
            "A report's figure needs matplotlib: pip install 'layeredrl_trl[demo]', or use "
            "markdown() and scalars(), which do not."
        ) from _NO_MATPLOTLIB
    figure = Figure(figsize=(13, 7.4), dpi=110, layout="constrained")
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
    _label(axes, "Error of imagined steps", "imagined steps", "RMS error (std of the data)")
    if not entries["error"].isfinite().any():
        return _write(axes, why_missing(missing, "open_loop", "error"))
    steps = torch.arange(1, entries["error"].numel() + 1)
    style = {"marker": "o", "markersize": 3}
    axes.plot(steps, entries["persistence_error"], color=_GUESS, label="“nothing changes”", **style)
    axes.plot(steps, entries["error"], color=_MODEL, label="the model", **style)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def _draw_coverage(axes: Axes, entries: TensorDict, missing: Mapping[str, str]) -> None:
    title, ylabel = "Do the particles hold the truth?", "fraction within the interval"
    _label(axes, title, "imagined steps", ylabel)
    axes.set_ylim(0, 1.03)
    coverage = entries["coverage"]
    if not coverage.isfinite().any():
        return _write(axes, why_missing(missing, "open_loop", "coverage"))
    steps = torch.arange(1, len(coverage) + 1)
    for level, shade, share in zip(LEVELS, _SHADES, coverage.unbind(1), strict=True):
        axes.axhline(level, color=shade, linewidth=1, linestyle="--")
        label = f"{100 * level:.0f}% interval"
        axes.plot(steps, share, color=shade, marker="o", markersize=3, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower left", title="dashed: as it should be")


def _draw_pit(axes: Axes, entries: TensorDict, missing: Mapping[str, str]) -> None:
    xlabel = "where the truth lies in the prediction (PIT)"
    _label(axes, "Calibration of one step", xlabel, "density")
    axes.set_xlim(0, 1)
    density = entries["pit_histogram"]
    if not density.isfinite().any():
        return _write(axes, why_missing(missing, "one_step", "pit_histogram"))
    left = [i / density.numel() for i in range(density.numel())]
    axes.bar(left, density.tolist(), width=left[1], align="edge", color=_MODEL, alpha=0.75)
    axes.axhline(1, **_IDEAL, label="calibrated")
    axes.set_ylim(top=1.3 * max(1.0, density.max().item()))
    text = "high ends: overconfident · high middle: too wide"
    axes.text(0.5, 0.97, text, transform=axes.transAxes, va="top", fontsize=8.5, **_REMARK)


def _draw_spread(axes: Axes, entries: TensorDict, missing: Mapping[str, str]) -> None:
    xlabel, ylabel = "predicted std (std of the data)", "RMS error (std of the data)"
    _label(axes, "Does it know where it errs?", xlabel, ylabel)
    total, error = entries["total_std"], entries["total_error"]
    if not (total.isfinite() & error.isfinite()).any():
        return _write(axes, why_missing(missing, "spread", "total_std"))
    axes.plot(total, error, color=_MODEL, marker="o", markersize=5, label="predicted std, in all")
    shown = [total, error]
    if entries["epistemic_correlation"].isfinite():
        shown += [entries["epistemic_std"], entries["epistemic_error"]]
        label = "disagreement of the members"
        axes.plot(*shown[2:], color=_GUESS, marker="s", markersize=4, label=label)
    values = torch.cat(shown)
    values = values[values.isfinite() & (values > 0)]
    ends = [values.min().item() / 1.3, values.max().item() * 1.3]
    axes.plot(ends, ends, **_IDEAL, label="std = error")
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())  # minor labels would overlap
    axes.set_ylim(top=4 * ends[1])  # room for the legend
    axes.legend(frameon=False, loc="upper left")


def _draw_termination(axes: Axes, entries: TensorDict, missing: Mapping[str, str]) -> None:
    _label(axes, "Termination", "predicted probability", "fraction that terminated")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    if entries["actual"].isfinite():
        expected, actual = entries["expected"], entries["actual"]
        axes.set_title(f"Termination: {expected:.0f} expected, {actual:.0f} real")
    if not entries["recall"].isfinite():
        return _write(axes, why_missing(missing, "termination", "recall"))
    axes.plot([0, 1], [0, 1], **_IDEAL, label="calibrated")
    prob, rate, count = (entries[f"bin_{name}"] for name in ("prob", "rate", "count"))
    filled = count > 0
    axes.plot(prob[filled], rate[filled], color=_MODEL, linewidth=1)
    sizes = 15 + 25 * count[filled].log10()
    axes.scatter(prob[filled], rate[filled], s=sizes, color=_MODEL, zorder=3)
    for x, y, n in zip(prob[filled], rate[filled], count[filled], strict=True):
        place = {"xytext": (0, -9), "va": "top"} if y > 0.85 else {"xytext": (0, 8), "va": "bottom"}
        style = {"textcoords": "offset points", "fontsize": 8, **_REMARK}
        axes.annotate(f"{n:.0f}", (x, y), **place, **style)
    axes.legend(frameon=False, loc="upper left", title="numbers: transitions")


def _draw_returns(axes: Axes, metrics: TensorDict, missing: Mapping[str, str]) -> None:
    entries, horizon = metrics["reward"], metrics["open_loop", "error"].numel()
    xlabel = f"real return of {horizon} steps"
    _label(axes, "Imagined and real returns", xlabel, "imagined return")
    real, imagined = entries["real_return"], entries["imagined_return"]
    if not real.numel():
        return _write(axes, why_missing(missing, "reward", "return_correlation"))
    ends = torch.stack([real.min(), real.max()])
    axes.plot(ends, ends, **_IDEAL, label="equal")
    axes.scatter(real, imagined, s=12, color=_MODEL, alpha=0.5, linewidths=0)
    if entries["return_correlation"].isfinite():
        axes.set_title(f"Returns: correlation {entries['return_correlation']:.3f}")
    axes.legend(frameon=False, loc="upper left")


def _label(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)


def _write(axes: Axes, text: str) -> None:
    """Write why there is nothing to draw."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, va="center", **_REMARK)
