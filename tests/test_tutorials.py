"""Every tutorial runs, and its notebook is what its script says, executed."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "tutorials"
SCRIPTS = sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
REMAKE = "run `make tutorials`"

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def executed_cells(notebook):
    """The cells that an execution numbers: code that is not blank."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


@each_script
def test_script_has_a_notebook(script):
    assert script.with_suffix(".ipynb").is_file(), REMAKE


@each_notebook
def test_notebook_has_a_script(notebook):
    assert notebook.with_suffix(".py") in SCRIPTS


@each_notebook
def test_notebook_has_the_cells_of_its_script(notebook):
    script = jupytext.read(notebook.with_suffix(".py"))
    assert sources(jupytext.read(notebook)) == sources(script), REMAKE


@each_notebook
def test_notebook_was_executed_in_order_without_errors(notebook):
    cells = executed_cells(jupytext.read(notebook))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), REMAKE
    assert outputs, f"no cell has an output: {REMAKE}"
    assert [output.ename for output in outputs if output.output_type == "error"] == []


@pytest.mark.slow
@each_script
def test_script_runs_in_smoke_mode(script, tmp_path):
    environment = os.environ | {
        "LAYEREDRL_TRL_SMOKE": "1",
        "MPLBACKEND": "Agg",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
