"""The report as a table, as a figure and as scalars."""

import subprocess
import sys

import pytest
from matplotlib import _pylab_helpers
from matplotlib.figure import Figure

from layeredrl_trl.diagnostics import model_report
from tests.diagnostics.systems import KnownReward, known_predictor, transitions_buffer


@pytest.fixture(scope="module")
def report():
    predictor = known_predictor(KnownReward(), n_models=2, offset=0.1)
    return model_report(predictor, transitions_buffer(600), 3)


def test_every_row_has_a_quantity_a_value_and_what_is_good(report):
    lines = report.markdown().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    assert len(rows) > 15
    assert all(len(row) == 3 and all(cell.strip() for cell in row) for row in rows)
    assert lines[0].startswith("600 transitions, 512 segments of 3 steps; 2 members.")
    assert "learned from" in lines[0]
    assert f"| {report.metrics['termination', 'recall']:.3g} |" in report.markdown()
    assert report._repr_markdown_() == report.markdown()


def test_scalars_are_those_of_the_metrics(report):
    scalars = report.scalars()
    metrics = report.metrics
    assert scalars["open_loop/error_first"] == metrics["open_loop", "error"][0].item()
    assert scalars["one_step/coverage_80"] == metrics["one_step", "coverage"][1].item()
    assert scalars["termination/auc"] == metrics["termination", "auc"].item()
    assert not any(name.startswith("dims") for name in scalars)


def test_figure_has_six_labelled_panels_and_no_window(report, tmp_path):
    figure = report.figure()
    assert isinstance(figure, Figure) and len(figure.axes) == 6
    for axes in figure.axes:
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
        assert axes.lines or axes.collections
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 20_000
    assert not _pylab_helpers.Gcf.get_all_fig_managers()


def test_only_the_figure_needs_matplotlib():
    code = """
import sys
sys.modules["matplotlib"] = None
from layeredrl_trl import model_report
from layeredrl_trl.diagnostics.figure import draw_report
try:
    draw_report({}, {})
except ImportError as error:
    assert "layeredrl_trl[demo]" in str(error), error
else:
    raise AssertionError("drawn without matplotlib")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
