"""How good a learned model is, measured on real steps that it did not learn from.

``model_report`` reads steps from a replay buffer (``held_out.py``), lets the model predict one step
(``one_step.py``) and imagine many (``open_loop.py``), and gives a ``ModelReport``: numbers, a table
and a figure. ``ModelReportHook`` makes such a report at intervals during training and logs its
scalars.
"""

from layeredrl_trl.diagnostics.hook import ModelReportHook
from layeredrl_trl.diagnostics.model_report import ModelReport, model_report

__all__ = ["ModelReport", "ModelReportHook", "model_report"]
